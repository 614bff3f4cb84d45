"""The Triton path behind the door, in the interpreter: gradients, compilers, memory, and who answers when it is wrong."""

from types import SimpleNamespace

import pytest
import torch

import moe
from moe import ops
from moe.config import UserError
from moe.kernels import chain, selftest
from moe.ops import paths
from tests.op_cases import expert_inputs, ids_of, with_gradients

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


@pytest.fixture
def triton(ops_path, monkeypatch):
    """Demanded for every op of the test, and trusted: the start-up check has tests of its own."""
    monkeypatch.setattr(paths, "_verdicts", {("cpu", None, dtype): "" for dtype in paths.KERNEL_DTYPES})
    ops_path("triton")


def test_experts_by_triton_are_experts_by_torch(agree, triton, ops_path):
    inputs = expert_inputs(ids_of("outside", 13, 3, 6), 6, 16, 8, F32)
    upstream, found = torch.randn(13, 16), []
    for path in ("triton", "torch"):
        ops_path(path)
        found.append(with_gradients(ops.experts, inputs, upstream, (0, 1, 2, 4)))
    agree(found[0][0], found[1][0])
    for a, e in zip(found[0][1], found[1][1]):
        agree(a, e)


def test_sorted_rows_by_triton_are_sorted_rows_by_torch(agree, triton, ops_path):
    rows, w13, w2, gates = torch.randn(14, 16), torch.randn(4, 16, 16), torch.randn(4, 16, 8), torch.rand(14)
    inputs = rows, w13, w2, torch.tensor([3, 3, 9, 12], dtype=torch.int32), gates
    upstream, found = torch.randn(14, 16), []
    for path in ("triton", "torch"):
        ops_path(path)
        found.append(with_gradients(ops.grouped_swiglu, inputs, upstream, (0, 1, 2, 4)))
    agree(found[0][0], found[1][0])
    for a, e in zip(found[0][1], found[1][1]):
        agree(a, e)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_ops_are_well_formed_for_autograd_and_compilers(triton, recompute):
    given = expert_inputs(ids_of("few", 6, 2, 4), 4, 8, 8, F32)  # with ids of nobody some rows are left unwritten
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in given]
    torch.library.opcheck(torch.ops.moe.experts_triton.default, (*inputs, recompute))
    x, w13, w2, ids, gates = (t.detach() for t in inputs)
    y, *kept = torch.ops.moe.experts_triton.default(x, w13, w2, ids, gates, recompute)
    torch.library.opcheck(torch.ops.moe.experts_triton_backward.default, (y, x, w13, w2, gates, *kept, True))
    ends, rows, row_gates = torch.tensor([2, 2, 5, 7], dtype=torch.int32), torch.randn(7, 8), torch.rand(7)
    inputs = [t.clone().requires_grad_() for t in (rows, w13, w2, row_gates)]
    torch.library.opcheck(torch.ops.moe.grouped_swiglu_triton.default, (*inputs[:3], ends, inputs[3], recompute))


def test_a_compiled_layer_is_one_graph_with_the_same_gradients(triton, agree):
    inputs = expert_inputs(ids_of("spread", 9, 2, 4), 4, 16, 8, F32)
    upstream = torch.randn(9, 16)
    compiled = torch.compile(lambda *a: ops.experts(*a).sin(), fullgraph=True, backend="aot_eager")
    y, gradients = with_gradients(compiled, inputs, upstream, (0, 1, 2, 4))
    expected, right = with_gradients(lambda *a: ops.experts(*a).sin(), inputs, upstream, (0, 1, 2, 4))
    agree(y, expected)
    for a, e in zip(gradients, right):
        agree(a, e)


def test_the_start_up_check_runs_once_also_where_a_compiler_looks_first(monkeypatch, ops_path):
    monkeypatch.setattr(paths, "_verdicts", {})
    calls = []
    monkeypatch.setattr(selftest, "disagreement", lambda device, dtype: calls.append((device.type, dtype)) or "")
    ops_path("triton")
    inputs = expert_inputs(ids_of("spread", 5, 2, 4), 4, 8, 8, F32)
    torch.compile(lambda *a: ops.experts(*a), fullgraph=True, backend="aot_eager")(*inputs)
    ops.experts(*inputs)
    assert calls == [("cpu", F32)]


def test_frozen_weights_cost_no_product(triton, monkeypatch, agree):
    inputs = expert_inputs(ids_of("spread", 9, 2, 4), 4, 16, 8, F32)
    upstream = torch.randn(9, 16)
    expected = with_gradients(ops.experts, inputs, upstream, (0, 1, 2, 4))[1]
    monkeypatch.setattr(chain, "dw", lambda *_, **__: pytest.fail("a gradient that nobody wants"))
    found = with_gradients(ops.experts, inputs, upstream, (0, 4))[1]
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[3])


