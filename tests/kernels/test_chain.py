"""The chain of kernels against loops in float64, in Triton's interpreter: values, gradients, bits, and what it asks for."""

import pytest
import torch

from moe.kernels import chain, launch, reference
from tests.asynchronous import Asynchronous
from tests.op_cases import CASES, expert_inputs, ids_of, with_gradients

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 2e-6, F16: 2e-3, BF16: 1.5e-2}


def experts(x, w13, w2, ids, gates, keep_z=True):
    """The chain as a function with gradients, without the ops around it."""

    class Chain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w13, w2, gates):
            y, *kept = chain.experts_forward(x, w13, w2, ids, gates, keep_z)
            ctx.save_for_backward(x, w13, w2, gates, *kept)
            return y

        @staticmethod
        def backward(ctx, dy):
            return chain.experts_backward(dy, *ctx.saved_tensors)

    return Chain.apply(x, w13, w2, gates)


def check(agree, inputs, upstream, keep_z=True):
    inputs = [*inputs[:4], inputs[4].float()]
    dtype = inputs[0].dtype
    y, gradients = with_gradients(lambda *a: experts(*a, keep_z), inputs, upstream, (0, 1, 2, 4))
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    expected, right = with_gradients(reference.experts, wide, upstream.to(dtype), (0, 1, 2, 4))
    assert y.dtype == dtype
    agree(y, expected, TOLERANCE[dtype], what="y", scale=0.1)
    for name, a, e in zip(("x", "w13", "w2", "gates"), gradients, right):
        agree(a, e, TOLERANCE[dtype], what=f"d{name}", scale=0.1)


@pytest.mark.parametrize("case", CASES)
def test_the_chain_agrees_with_the_loops(agree, case):
    n, n_experts, k = 13, 6, 3
    inputs = expert_inputs(ids_of(case, n, k, n_experts), n_experts, 24, 20, F32)
    check(agree, inputs, torch.randn(n, 24))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("n, n_experts, k, d, f", [(33, 5, 2, 72, 40), (1, 3, 1, 8, 8), (40, 16, 4, 17, 9)])
def test_short_types_and_odd_sizes_agree_with_the_loops_on_the_rounded_numbers(agree, dtype, n, n_experts, k, d, f):
    inputs = expert_inputs(ids_of("outside", n, k, n_experts), n_experts, d, f, dtype)
    check(agree, inputs, torch.randn(n, d))


def test_the_first_product_made_again_gives_the_same(agree):
    inputs = expert_inputs(ids_of("few", 21, 2, 6), 6, 24, 16, F32)
    check(agree, inputs, torch.randn(21, 24), keep_z=False)


def test_many_experts_with_few_rows_each(agree):
    """The shape that the project exists for: 256 experts, top-8."""
    inputs = expert_inputs(ids_of("spread", 24, 8, 256), 256, 32, 16, F32)
    check(agree, inputs, torch.randn(24, 32))


def test_no_tokens_give_no_rows_and_zero_weight_gradients():
    inputs = expert_inputs(torch.zeros(0, 2, dtype=torch.int64), 3, 16, 8, F32)
    y, gradients = with_gradients(experts, inputs, torch.zeros(0, 16), (0, 1, 2, 4))
    assert y.shape == (0, 16) and not gradients[1].any() and not gradients[2].any()


def test_tokens_of_any_layout_and_an_expanded_upstream_gradient(agree):
    x, *rest = expert_inputs(ids_of("spread", 11, 2, 4), 4, 24, 8, F32)
    wide = torch.full((11, 50), float("nan"))
    wide[:, 1:49:2] = x
    check(agree, (wide[:, 1:49:2], *rest), torch.ones(1, 1).expand(11, 24))


