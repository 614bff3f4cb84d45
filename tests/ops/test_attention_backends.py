"""The kernels of attention on GPUs: which one answers, what it is handed, and the numbers of those with a CPU path.

FlexAttention runs uncompiled here (whole scores, and block lists that nothing reads, so these are compared with
create_block_mask's); flash-attn and PyTorch's varlen_attn are played by loops with the real ones' demands.
"""

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe import MLA, Transformer, ops
from moe.config import OptimConfig, TrainConfig, UserError
from moe.kernels import flex, packed, sdpa, varlen
from moe.objectives import Pretraining
from moe.ops import attend, backends, fused
from moe.parallel import Ranks
from moe.train.engine import Engine
from tests.op_cases import attention_inputs, with_gradients
from tests.ops.test_attend import dense_attention

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def documents_of(name, batch=2, time=200):
    """[B, T] int32 segment ids, or None."""
    ids = torch.zeros(batch, time, dtype=torch.int32)
    match name:
        case "whole rows":
            return None
        case "random":
            ids = torch.sort(torch.randint(0, 6, (batch, time), dtype=torch.int32), -1).values
        case "border between blocks":
            ids[:, 128:] = 1
        case "one-token documents":
            ids = torch.arange(time, dtype=torch.int32).repeat(batch, 1)
        case "padding":  # as fine-tuning packs it; the last row is padding alone
            ids[:, 150:], ids[0, 20:60], ids[-1] = -1, 1, -1
            ids[0, 60:150] = 2
    return ids


def varlen_loops(q, k, v, borders, longest, scale):
    """Attention within each document of the line, with what the real kernels demand."""
    assert q.shape == k.shape == v.shape and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and borders.dtype == torch.int32 and borders.is_contiguous()
    at = borders.tolist()
    assert at[0] == 0 and at[-1] == len(q) and at == sorted(at)
    assert longest >= max(b - a for a, b in zip(at, at[1:]))
    rows = []
    for start, end in zip(at, at[1:]):
        s = torch.einsum("thd,shd->hts", q[start:end], k[start:end]) * scale
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        rows.append(torch.einsum("hts,shd->thd", s.masked_fill(future, -torch.inf).softmax(-1), v[start:end]))
    return torch.cat(rows)


@pytest.fixture
def gpu_kernels(monkeypatch):
    """Every backend runs on the CPU."""

    def flash(q, k, v, borders, borders_k, longest, longest_k, *, softmax_scale, causal, deterministic):
        assert borders is borders_k and longest == longest_k and causal
        return varlen_loops(q, k, v, borders, longest, softmax_scale)

    def of_torch(q, k, v, borders, borders_k, longest, longest_k, *, scale, window_size):
        assert borders is borders_k and longest == longest_k and window_size == (-1, 0)
        return varlen_loops(q, k, v, borders, longest, scale)

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_torch)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)  # it refuses gradients on CPUs
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")


def run(backend, q, k, v, scale, ids):
    return fused.attention(q, k, v, scale, fused.prepare(backend, ids, q))


@pytest.mark.parametrize("backend", ["flex", "flash", "sdpa"])
@pytest.mark.parametrize(
    "documents, dtype, dqk, dv",
    [
        ("whole rows", F64, 48, 32),  # tiny's widths
        ("random", F64, 48, 32),
        ("random", F32, 192, 128),  # V3's
        ("random", BF16, 24, 16),
        ("random", F64, 5, 11),
        ("border between blocks", F64, 24, 16),
        ("one-token documents", F64, 24, 16),
        ("padding", F32, 24, 16),
        ("whole rows", BF16, 24, 16),
    ],
)
def test_each_backend_agrees_with_whole_scores_in_value_and_gradients(
    agree, gpu_kernels, backend, documents, dtype, dqk, dv
):
    ids = documents_of(documents)
    q, k, v = attention_inputs(2, 200, 2, dqk, dv, dtype)
    upstream = torch.randn(v.shape).to(dtype)
    o, gradients = with_gradients(lambda *a: run(backend, *a, dqk**-0.5, ids), (q, k, v), upstream, (0, 1, 2))
    exact = with_gradients(
        lambda *a: dense_attention(*a, dqk**-0.5, ids), [x.double() for x in (q, k, v)], upstream, (0, 1, 2)
    )
    assert o.dtype == dtype
    agree(o, exact[0], what="o")
    for name, g, e in zip("qkv", gradients, exact[1]):  # documents of one token leave q and k no gradient
        agree(g, e, 3e-2 if dtype is BF16 else None, f"gradient of {name}", scale=1e-3)


