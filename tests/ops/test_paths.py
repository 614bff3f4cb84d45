"""Which path answers, and what every op promises to autograd, compilers and callers."""

import pytest
import torch

from moe import ops
from moe.config import UserError
from moe.kernels import reference
from moe.ops import paths
from tests.op_cases import attention_inputs, expert_inputs, head_inputs, ids_of, segments_of

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_every_op_is_well_formed_for_autograd_and_compilers(dtype):
    expert = [t.requires_grad_() if t.is_floating_point() else t
              for t in expert_inputs(ids_of("outside", 6, 2, 4), 4, 8, 8, dtype)]  # fmt: skip
    torch.library.opcheck(torch.ops.moe.experts.default, (*expert, False))
    plain = [t.detach() for t in expert]
    torch.library.opcheck(
        torch.ops.moe.experts_backward.default,
        (torch.randn(6, 8, dtype=dtype), *plain, torch.ops.moe.experts.default(*plain, False)[1], True),
    )
    rows = [torch.randn(7, 8, dtype=dtype), *plain[1:3], torch.tensor([2, 2, 5, 6], dtype=torch.int32)]
    rows = [*rows, torch.rand(7, dtype=dtype)]
    for recompute in (False, True):
        inputs = [t.clone().requires_grad_() if t.is_floating_point() else t for t in rows]
        torch.library.opcheck(torch.ops.moe.grouped_swiglu.default, (*inputs, recompute))
    qkv = [x.requires_grad_() for x in attention_inputs(2, 5, 2, 4, 3, dtype)]
    for segments in (None, segments_of(2, 5)):
        torch.library.opcheck(torch.ops.moe.attention.default, (*qkv, 0.5, segments))
    plain = [x.detach() for x in qkv]
    out = torch.ops.moe.attention.default(*plain, 0.5, None)
    torch.library.opcheck(torch.ops.moe.attention_backward.default, (torch.randn_like(out[0]), *plain, *out, 0.5))
    hidden, weight, targets = head_inputs(5, 4, 7, dtype)
    for grad in (False, True):
        inputs = (hidden.requires_grad_(grad), weight.requires_grad_(grad), targets, 2, grad)
        torch.library.opcheck(torch.ops.moe.linear_cross_entropy.default, inputs)


