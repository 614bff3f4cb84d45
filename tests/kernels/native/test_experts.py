"""Native experts against loops in float64: values and every gradient, by every level of this processor."""

import pytest
import torch

from moe.kernels import reference
from moe.kernels.native import library
from tests.op_cases import CASES, expert_inputs, ids_of, with_gradients

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())
experts = pytest.importorskip("moe.kernels.native.experts")

F32, BF16 = torch.float32, torch.bfloat16
SIZES = [(23, 7, 3, 8, 16), (11, 5, 2, 9, 7), (1, 6, 3, 33, 5), (70, 4, 2, 40, 17), (3, 3, 2, 1, 1)]
LEVELS = library.levels() if not library.status() else []


@pytest.fixture(params=LEVELS)
def level(request):
    library.use_level(request.param)
    yield request.param
    library.use_level("")


def everything(inputs, upstream, keep_z=True, weights=True):
    y, z = experts.experts_forward(*inputs, keep_z)
    return y, *experts.experts_backward(upstream, *inputs, z, weights)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_values_and_gradients_agree_with_the_loops(agree, level, case, dtype):
    for n, n_experts, k, d, f in SIZES:
        if case == "few" and n_experts < 4:
            continue
        inputs = expert_inputs(ids_of(case, n, k, n_experts), n_experts, d, f, dtype)
        inputs = (*inputs[:4], inputs[4].float())
        upstream = torch.randn(n, d).to(dtype)
        exact = [x if x.dtype == torch.int64 else x.double() for x in inputs]
        y, gradients = with_gradients(reference.experts, exact, upstream.double(), (0, 1, 2, 4))
        for keep_z in (True, False):
            found = everything(inputs, upstream, keep_z)
            for name, a, e in zip(("y", "x", "w13", "w2", "gates"), found, (y, *gradients)):
                loose = 3e-2 if dtype is BF16 and name == "gates" else 2e-2 if dtype is BF16 else 1e-5
                agree(a, e, loose, f"{name} of {n, n_experts, k, d, f}", scale=3.0 if n < 4 else 0.0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(level, dtype):
    for case in ("spread", "duplicates", "one hot expert", "outside"):
        inputs = expert_inputs(ids_of(case, 301, 3, 6), 6, 24, 20, dtype)
        upstream = torch.randn(301, 24).to(dtype)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                found.append(everything(inputs, upstream))
            finally:
                torch.set_num_threads(1)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_many_rows_of_one_expert_go_through_several_blocks(agree, level):
    """More rows than a block holds, and more of one expert than a group of the backward pass."""
    ids = torch.full((5000, 1), 1)
    ids[:300] = 0
    inputs = expert_inputs(ids, 3, 8, 4, F32)
    upstream = torch.randn(5000, 8)
    found = everything(inputs, upstream)
    x, w13, w2, _, gates = (t.double() if t.is_floating_point() else t for t in inputs)
    leaves = [t.requires_grad_() for t in (x, w13, w2, gates)]
    z = torch.einsum("nd,nfd->nf", x, w13[ids[:, 0]])
    y = torch.einsum("nf,ndf->nd", torch.nn.functional.silu(z[:, :4]) * z[:, 4:] * gates, w2[ids[:, 0]])
    for a, e in zip(found, (y, *torch.autograd.grad(y, leaves, upstream.double()))):
        agree(a, e)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sorted_rows_agree_with_the_loops_and_nobody_reads_the_tail(agree, level, dtype):
    ends = torch.tensor([3, 3, 9, 12], dtype=torch.int32)
    rows, w13, w2, _, _ = expert_inputs(torch.zeros(14, 1, dtype=torch.int64), 4, 10, 6, dtype)
    gates, upstream = torch.rand(14), torch.randn(14, 10).to(dtype)
    clean = rows.clone()
    rows[12:], upstream[12:] = float("nan"), float("nan")
    y, z = experts.rows_forward(rows, w13, w2, ends, gates)
    found = y, *experts.rows_backward(upstream, rows, w13, w2, ends, gates, z)
    exact = clean.double(), w13.double(), w2.double(), ends, gates.double()
    y, gradients = with_gradients(reference.grouped_swiglu, exact, upstream.double().nan_to_num(), (0, 1, 2, 4))
    for name, a, e in zip(("y", "rows", "w13", "w2", "gates"), found, (y, *gradients)):
        agree(a, e, 3e-2 if dtype is BF16 else None, name)


def test_frozen_experts_get_no_gradient_and_the_others_the_same_one(level):
    inputs = expert_inputs(ids_of("spread", 40, 2, 5), 5, 16, 12, F32)
    upstream = torch.randn(40, 16)
    whole, frozen = everything(inputs, upstream), everything(inputs, upstream, weights=False)
    assert frozen[2].numel() == frozen[3].numel() == 0
    assert torch.equal(frozen[1], whole[1]) and torch.equal(frozen[4], whole[4])


def test_strided_views_are_read_as_what_they_show(agree):
    x, w13, w2, ids, gates = expert_inputs(ids_of("spread", 9, 2, 4), 4, 8, 6, F32)
    y, _ = experts.experts_forward(x, w13, w2, ids, gates)
    wide = torch.randn(9, 20)
    wide[:, 3:11] = x
    found, _ = experts.experts_forward(
        wide[:, 3:11], w13.mT.contiguous().mT, w2, ids.t().contiguous().t(), gates.t().contiguous().t()
    )
    assert torch.equal(found, y)


@pytest.mark.parametrize("n", [0, 2])
def test_no_tokens_or_nobody_chosen_give_zeros(n):
    x, w13, w2, ids, gates = expert_inputs(torch.full((n, 2), 3), 3, 8, 8, F32)
    y, dx, dw13, dw2, dgates = everything((x, w13, w2, ids, gates), torch.randn(n, 8))
    assert y.shape == dx.shape == (n, 8) and dw13.shape == w13.shape and dw2.shape == w2.shape
    assert all(t.eq(0).all() for t in (y, dx, dw13, dw2, dgates))
