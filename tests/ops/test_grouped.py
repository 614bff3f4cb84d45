"""Routed experts against loops in float64: values and every gradient, odd sizes, empty experts, masked choices."""

import pytest
import torch

from moe import ops
from moe.kernels import eager, reference
from tests.op_cases import CASES, expert_inputs, ids_of, with_gradients

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("n, n_experts, k, d, f", [(23, 7, 3, 8, 16), (11, 5, 2, 9, 7), (1, 6, 3, 8, 8)])
def test_experts_agree_with_the_loops_in_value_and_every_gradient(agree, case, dtype, n, n_experts, k, d, f):
    inputs = expert_inputs(ids_of(case, n, k, n_experts), n_experts, d, f, dtype)
    upstream = torch.randn(n, d, dtype=dtype)
    y, gradients = with_gradients(ops.experts, inputs, upstream, (0, 1, 2, 4))
    exact = [x if x.dtype == torch.int64 else x.double() for x in inputs]
    y_exact, gradients_exact = with_gradients(reference.experts, exact, upstream.double(), (0, 1, 2, 4))
    assert y.dtype == dtype
    agree(y, y_exact, what="y", scale=3.0 if n == 1 else 0.0)
    for name, g, e, x in zip(("x", "w13", "w2", "gates"), gradients, gradients_exact, (*inputs[:3], inputs[4])):
        assert g.dtype == x.dtype
        loose = 3e-2 if dtype is BF16 and name == "gates" else None  # a product of two roundings
        agree(g, e, loose, f"gradient of {name}", scale=3.0 if n == 1 else 0.0)


def test_fast_grouped_products_are_what_the_table_above_exercises():
    """16-byte rows take grouped_mm, odd ones the loop: both must have been compared."""
    assert eager._fits_grouped_mm(8, 16, F32) and eager._fits_grouped_mm(8, 16, BF16)
    assert not eager._fits_grouped_mm(9, 16, F32) and not eager._fits_grouped_mm(8, 16, F64)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_experts_without_tokens_get_a_zero_gradient_not_none(dtype):
    x, w13, w2, ids, gates = expert_inputs(torch.tensor([[1, 1], [3, 1]]), 5, 8, 8, dtype)
    w13.requires_grad_(), w2.requires_grad_()
    ops.experts(x, w13, w2, ids, gates).square().sum().backward()
    for weight in (w13, w2):
        norms = weight.grad.flatten(1).norm(dim=1)
        assert norms[[0, 2, 4]].eq(0).all() and norms[[1, 3]].gt(0).all()


def test_choices_outside_the_experts_add_nothing_and_get_no_gradient():
    ids = torch.tensor([[0, 3], [-1, 2], [3, 99]])  # 3 experts
    x, w13, w2, ids, gates = expert_inputs(ids, 3, 8, 8, F32)
    gates.requires_grad_(), x.requires_grad_()
    y = ops.experts(x, w13, w2, ids, gates)
    y.square().sum().backward()
    assert gates.grad[[0, 1, 2, 2], [1, 0, 0, 1]].eq(0).all() and gates.grad[[0, 1], [0, 1]].ne(0).all()
    assert y[2].eq(0).all() and x.grad[2].eq(0).all()
    alone = ops.experts(x[:1], w13, w2, ids[:1, :1], gates[:1, :1])
    torch.testing.assert_close(y[:1], alone, rtol=1e-6, atol=1e-6)


def test_experts_take_an_expanded_upstream_gradient(agree):
    x, w13, w2, ids, gates = expert_inputs(ids_of("spread", 6, 2, 4), 4, 8, 8, F64)
    x.requires_grad_()
    (plain,) = torch.autograd.grad(ops.experts(x, w13, w2, ids, gates).sum(), x)  # stride-0 ones
    (dense,) = torch.autograd.grad((ops.experts(x, w13, w2, ids, gates) * torch.ones(6, 8, dtype=F64)).sum(), x)
    agree(plain, dense)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_garbage_in_tokens_without_an_expert_reaches_nobody(agree, dtype):
    ids = torch.cat([ids_of("spread", 5, 2, 4), torch.full((2, 2), 4)])
    inputs = expert_inputs(ids, 4, 8, 8, dtype)
    inputs[0][5:] = float("nan")
    upstream = torch.randn(7, 8, dtype=dtype)
    upstream[5:] = 0
    y, (dx, *rest) = with_gradients(ops.experts, inputs, upstream, (0, 1, 2, 4))
    y_alone, (dx_alone, *rest_alone) = with_gradients(
        ops.experts, (inputs[0][:5], *inputs[1:3], ids[:5], inputs[4][:5]), upstream[:5], (0, 1, 2, 4)
    )
    agree(y[:5], y_alone), agree(dx[:5], dx_alone)
    assert y[5:].eq(0).all() and dx[5:].eq(0).all()
    for g, e in zip(rest, rest_alone):
        agree(g[:5] if g.shape != e.shape else g, e)