@pytest.mark.parametrize("backend", ["flex", "flash", "sdpa"])
@pytest.mark.parametrize("time", [1, 256])
def test_backends_take_one_place_and_whole_blocks(agree, gpu_kernels, backend, time):
    q, k, v = attention_inputs(2, time, 1, 8, 8, F64)
    k = k[:, :, :1].expand(-1, -1, 1, -1)
    v = torch.cat((k, v), -1)[..., 8:]  # a view with gaps, as MLA makes it
    ids = documents_of("border between blocks", time=time)
    agree(run(backend, q, k, v, 0.4, ids), dense_attention(q, k, v, 0.4, ids))
    agree(run(backend, q, k, v, 0.4, None), dense_attention(q, k, v, 0.4, None))


# ---------------------------------------------------------------------------------------------------------- preparation


@pytest.mark.parametrize("time", [128, 300, 512])
@pytest.mark.parametrize("documents", ["random", "border between blocks", "one-token documents", "padding"])
def test_block_lists_are_those_of_create_block_mask(documents, time):
    ids = documents_of(documents, 3, time)
    whole = packed.multiple(time, 128)
    starts = packed.starts(ids, whole)
    of_place = torch.nn.functional.pad(ids, (0, whole - time), value=-7)  # what fills up is a document of its own
    expected = torch_flex.create_block_mask(
        lambda b, h, i, j: (j <= i) & (of_place[b, i] == of_place[b, j]), 3, None, whole, whole, device="cpu"
    )
    found = dict(zip(flex.BLOCK_MASK, flex.lists(starts), strict=True))
    for name, value in found.items():
        right = getattr(expected, name)
        assert value.dtype == torch.int32 and value.is_contiguous() and value.shape == right.shape
        assert torch.equal(value, right), name
    seen = (torch.arange(whole) <= torch.arange(whole)[:, None]) & (starts[..., None] <= torch.arange(whole))
    assert torch.equal(seen, torch_flex.create_mask(expected.mask_mod, 3, None, whole, whole, "cpu")[:, 0])


@pytest.mark.parametrize("documents", ["random", "one-token documents", "padding"])
def test_borders_are_where_documents_start_and_end(documents):
    ids = documents_of(documents)
    line = [(b, int(i)) for b, row in enumerate(ids) for i in row]
    expected = [0, *(at for at in range(1, len(line)) if line[at] != line[at - 1]), len(line)]
    borders, sizes = varlen.borders(packed.starts(ids, ids.shape[1]))
    assert borders.shape == (ids.numel() + 1,) and borders[: len(expected)].tolist() == expected
    assert (borders[len(expected) :] == len(line)).all()
    kept, longest = varlen.trimmed(borders, sizes)
    assert kept.tolist() == expected and longest == max(b - a for a, b in zip(expected, expected[1:]))


def test_a_list_of_fixed_size_gives_the_same_numbers(gpu_kernels, monkeypatch):
    q, k, v = attention_inputs(2, 200, 2, 24, 16, F64)
    ids = documents_of("random")
    known = run("flash", q, k, v, 0.3, ids)
    monkeypatch.setattr(fused, "_waiting_is_allowed", lambda x: False)  # under a compiler, or in a CUDA graph
    documents = fused.prepare("flash", ids, q)
    assert documents.plan[0].shape == (401,) and documents.plan[1] == 200
    assert torch.equal(fused.attention(q, k, v, 0.3, documents), known)


class Strict(TorchDispatchMode):
    """Refuses whatever makes the host wait for the device, and any tensor of `limit` elements."""

    WAITING = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "item")

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.removeprefix("aten::")
        assert not name.startswith(self.WAITING), name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype is not torch.bool for i in args[1]), "an index of booleans"
        out = op(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            assert not isinstance(t, torch.Tensor) or t.numel() < self.limit, f"{name}: {tuple(t.shape)}"
        return out


@pytest.mark.parametrize("backend", ["flex", "flash", "sdpa"])
def test_nothing_is_prepared_in_t_by_t_and_nobody_waits(backend, monkeypatch):
    monkeypatch.setattr(fused, "_waiting_is_allowed", lambda x: False)
    ids = documents_of("random", 1, 1000)
    with Strict(1000 * 1000):
        fused.prepare(backend, ids, ids)
        fused.prepare(backend, None, ids)
        with pytest.raises(AssertionError, match=r"eq: \(1, 1000, 1000\)"):
            torch.eq(ids[:, :, None], ids[:, None, :])
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            int(ids.sum())


def test_sdpa_forms_neither_mask_nor_scores_forward_or_backward():
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, 1000, 1, 24, 16, F32))
    with Strict(1000 * 1000):
        sdpa.attention(q, k, v, 0.2).sum().backward()


