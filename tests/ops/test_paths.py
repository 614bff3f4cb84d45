"""Which path answers, and what every op promises to autograd, compilers and callers."""

import pytest
import torch

from moe import ops
from moe.config import UserError
from moe.kernels import reference
from moe.kernels.native import library, selftest
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


# --------------------------------------------------------------------------------------------- the native kernels' turn

CPU, AGAIN = torch.device("cpu"), "built from other sources; `make native` builds them again"


@pytest.fixture
def native(monkeypatch, ops_path):
    """native(missing="", wrong=""): a library in that state, met for the first time under `auto`."""

    def state(missing="", wrong="", exists=True):
        monkeypatch.setattr(paths, "_native_verdicts", {})
        monkeypatch.setattr(library, "status", lambda: missing)
        monkeypatch.setattr(library, "exists", lambda: exists)
        monkeypatch.setattr(library, "level", lambda: "avx2")
        checked = []
        monkeypatch.setattr(selftest, "disagreement", lambda dtype: checked.append(dtype) or wrong)
        ops_path("auto")
        return checked

    return state


def test_native_kernels_that_agree_answer_on_cpus_for_the_dtypes_they_know(native, recwarn):
    checked = native()
    for _ in range(2):
        assert [ops.path_for(torch.zeros(1, dtype=d)) for d in (F32, BF16)] == ["native", "native"]
    assert checked == [F32, BF16]
    assert [ops.path_for(torch.zeros(1, dtype=d)) for d in (F64, torch.float16)] == ["torch", "torch"]
    assert ops.path_for(torch.zeros(1, device="meta")) == "torch"
    assert paths.answer(CPU, F32) == "native, avx2" and paths.answer(CPU, F64) == "torch"
    assert not recwarn


def test_native_kernels_that_disagree_are_left_with_one_loud_warning(native):
    native(wrong="dw2 off by 0.3 of its largest value")
    with pytest.warns(RuntimeWarning, match="slower PyTorch path.*float32: dw2 off by 0.3") as seen:
        assert [ops.path_for(torch.zeros(1)) for _ in range(3)] == ["torch"] * 3
    assert len(seen) == 1
    assert "dw2 off by 0.3" in paths.answer(CPU, F32)


def test_no_library_is_no_reason_to_shout_but_the_header_says_why(native, recwarn):
    checked = native("the native kernels were not built; `make native` builds them", exists=False)
    assert ops.path_for(torch.zeros(1)) == "torch" and not checked and not recwarn
    assert paths.answer(CPU, BF16).startswith("torch, the slower path: the native kernels were not built; `make native`")


def test_a_stale_library_is_worth_a_warning_that_names_the_way_out(native):
    native(f"the native kernels were {AGAIN}")
    with pytest.warns(RuntimeWarning, match="other sources; `make native`"):
        assert ops.path_for(torch.zeros(1)) == "torch"


@pytest.mark.parametrize(
    "state, x, words",
    [
        (dict(missing=f"they were {AGAIN}"), dict(), "other sources; `make native`.*auto or torch"),
        (dict(wrong="y off by nan"), dict(), "disagree.*y off by nan.*auto or torch"),
        (dict(), dict(dtype=F64), "no native kernels for torch.float64.*auto or torch"),
        (dict(), dict(device="meta"), "run on CPUs, not on meta.*auto or torch"),
    ],
)
def test_native_kernels_that_were_demanded_and_cannot_answer_are_an_error(native, ops_path, recwarn, state, x, words):
    native(**state)
    ops_path("native")
    with pytest.raises(UserError, match=f"native was demanded: .*{words}"):
        ops.path_for(torch.zeros(1, **x))
    assert not recwarn


def test_native_without_a_library_is_refused_when_it_is_selected(native, monkeypatch):
    native(f"they were {AGAIN}")
    monkeypatch.setattr(paths, "_selected", "auto")
    monkeypatch.delenv("MOE_OPS")
    with pytest.raises(UserError, match="train.ops=native: .*`make native`.*auto or torch"):
        ops.select("native")


@pytest.mark.parametrize("path", ["auto", "native"])
def test_a_level_that_nobody_has_is_an_error_for_whoever_would_use_it(native, ops_path, monkeypatch, path):
    def status():
        raise ValueError("MOE_NATIVE_LEVEL='avx3' is not one of ['portable'], which run here")

    native()
    monkeypatch.setattr(library, "status", status)
    ops_path(path)
    with pytest.raises(UserError, match="MOE_NATIVE_LEVEL='avx3' is not one of.*unset it"):
        ops.path_for(torch.zeros(1))
    ops_path("torch")
    assert ops.path_for(torch.zeros(1)) == "torch"


@pytest.mark.skipif(library.status() != "", reason="there is no library")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_start_up_check_is_quick_passes_and_disturbs_nobody(dtype):
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"), paths.undisturbed():
        assert selftest.disagreement(dtype) == ""
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(library.status() != "", reason="there is no library")
@pytest.mark.parametrize("wrong", [1.001, float("nan")])
@pytest.mark.parametrize(
    "module, name, at, word",
    [("experts", "experts_backward", 2, "dw2 off by"), ("attention", "attention_backward", 1, "dk off by")],
)
def test_the_start_up_check_names_a_wrong_gradient(monkeypatch, module, name, at, word, wrong):
    module = getattr(selftest, module)
    backward = getattr(module, name)

    def faulty(*args):
        return [g * wrong if i == at else g for i, g in enumerate(backward(*args))]

    monkeypatch.setattr(module, name, faulty)
    assert word in selftest.disagreement(F32)
    monkeypatch.setattr(module, name, lambda *_: 1 / 0)
    assert selftest.disagreement(F32).startswith("ZeroDivisionError")