def test_fp32_gates_on_bf16_tokens_keep_their_own_gradient_dtype(agree):
    x, w13, w2, ids, gates = expert_inputs(ids_of("spread", 9, 2, 4), 4, 8, 8, BF16)
    gates = gates.float()
    y, (dg,) = with_gradients(ops.experts, (x, w13, w2, ids, gates), torch.ones(9, 8), (4,))
    _, (exact,) = with_gradients(
        reference.experts, (x.double(), w13.double(), w2.double(), ids, gates.double()), torch.ones(9, 8), (4,)
    )
    assert y.dtype == BF16 and dg.dtype == F32
    agree(dg, exact, 2e-2)


@pytest.mark.parametrize("case", ["spread", "outside", "duplicates"])
def test_experts_pass_gradcheck(case):
    x, w13, w2, ids, gates = (t.requires_grad_() if t.is_floating_point() else t
                              for t in expert_inputs(ids_of(case, 4, 2, 3), 3, 3, 2, F64))  # fmt: skip
    assert torch.autograd.gradcheck(lambda *a: ops.experts(a[0], a[1], a[2], ids, a[3]), (x, w13, w2, gates))


def test_experts_of_no_tokens_give_no_rows_and_zero_weight_gradients():
    x, w13, w2, ids, gates = expert_inputs(torch.zeros(0, 2, dtype=torch.int64), 3, 8, 8, F32)
    y, gradients = with_gradients(ops.experts, (x, w13, w2, ids, gates), torch.zeros(0, 8), (0, 1, 2, 4))
    assert y.shape == ops.experts(x, w13, w2, ids, gates).shape == (0, 8)
    assert all(g is not None and g.eq(0).all() for g in gradients)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("n, n_experts, k, d, f", [(23, 7, 3, 8, 16), (11, 5, 2, 9, 7), (1, 6, 3, 8, 8)])
def test_experts_of_few_tokens_without_gradients_agree_with_the_loops(agree, case, dtype, n, n_experts, k, d, f):
    x, w13, w2, ids, gates = expert_inputs(ids_of(case, n, k, n_experts), n_experts, d, f, dtype)
    live = ((ids >= 0) & (ids < n_experts)).any(1)
    x[~live] = float("nan")  # a token without an expert may hold anything
    exact = reference.experts(x.double().nan_to_num(), w13.double(), w2.double(), ids, gates.double())
    assert eager.experts_are_few(w13, w2, ids.numel())
    with torch.no_grad():
        y = ops.experts(x, w13.requires_grad_(), w2, ids, gates.float() if dtype is BF16 else gates)
    assert y.dtype == dtype and y[~live].eq(0).all()
    agree(y, exact, scale=3.0 if n == 1 else 0.0)