# ---------------------------------------------------------------------------------------------------------- whole model


@pytest.fixture
def answered_by(gpu_kernels, monkeypatch):
    """answered_by("flex"): attention on the CPU goes the way of a GPU."""
    return lambda name: monkeypatch.setattr(attend, "backend_for", lambda *_: name)


def counted(monkeypatch, module, name):
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.mark.parametrize("backend", ["flex", "flash"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_is_the_cpu_kernels_and_prepares_once_for_all_layers(
    agree, small, answered_by, monkeypatch, backend, checkpointing
):
    model = Transformer(small()).double()
    objective = Pretraining(model)
    tokens, ids = torch.randint(0, 37, (2, 41)), documents_of("random", 2, 41)

    def step():
        model.zero_grad()
        loss = objective(tokens, ids, None, 80.0, mtp_weight=0.3).loss
        loss.backward()
        return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step()
    answered_by(backend)
    model.activation_checkpointing = checkpointing
    prepared = counted(monkeypatch, packed, "starts")
    again, others = step()
    assert len(prepared) == 2  # three layers and MTP, which is a place shorter
    agree(again, loss)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        agree(others[name], gradient, what=name, scale=1e-3)


def test_documents_trace_in_one_graph_through_checkpointed_layers(agree, answered_by):
    torch._dynamo.reset()
    first, second = (MLA(24, 2, None, 12, 6, 4, 5).double() for _ in range(2))
    x, ids = torch.randn(2, 128, 24, dtype=F64, requires_grad=True), documents_of("random", 2, 128)

    def forward(x, ids):
        documents = ops.documents(ids, x, (10, 5))
        x = x + first(x, segment_ids=documents)
        return x + checkpoint(lambda x, d: second(x, segment_ids=d), x, documents, use_reentrant=False)

    right = forward(x, ids)
    expected = torch.autograd.grad(right.square().sum(), x)
    answered_by("flex")
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    o = compiled(x, ids)
    agree(o, right)
    agree(torch.autograd.grad(o.square().sum(), x)[0], expected[0])
    other = documents_of("random", 2, 128)
    agree(compiled(x, other), forward(x, other))


def test_sdpa_traces_in_one_graph(agree):
    q, k, v = (x.requires_grad_() for x in attention_inputs(2, 200, 2, 24, 16, F32))
    o = torch.compile(sdpa.attention, fullgraph=True, backend="aot_eager")(q, k, v, 0.3)
    agree(o, dense_attention(q, k, v, 0.3, None))
    for g, e in zip(
        torch.autograd.grad(o.sum(), (q, k)), torch.autograd.grad(dense_attention(q, k, v, 0.3, None).sum(), (q, k))
    ):
        agree(g, e, scale=0.1)


def test_documents_of_another_backend_and_bare_ids_are_prepared_where_they_are_used(agree, answered_by, monkeypatch):
    q, k, v = attention_inputs(2, 200, 2, 24, 16, F64)
    ids = documents_of("random")
    right = ops.attention(q, k, v, 0.3, ids)
    theirs = fused.prepare("flash", ids, q)
    answered_by("flex")
    asked = counted(monkeypatch, flex, "lists")
    agree(ops.attention(q, k, v, 0.3, theirs), right)
    agree(ops.attention(q, k, v, 0.3, ids), right)
    assert len(asked) == 2
    assert ops.documents(ids, q, (24, 16)).backend == "flex"
    assert ops.documents(None, q, (24, 16)).ids is None
    empty = ops.attention(q[:, :0].requires_grad_(), k[:, :0], v[:, :0], 0.3, ids[:, :0])
    assert empty.shape == (2, 0, 2, 16) and empty.requires_grad


def test_on_a_cpu_ids_stay_what_they_are(ops_path):
    ids = documents_of("random")
    assert ops.documents(ids, torch.zeros(2, 200, 24), (24, 16)) is ids
    assert ops.documents(None, torch.zeros(2, 200, 24), (24, 16)) is None


# --------------------------------------------------------------------------------------------------------------- choice


@pytest.fixture
def machine(monkeypatch):
    """machine(installed, broken, capability, cudnn) -> the trials that were made, as (name, packed)."""

    def build(installed=("triton",), broken=(), capability=(9, 0), cudnn=True):
        tried = []

        def trial(name, device, dtype, dqk, dv, packed):
            tried.append((name, packed))
            return "it is broken" if name in broken else ""

        monkeypatch.setattr(backends, "trial", trial)
        monkeypatch.setattr(backends, "_installed", lambda package: package in installed)
        monkeypatch.setattr(sdpa, "takes_cudnn", lambda *_: cudnn)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        return tried

    for name, value in (("_selected", "auto"), ("_compiled", False), ("_answers", {})):
        monkeypatch.setattr(backends, name, value)  # restored afterwards
    return build


BOTH = ("triton", "flash_attn")


@pytest.mark.parametrize(
    "setup, dtype, compiled, documents, rows",
    [
        (dict(), BF16, False, "flex", "sdpa"),
        (dict(installed=BOTH), BF16, False, "flash", "sdpa"),
        (dict(installed=BOTH), BF16, True, "flex", "sdpa"),
        (dict(installed=BOTH), F32, False, "flex", "sdpa"),
        (dict(installed=BOTH, capability=(7, 5)), torch.float16, False, "flex", "sdpa"),
        (dict(installed=()), BF16, False, "sdpa", "sdpa"),
        (dict(broken=("flex",)), BF16, False, "sdpa", "sdpa"),
        (dict(broken=("flex",)), F32, False, "blocks", "sdpa"),
        (dict(broken=("flex", "sdpa")), BF16, False, "blocks", "blocks"),
        (dict(), F64, False, "blocks", "blocks"),
    ],
)
@pytest.mark.filterwarnings("ignore:attention over")
def test_auto_takes_the_first_that_works(machine, setup, dtype, compiled, documents, rows):
    machine(**setup)
    line = ops.select_attention("auto", GPU, dtype, (48, 32), compiled)
    assert backends.backend_for(GPU, dtype, 48, 32, True) == documents and f"documents {documents}" in line
    assert backends.backend_for(GPU, dtype, 48, 32, False) == rows and f"whole rows {rows}" in line


def test_the_line_for_the_log_tells_the_reason(machine):
    machine()
    line = ops.select_attention("auto", GPU, BF16, (192, 128))
    assert line == "documents flex (flash: flash-attn is not installed); whole rows sdpa (cuDNN)"
    machine(installed=BOTH, cudnn=False)
    assert ops.select_attention("auto", GPU, BF16, (192, 128)) == "documents flash; whole rows sdpa"
    asked = ops.select_attention("flex", GPU, BF16, (192, 128))
    assert asked == "documents flex (train.attention); whole rows flex (train.attention)"
    compiled = ops.select_attention("auto", GPU, BF16, (192, 128), compiled=True)
    assert compiled.startswith("documents flex (flash: it does too much under train.compile)")


def test_each_answer_is_tried_and_told_once(machine):
    tried = machine(broken=("flex",))
    with pytest.warns(
        RuntimeWarning, match="documents by sdpa, as flash: .* not installed, flex: it is broken"
    ) as told:
        ops.select_attention("auto", GPU, BF16, (48, 32))
        for _ in range(2):
            assert backends.backend_for(GPU, BF16, 48, 32, True) == "sdpa"
    assert len(told) == 1 and tried == [("flex", True), ("sdpa", True), ("sdpa", False)]


@pytest.mark.parametrize(
    "name, setup, dtype, widths, words",
    [
        ("flash", dict(), BF16, (48, 32), "train.attention=flash: flash-attn is not installed; use auto"),
        ("flash", dict(installed=BOTH), F32, (48, 32), "torch.float32 .train.precision.; use auto"),
        ("flash", dict(installed=BOTH, capability=(7, 5)), BF16, (48, 32), "sm_80 or later"),
        ("flash", dict(installed=BOTH), BF16, (264, 128), "256 wide, and these are 264"),
        ("sdpa", dict(), F32, (48, 32), "train.attention=sdpa: documents need kernels that take bf16"),
        ("flex", dict(installed=()), BF16, (48, 32), "train.attention=flex: Triton is not installed"),
        ("flex", dict(broken=("flex",)), BF16, (48, 32), "train.attention=flex: it is broken; use auto"),
        ("flax", dict(), BF16, (48, 32), "train.attention='flax'.*did you mean 'flash'|did you mean 'flex'"),
    ],
)
def test_a_choice_that_cannot_work_is_refused_at_once(machine, name, setup, dtype, widths, words):
    machine(**setup)
    with pytest.raises(UserError, match=words):
        ops.select_attention(name, GPU, dtype, widths)


def test_an_engine_refuses_gpu_kernels_on_a_cpu_before_the_first_step(machine, small):
    objective, ranks = Pretraining(Transformer(small())), Ranks(0, 1, CPU)
    with pytest.raises(UserError, match="train.attention=flex is for GPUs, and this run is on cpu; use auto"):
        Engine(objective, OptimConfig(), TrainConfig(attention="flex"), ranks)
    assert "without a GPU" in Engine(objective, OptimConfig(), TrainConfig(), ranks).attention


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend, dtype", [("flex", F32), ("flash", BF16), ("sdpa", BF16)])
def test_a_trial_passes_what_is_right(gpu_kernels, backend, dtype, packed):
    with torch.inference_mode():
        assert backends.trial(backend, CPU, dtype, 24, 16, packed) == ""


def test_a_trial_names_what_is_wrong(gpu_kernels, monkeypatch):
    real = varlen._flash_attn
    monkeypatch.setattr(varlen, "_flash_attn", lambda q, k, v, *a: real(q, k.detach(), v, *a))
    assert "RuntimeError" in backends.trial("flash", CPU, BF16, 24, 16, True)
    monkeypatch.setattr(varlen, "_flash_attn", lambda q, k, v, *a: real(q, k * 1.2, v, *a))
    assert backends.trial("flash", CPU, BF16, 24, 16, True).startswith("o off by")
    monkeypatch.setattr(varlen, "_flash_attn", lambda q, k, v, *a: real(q, k, v, *a) * torch.nan)
    assert backends.trial("flash", CPU, BF16, 24, 16, True).startswith("o off by nan")

    def no_room(*_):
        raise RuntimeError("\nout of resource: shared memory\nand more")

    monkeypatch.setattr(varlen, "_flash_attn", no_room)
    assert backends.trial("flash", CPU, BF16, 24, 16, True) == "RuntimeError: out of resource: shared memory"


def test_sdpa_never_comes_to_the_math_kernel_and_flash_gets_one_width():
    assert sdpa._kernels(True, BF16, True)[0] == "CUDNN_ATTENTION"
    assert sdpa._kernels(True, BF16, False)[0] == "FLASH_ATTENTION"
    assert sdpa._kernels(True, F32, False) == ("EFFICIENT_ATTENTION",)
    names = {n for c in (True, False) for d in (BF16, F32) for n in sdpa._kernels(c, d, c and d is BF16)}
    assert names == {"CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"}


def test_kernels_are_handed_contiguous_heads_of_the_asked_size():
    x = torch.randn(2, 16, 3, 16)
    assert packed.fitted(x, 16, 16) is x
    view = torch.randn(2, 16, 3, 48)[..., 20:36]
    assert packed.fitted(view, 16, 16).is_contiguous() and torch.equal(packed.fitted(view, 16, 16), view)
    wider = packed.fitted(view, 128, 24)
    assert wider.is_contiguous() and wider.shape == (2, 128, 3, 24)
    assert torch.equal(wider[:, :16, :, :16], view) and not wider[:, 16:].any() and not wider[..., 16:].any()


def test_cudnn_is_asked_about_from_sm_90_on_and_in_half_precision(monkeypatch):
    monkeypatch.setattr(sdpa, "_cudnn", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index == 1 else (8, 9))
    assert not sdpa.takes_cudnn(1, F32, 192, 128) and not sdpa.takes_cudnn(0, BF16, 192, 128)
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: torch.zeros(*shape))
    monkeypatch.setattr("torch.backends.cuda.SDPAParams", lambda *a: a)
    monkeypatch.setattr("torch.backends.cuda.can_use_cudnn_attention", lambda p: asked.append(p) or True)
    assert sdpa.takes_cudnn(1, BF16, 192, 128) and sdpa.takes_cudnn(1, BF16, 192, 128)
    q, k, v, mask, _, causal, _ = asked.pop()
    assert q.shape[-1] == k.shape[-1] == 192 and v.shape[-1] == 128 and q.requires_grad and mask is None and causal
    assert not asked


def test_wide_heads_get_small_tiles_where_shared_memory_is_small(monkeypatch):
    monkeypatch.setattr(flex, "_capability", lambda index: (8, 6) if index else (9, 0))

    def options(index, dqk, dv):
        q, v = (
            SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=index), shape=(1, 1, 128, d)) for d in (dqk, dv)
        )
        return flex._options(q, v)

    assert options(0, 192, 128) == options(1, 128, 128) == {"IS_DIVISIBLE": True}
    tiles = options(1, 192, 128)
    assert all(128 % size == 0 for name, size in tiles.items() if "BLOCK" in name)
    assert tiles["bwd_BLOCK_N1"] % tiles["bwd_BLOCK_M1"] == tiles["bwd_BLOCK_M2"] % tiles["bwd_BLOCK_N2"] == 0
