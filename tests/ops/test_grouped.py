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