def test_few_and_many_experts_take_their_own_way_and_agree(agree, monkeypatch):
    inputs = expert_inputs(ids_of("spread", 9, 3, 7), 7, 8, 8, F32)
    few = ops.experts(*inputs)
    monkeypatch.setattr(eager, "experts_of_few", None)  # calling it would raise
    monkeypatch.setattr(eager, "GATHER", 9 * 3 * (3 * 8 * 8) * 4 - 1)
    agree(ops.experts(*inputs), few)
    monkeypatch.setattr(eager, "GATHER", 2**40)
    inputs[0].requires_grad_()
    agree(ops.experts(*inputs), few)  # with gradients never


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("case", [*CASES, "many"])
def test_expert_order_gives_each_choice_one_row_of_its_expert_in_token_order(fill, case):
    n, k, n_experts = (700, 2, 3) if case == "many" else (23, 3, 7)
    ids = torch.randint(0, n_experts, (n, k)) if case == "many" else ids_of(case, n, k, n_experts)
    k = ids.shape[1]
    order = eager.expert_order(ids, n_experts, fill)
    rows, bounds = order.choice.shape[0], [0, *order.ends.tolist()]
    assert rows > bounds[-1]  # the last row is nobody's
    for e in range(n_experts):
        owned = order.choice[bounds[e] : bounds[e + 1]].tolist()
        choices = [c for c, id in enumerate(ids.flatten().tolist()) if id == e]
        assert owned[: len(choices)] == choices and all(c == n * k for c in owned[len(choices) :])
        assert fill or len(owned) == len(choices)
        assert not fill or (len(owned) % eager.FILL == 0 and bool(owned) == bool(choices))
    assert order.choice[bounds[-1] :].eq(n * k).all()
    live = ((ids >= 0) & (ids < n_experts)).flatten()
    place = order.place.flatten()
    assert torch.equal(order.choice[place[live]], torch.arange(n * k)[live]) and place[~live].eq(rows - 1).all()
    assert eager.expert_order(torch.zeros_like(ids), n_experts, fill).choice.shape[0] == rows  # whatever the ids


# ------------------------------------------------------------------------------- rows that stand in expert order already


def row_inputs(counts, tail, d, f, dtype):
    """rows, w13, w2, ends, gates for the given rows of each expert; `tail` rows belong to nobody and hold NaN."""
    n, m = len(counts), sum(counts) + tail
    rows, gates = torch.randn(m, d), torch.rand(m) + 0.1
    rows[m - tail :], gates[m - tail :] = float("nan"), float("nan")
    w13, w2 = torch.randn(n, 2 * f, d) * d**-0.5, torch.randn(n, d, f) * f**-0.5
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    return rows.to(dtype), w13.to(dtype), w2.to(dtype), ends, gates.to(dtype)