def test_garbage_of_nobody_reaches_nobody(agree):
    """A token without an expert may hold NaN; so may the gate of a choice that is none."""
    x, w13, w2, ids, gates = expert_inputs(ids_of("spread", 9, 2, 4), 4, 16, 8, F32)
    ids[4], gates[4], x[4] = 4, float("nan"), float("nan")
    ids[6, 1], gates[6, 1] = -1, float("nan")
    y, *kept = chain.experts_forward(x, w13, w2, ids, gates)
    found = chain.experts_backward(torch.randn(9, 16), x, w13, w2, gates, *kept)
    assert y.isfinite().all() and not y[4].any()
    assert all(g.isfinite().all() for g in found) and not found[0][4].any() and not found[3][4].any()


def test_the_same_bits_whatever_the_size_of_the_grid(monkeypatch):
    inputs = expert_inputs(ids_of("one hot expert", 40, 2, 6), 6, 40, 24, F32)
    inputs[3][:9] = ids_of("spread", 9, 2, 6)
    upstream, found = torch.randn(40, 40), []
    for sms in (1, 3, 64):
        monkeypatch.setitem(launch.SMS, 90, sms)
        y, *kept = chain.experts_forward(*inputs)
        x, w13, w2, _, gates = inputs
        found.append([y, *chain.experts_backward(upstream, x, w13, w2, gates, *kept)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


ROWS = [([3, 0, 5, 1], 0), ([0, 0, 9], 4), ([0, 0], 3)]


@pytest.mark.parametrize("keep_z", [True, False])
@pytest.mark.parametrize("counts, tail", ROWS, ids=str)
def test_sorted_rows_agree_with_the_loops_and_nobodys_rows_are_zero(agree, counts, tail, keep_z):
    m, n, d, f = sum(counts) + tail, len(counts), 24, 16
    rows, w13, w2, gates, dy = (torch.randn(s) for s in ((m, d), (n, 2 * f, d), (n, d, f), (m,), (m, d)))
    for t in (rows, gates, dy):
        t[m - tail :] = float("nan")
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    y, z = chain.rows_forward(rows, w13, w2, ends, gates, keep_z)
    found = [y, *chain.rows_backward(dy, rows, w13, w2, ends, gates, z)]
    wide = [t.double() if t.is_floating_point() else t for t in (rows, w13, w2, ends, gates)]
    upstream = dy.double()
    upstream[m - tail :] = 0
    right, gradients = with_gradients(reference.grouped_swiglu, wide, upstream, (0, 1, 2, 4))
    for name, a, e in zip(("y", "rows", "w13", "w2", "gates"), found, [right, *gradients]):
        agree(a, e, TOLERANCE[F32], what=name, scale=0.1)


def test_nothing_waits_for_the_device():
    """With the kernels themselves left out, which in the interpreter read everything: all that is left is torch's."""
    x, w13, w2, ids, gates = (t.to("meta") for t in expert_inputs(ids_of("spread", 64, 4, 16), 16, 64, 32, BF16))
    with launch.recording(90) as launches, Asynchronous():
        y, *kept = chain.experts_forward(x, w13, w2, ids, gates)
        chain.experts_backward(y, x, w13, w2, gates, *kept)
        ends = torch.empty(16, dtype=torch.int32, device="meta")
        y, z = chain.rows_forward(x, w13, w2, ends, gates[:, 0])
        chain.rows_backward(y, x, w13, w2, ends, gates[:, 0], z)
    assert len(launches) >= 20


def test_launches_do_not_depend_on_who_chose_whom():
    """Grids and arguments, sizes included, are the same for every routing: a captured graph may be replayed."""
    seen = []
    for _ in range(2):
        x, w13, w2, ids, gates = (t.to("meta") for t in expert_inputs(ids_of("few", 64, 4, 16), 16, 64, 32, BF16))
        with launch.recording(90) as launches:
            y, *kept = chain.experts_forward(x, w13, w2, ids, gates)
            chain.experts_backward(y, x, w13, w2, gates, *kept)
        seen.append([(n.grid, [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in n.args]) for n in launches])
    assert seen[0] == seen[1]