@pytest.mark.parametrize("recompute", [False, True])
def test_what_the_backward_pass_needs_is_within_its_budget(triton, recompute):
    """2D + 4KF bytes a token of bf16 activations, and at most 16K of indices and gates."""
    n, k, d, f = 64, 4, 32, 16
    x, w13, w2, ids, gates = expert_inputs(ids_of("spread", n, k, 8), 8, d, f, BF16)
    leaves = [t.requires_grad_() for t in (x, w13, w2, gates.float().detach())]
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    weights = sum(t.numel() * 2 for t in (w13, w2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.experts(leaves[0], leaves[1], leaves[2], ids, leaves[3], recompute)
    activations = n * (2 * d + (0 if recompute else 4 * k * f))
    assert activations + weights < sum(kept.values()) <= activations + n * 16 * k + weights + 4 * 8  # and the ends


# -------------------------------------------------------------------------------------------------- who answers, and why


class Card:
    """A tensor on a GPU, as far as the choice of a path looks at it."""

    def __new__(cls, dtype=BF16):
        return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=dtype)


@pytest.fixture
def card(monkeypatch, ops_path):
    monkeypatch.setattr(paths, "_verdicts", {})
    monkeypatch.setattr(paths, "_unable", lambda: "")
    ops_path("auto")
    return Card()


def test_kernels_that_agree_with_the_oracle_answer_on_a_gpu(card, monkeypatch):
    monkeypatch.setattr(selftest, "disagreement", lambda *_: "")
    assert ops.path_for(card) == "triton"
    assert ops.path_for(Card(F64)) == "torch" and ops.path_for(torch.zeros(1)) != "triton"


@pytest.mark.parametrize("where", ["inference mode", "default device", "default dtype", "fake tensors"])
def test_the_start_up_check_does_not_care_what_its_caller_is_in(monkeypatch, ops_path, where):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(paths, "_verdicts", {})
    ops_path("triton")
    dtype = torch.get_default_dtype()
    try:
        if where == "default dtype":
            torch.set_default_dtype(F64)
        mode = {"inference mode": torch.inference_mode, "fake tensors": FakeTensorMode}.get(where, torch.enable_grad)
        with mode(), torch.device("meta" if where == "default device" else "cpu"):
            assert paths._verdict("cpu", None, F32) == ""
            assert torch.get_default_dtype() == (F64 if where == "default dtype" else F32)
    finally:
        torch.set_default_dtype(dtype)


def test_wrong_kernels_are_left_with_one_loud_warning(card, monkeypatch):
    monkeypatch.setattr(selftest, "disagreement", lambda *_: "dw2 off by 0.3 of its largest value")
    with pytest.warns(RuntimeWarning, match="slower PyTorch path.*bfloat16 on cuda: dw2 off by 0.3") as seen:
        assert [ops.path_for(card) for _ in range(3)] == ["torch"] * 3
    assert len(seen) == 1


def test_wrong_kernels_that_were_demanded_are_an_error(card, monkeypatch, ops_path):
    monkeypatch.setattr(selftest, "disagreement", lambda *_: "dw2 off by 0.3 of its largest value")
    ops_path("triton")
    with pytest.raises(UserError, match="triton was demanded.*dw2 off by 0.3.*auto or torch"):
        ops.path_for(card)


def test_float64_has_no_kernels_and_says_so(triton):
    with pytest.raises(UserError, match="no kernels for torch.float64"):
        ops.path_for(torch.zeros(1, dtype=F64))


def test_triton_without_a_gpu_is_refused_when_it_is_selected(monkeypatch):
    monkeypatch.delenv("MOE_OPS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(paths, "_selected", "auto")
    with pytest.raises(UserError, match="train.ops=triton: the kernels need a GPU.*auto or torch"):
        ops.select("triton")


@pytest.mark.parametrize("path", ["triton", "torch"])
def test_a_layer_under_autocast_computes_as_linear_layers_do_and_routes_in_fp32(triton, ops_path, agree, path):
    ops_path(path)
    layer, first = moe.MoE(16, 8, 8, 2), torch.nn.Linear(16, 16)
    x = torch.randn(11, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(first(x))
    assert y.dtype == BF16 and routing.gates.dtype == F32
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == F32 for p in (*layer.experts.parameters(), first.weight))
    with torch.no_grad():
        again = layer(first(x).bfloat16().float(), replay=routing.experts)[0]
    agree(y.float(), again, 3e-2)


def test_a_layer_of_a_wrong_kernel_is_noticed(triton, monkeypatch, agree):
    """The comparison above can fail."""
    inputs = expert_inputs(ids_of("spread", 9, 2, 4), 4, 16, 8, F32)
    right = ops.experts(*inputs)
    combine = chain.combine
    monkeypatch.setattr(chain, "combine", lambda rows, inv: combine(rows, inv.flip(1) * 0))
    with pytest.raises(AssertionError, match="off by"):
        agree(ops.experts(*inputs), right)