@pytest.mark.parametrize("op", ["experts", "linear_cross_entropy"])
def test_compilers_are_told_the_layout_of_results_for_inputs_of_any_layout(op):
    transposed = torch.randn(8, 6, dtype=F64).t().requires_grad_()
    if op == "experts":
        inputs = expert_inputs(ids_of("spread", 6, 2, 4), 4, 8, 8, F64)
        torch.library.opcheck(torch.ops.moe.experts.default, (transposed, *inputs[1:], False))
    else:
        weight = torch.randn(8, 11, dtype=F64).t().requires_grad_()
        inputs = (transposed, weight, torch.randint(0, 11, (6,)), 4, True)
        torch.library.opcheck(torch.ops.moe.linear_cross_entropy.default, inputs)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda z: ops.experts(z(3, 5), z(2, 8, 4), z(2, 4, 4), z(3, 1).long(), z(3, 1)), ["(3, 5)", "(2, 8, 4)"]),
        (lambda z: ops.experts(z(3, 4), z(2, 8, 4), z(2, 4, 5), z(3, 1).long(), z(3, 1)), ["(2, 4, 5)"]),
        (lambda z: ops.experts(z(3, 4), z(2, 7, 4), z(2, 4, 3), z(3, 1).long(), z(3, 1)), ["(2, 7, 4)"]),
        (lambda z: ops.experts(z(3, 4), z(2, 8, 4), z(2, 4, 4), z(3, 2).long(), z(3, 1)), ["(3, 2)", "(3, 1)"]),
        (lambda z: ops.experts(z(3, 4), z(2, 8, 4), z(2, 4, 4), z(2, 1).long(), z(2, 1)), ["(2, 1)", "N=3"]),
        (lambda z: ops.experts(z(3, 4), z(8, 4), z(2, 4, 4), z(3, 1).long(), z(3, 1)), ["(8, 4)"]),
        (lambda z: ops.experts(z(3, 4), z(0, 8, 4), z(0, 4, 4), z(3, 1).long(), z(3, 1)), ["(0, 8, 4)", "empty"]),
        (lambda z: ops.experts(z(3, 4).half(), z(2, 8, 4), z(2, 4, 4), z(3, 1).long(), z(3, 1)), ["w13", "float32", "float16"]),
        (lambda z: ops.experts(z(3, 4), z(2, 8, 4), z(2, 4, 4), z(3, 1), z(3, 1)), ["ids", "float32"]),
        (lambda z: ops.experts(z(3, 4), z(2, 8, 4), z(2, 4, 4), z(3, 1).bool(), z(3, 1)), ["ids", "bool"]),
        (lambda z: ops.experts(z(3, 4), z(2, 8, 4), z(2, 4, 4), z(3, 1).long(), z(3, 1).long()), ["gates", "int64"]),
        (lambda z: ops.grouped_swiglu(z(3, 4), z(2, 8, 4), z(2, 4, 4), z(2).int(), z(2)), ["(2,)", "[3]"]),
        (lambda z: ops.grouped_swiglu(z(3, 4), z(2, 8, 4), z(2, 4, 4), z(2), z(3)), ["float32", "[2] int32"]),
        (lambda z: ops.attention(z(1, 3, 2, 4), z(1, 3, 2, 5), z(1, 3, 2, 4), 1.0), ["(1, 3, 2, 4)", "(1, 3, 2, 5)"]),
        (lambda z: ops.attention(z(1, 3, 2, 4), z(1, 3, 2, 4), z(1, 4, 2, 4), 1.0), ["(1, 4, 2, 4)"]),
        (lambda z: ops.rms_norm(z(3, 4), z(3), 1e-6), ["(3, 4)", "(3,)"]),
        (lambda z: ops.linear_cross_entropy(z(3, 4), z(5, 6), z(3).long()), ["(3, 4)", "(5, 6)"]),
        (lambda z: ops.linear_cross_entropy(z(3, 4), z(5, 4), z(2).long()), ["(2,)"]),
    ],
)
def test_wrong_shapes_are_refused_by_name(call, words):
    with pytest.raises(ValueError) as error:
        call(torch.zeros)
    assert all(word in str(error.value) for word in words), error.value


def test_reference_path_answers_when_the_environment_asks(ops_path, monkeypatch, agree):
    inputs = expert_inputs(ids_of("outside", 5, 2, 4), 4, 8, 8, F64)
    fast = ops.experts(*inputs)
    called = []
    monkeypatch.setattr(reference, "experts", lambda *a, real=reference.experts: called.append(1) or real(*a))
    ops_path("reference")
    assert ops.selected() == "reference"
    agree(ops.experts(*inputs), fast)
    assert called
    q, k, v = attention_inputs(1, 4, 2, 3, 2, F64)
    slow = ops.attention(q, k, v, 0.5), ops.linear_cross_entropy(q[0, :, 0], k[0, :, 0], torch.arange(4))
    ops_path("torch")
    agree(ops.attention(q, k, v, 0.5), slow[0])
    agree(ops.linear_cross_entropy(q[0, :, 0], k[0, :, 0], torch.arange(4)), slow[1])


def test_environment_wins_over_select_and_unknown_paths_are_refused(ops_path, monkeypatch):
    monkeypatch.delenv("MOE_OPS", raising=False)
    assert ops.selected() == "auto"
    monkeypatch.setattr(paths, "_selected", "auto")  # restored afterwards
    ops.select("reference")
    assert ops.selected() == "reference"
    ops_path("torch")
    assert ops.selected() == "torch"
    ops_path("refrence")
    with pytest.raises(UserError, match="MOE_OPS='refrence'.*did you mean 'reference'"):
        ops.selected()
    with pytest.raises(UserError, match="train.ops='torhc'.*did you mean 'torch'"):
        ops.select("torhc")