ROWS = [([3, 0, 5, 1], 0), ([0, 0, 9], 4), ([7], 1), ([0, 0], 3), ([2, 3, 0, 0], 2)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("counts, tail", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_sorted_rows_agree_with_the_loops_and_nobodys_rows_are_zero(agree, dtype, counts, tail, recompute):
    inputs = row_inputs(counts, tail, 16, 8, dtype)
    upstream = torch.randn(inputs[0].shape)
    if tail:
        upstream[-tail:] = float("nan")  # what is made of them later must not come back either
    y, gradients = with_gradients(lambda *a: ops.grouped_swiglu(*a, recompute), inputs, upstream, (0, 1, 2, 4))
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    right = upstream.to(dtype).double()
    if tail:
        right[-tail:] = 0
    expected, expected_gradients = with_gradients(reference.grouped_swiglu, wide, right, (0, 1, 2, 4))
    agree(y, expected, what="y", scale=0.1)
    for name, a, e in zip(("rows", "w13", "w2", "gates"), gradients, expected_gradients):
        agree(a, e, what=name, scale=0.1)
    assert not tail or (not y[-tail:].any() and not gradients[0][-tail:].any() and not gradients[3][-tail:].any())


@pytest.mark.parametrize("recompute", [False, True])
def test_sorted_rows_are_what_experts_make_of_their_tokens(agree, recompute):
    """Sorting by hand, `grouped_swiglu` and adding up by hand is `experts`."""
    x, w13, w2, ids, gates = expert_inputs(ids_of("few", 13, 3, 6), 6, 8, 8, F64)
    upstream = torch.randn(13, 8)
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=6).cumsum(0).to(torch.int32)

    def by_hand(x, w13, w2, gates):
        y = ops.grouped_swiglu(x[order // 3], w13, w2, ends, gates.reshape(-1)[order], recompute)
        return torch.zeros(13, 8, dtype=F64).index_add(0, order // 3, y)

    y, gradients = with_gradients(by_hand, (x, w13, w2, gates), upstream, (0, 1, 2, 3))
    expected, expected_gradients = with_gradients(
        lambda x, w13, w2, g: ops.experts(x, w13, w2, ids, g, recompute), (x, w13, w2, gates), upstream, (0, 1, 2, 3)
    )
    agree(y, expected)
    for a, e in zip(gradients, expected_gradients):
        agree(a, e)


@pytest.mark.parametrize("op", ["experts", "grouped_swiglu"])
def test_repeating_the_first_product_changes_no_bit_and_keeps_less(op):
    if op == "experts":
        *inputs, gates = expert_inputs(ids_of("spread", 40, 2, 4), 4, 16, 8, F32)
    else:
        *inputs, gates = row_inputs([13, 0, 40, 27], 0, 16, 8, F32)
    run, upstream = getattr(ops, op), torch.randn(inputs[0].shape)
    found, kept = [], []
    for recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            found.append(with_gradients(lambda *a, r=recompute: run(*a, r), (*inputs, gates), upstream, (0, 1, 2, 4)))
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))
    assert kept[0] - kept[1] >= 80 * 2 * 8


def test_sorted_rows_pass_gradcheck():
    rows, w13, w2, ends, gates = row_inputs([2, 0, 3], 0, 3, 2, F64)
    inputs = [t.requires_grad_() for t in (rows, w13, w2, gates)]
    assert torch.autograd.gradcheck(lambda r, a, b, g: ops.grouped_swiglu(r, a, b, ends, g), inputs)


@pytest.mark.parametrize("op", ["experts", "grouped_swiglu"])
def test_frozen_weights_cost_no_product_and_change_no_other_gradient(monkeypatch, op):
    if op == "experts":
        inputs = expert_inputs(ids_of("spread", 13, 2, 4), 4, 16, 8, F64)
    else:
        inputs = row_inputs([3, 0, 5, 1], 0, 16, 8, F64)
    run, upstream = getattr(ops, op), torch.randn(inputs[0].shape)
    expected = with_gradients(run, inputs, upstream, (0, 1, 2, 4))[1]
    monkeypatch.setattr(eager, "rows_by_rows", lambda *_: pytest.fail("a gradient that nobody wants"))
    found = with_gradients(run, inputs, upstream, (0, 4))[1]
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[3])


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_ids_may_be_any_integers(kind):
    inputs = expert_inputs(ids_of("spread", 9, 2, 5), 5, 16, 8, F32)
    x, w13, w2, ids, gates = inputs
    upstream = torch.randn(9, 16)
    y, gradients = with_gradients(ops.experts, (x, w13, w2, ids.to(kind), gates), upstream, (0, 1, 2, 4))
    expected, right = with_gradients(ops.experts, inputs, upstream, (0, 1, 2, 4))
    assert torch.equal(y, expected) and all(torch.equal(a, b) for a, b in zip(gradients, right))


@pytest.mark.parametrize("layout", ["every other", "off by one", "transposed"])
def test_weights_of_any_layout(agree, layout):
    x, w13, w2, ids, gates = expert_inputs(ids_of("spread", 9, 2, 5), 5, 16, 8, F32)

    def laid(w):
        if layout == "transposed":
            return w.mT.contiguous().mT
        step = 2 if layout == "every other" else 1
        wide = torch.full((*w.shape[:2], step * w.shape[2] + 1), float("nan"))
        wide[..., 1 : 1 + step * w.shape[2] : step] = w
        return wide[..., 1 : 1 + step * w.shape[2] : step]

    upstream = torch.randn(9, 16)
    y, gradients = with_gradients(
        lambda x, g: ops.experts(x, laid(w13), laid(w2), ids, g), (x, gates), upstream, (0, 1)
    )
    expected, right = with_gradients(lambda x, g: ops.experts(x, w13, w2, ids, g), (x, gates), upstream, (0, 1))
    agree(y, expected)
    agree(gradients[0], right[0])
    agree(gradients[1], right[1])


def test_no_choice_at_all_is_zero_with_zero_gradients():
    x, w13, w2, _, _ = expert_inputs(ids_of("spread", 9, 2, 5), 5, 16, 8, F32)
    ids, gates = torch.empty(9, 0, dtype=torch.int64), torch.empty(9, 0)
    y, gradients = with_gradients(lambda *a: ops.experts(*a, ids, gates), (x, w13, w2), torch.ones(9, 16), (0, 1, 2))
    assert not y.any() and not any(g.any() for g in gradients)
