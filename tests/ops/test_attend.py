"""Causal attention against loops in float64, values and every gradient."""

import pytest
import torch

from moe import ops
from moe.kernels import attention as cpu_attention
from moe.kernels import reference
from moe.kernels.native import library
from tests.op_cases import attention_inputs, segments_of, with_gradients

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


native = pytest.mark.skipif(library.status() != "", reason=library.status())
PATHS = [("torch", F64), ("torch", F32), ("torch", BF16)]
PATHS += [pytest.param("native", dtype, marks=native) for dtype in (F32, BF16)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("path, dtype", PATHS, ids=str)
@pytest.mark.parametrize("batch, time, heads, dqk, dv", [(2, 9, 3, 5, 4), (1, 7, 1, 4, 6), (2, 1, 2, 3, 3)])
def test_attention_agrees_with_the_loops_in_value_and_every_gradient(
    agree, ops_path, packed, path, dtype, batch, time, heads, dqk, dv
):
    ops_path(path)
    q, k, v = attention_inputs(batch, time, heads, dqk, dv, dtype)
    segments = segments_of(batch, time) if packed else None
    upstream = torch.randn(batch, time, heads, dv).to(dtype)
    o, gradients = with_gradients(lambda *a: ops.attention(*a, 0.4, segments), (q, k, v), upstream, (0, 1, 2))
    o_exact, exact = with_gradients(
        lambda *a: reference.attention(*a, 0.4, segments), (q.double(), k.double(), v.double()), upstream, (0, 1, 2)
    )
    assert o.dtype == dtype
    agree(o, o_exact, what="o")
    for name, g, e in zip("qkv", gradients, exact):
        if e.abs().max() > 1e-12:  # one position: softmax of one score has no gradient
            natural = {F64: 0.0, F32: 0.1, BF16: 1.0}[dtype]  # short segments leave almost nothing of it
            half = 5e-2 if path == "torch" else 3e-2  # PyTorch's holds scores in bf16
            agree(g, e, half if dtype is BF16 else None, f"gradient of {name}", natural)
        else:
            assert g.abs().max() < 1e-5


def dense_attention(q, k, v, scale, segments):
    """Whole [T, T] scores: an independent way for lengths the loops are too slow for."""
    s = torch.einsum("bthd,bshd->bhts", q, k) * scale
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril().expand(q.shape[0], -1, -1)
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    return torch.einsum("bhts,bshd->bthd", s.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [127, 128, 129, 300])
def test_attention_longer_than_a_block_agrees_with_whole_scores(agree, packed, time):
    assert cpu_attention.BLOCK == 128
    q, k, v = attention_inputs(2, time, 2, 5, 3, F64)
    segments = segments_of(2, time) if packed else None
    upstream = torch.randn_like(v)
    o, gradients = with_gradients(lambda *a: ops.attention(*a, 0.3, segments), (q, k, v), upstream, (0, 1, 2))
    o_exact, exact = with_gradients(lambda *a: dense_attention(*a, 0.3, segments), (q, k, v), upstream, (0, 1, 2))
    agree(o, o_exact)
    for g, e in zip(gradients, exact):
        agree(g, e)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [1, 128, 300])
def test_attention_without_gradients_gives_the_same_numbers_and_keeps_no_probabilities(ops_path, packed, time):
    ops_path("torch")
    q, k, v = attention_inputs(2, time, 2, 5, 3, F32)
    segments = segments_of(2, time) if packed else None
    quiet = cpu_attention.attention_forward(q, k, v, 0.3, segments, with_grad=False)
    assert torch.equal(ops.attention(q, k, v, 0.3, segments), quiet[0]) and quiet[1].numel() == 0
    assert torch.equal(ops.attention(q.requires_grad_(), k, v, 0.3, segments), quiet[0])


def test_attention_scale_and_inputs_of_any_layout(agree):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in attention_inputs(2, 6, 3, 4, 5, F64))
    k = k[:, :, :1].expand(-1, -1, 3, -1)  # one rotary key for all heads
    agree(ops.attention(q, k, v, 0.7), reference.attention(q, k, v, 0.7))
    q.requires_grad_()
    (g,) = torch.autograd.grad(ops.attention(q, k, v, 0.7).sum(), q)
    (e,) = torch.autograd.grad(reference.attention(q, k, v, 0.7).sum(), q)
    agree(g, e)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_a_negative_scale_is_taken_by_whatever_answers(agree, dtype):
    q, k, v = attention_inputs(2, 6, 3, 4, 5, dtype)
    agree(ops.attention(q, k, v, -0.7), reference.attention(q.double(), k.double(), v.double(), -0.7))


def test_attention_passes_gradcheck():
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, 4, 2, 3, 2, F64))
    segments = torch.tensor([[0, 0, 1, 1]])
    assert torch.autograd.gradcheck(lambda *a: ops.attention(*a, 0.5, segments), (q, k, v))


@pytest.mark.parametrize("batch, time", [(2, 0), (0, 3)])
def test_attention_over_nothing_is_nothing(batch, time):
    q, k, v = (x.requires_grad_() for x in attention_inputs(batch, time, 2, 4, 3, F32))
    o = ops.attention(q, k, v, 0.5)
    o.sum().backward()
    assert o.shape == (batch, time, 2, 3) and q.grad.shape == q.shape
