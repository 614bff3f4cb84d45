"""Linear and experts over E4M3 operands against the three products written out in float64, quantiser by quantiser."""

import random

import pytest
import torch

from moe import ops
from moe.ops.fp8 import Scales
from tests import fp8_reference as by_hand
from tests.op_cases import CASES, expert_inputs, ids_of, with_gradients

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SCALES = [Scales(), Scales(inputs=True), Scales(inputs=True, others=True)]


# --------------------------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("scales", SCALES, ids=["float", "inputs", "all"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("n, d, o", [(150, 130, 7), (9, 5, 150), (1, 128, 3), (0, 4, 3)])
def test_linear_is_the_three_products_of_quantised_operands(agree, n, d, o, dtype, scales):
    x, w, dy = (torch.randn(shape) * 10.0 ** torch.randint(-1, 2, shape) for shape in ((n, d), (o, d), (n, o)))
    x, w, dy = x.to(dtype), w.to(dtype), dy.to(dtype)
    y, gradients = with_gradients(lambda x, w: ops.fp8_linear(x, w, scales), (x, w), dy, (0, 1))
    for what, a, e in zip(("y", "dx", "dw"), (y, *gradients), by_hand.linear(x, w, dy, *scales)):
        assert a.dtype == dtype
        agree(a, e, what=what)


def test_linear_keeps_leading_dimensions_and_takes_its_tiles_over_all_tokens(agree):
    x, w, dy = torch.randn(3, 50, 20, dtype=F64), torch.randn(9, 20, dtype=F64), torch.randn(3, 50, 9, dtype=F64)
    y, (dx, dw) = with_gradients(ops.fp8_linear, (x, w), dy, (0, 1))
    exact = by_hand.linear(x.flatten(0, 1), w, dy.flatten(0, 1))
    agree(y.flatten(0, 1), exact[0]), agree(dx.flatten(0, 1), exact[1]), agree(dw, exact[2])
    agree(ops.fp8_linear(x[0, 0], w), y[0, 0])  # one token alone: rows do not look at each other


def test_what_quantisation_costs_is_of_the_size_of_e4m3():
    """Not nothing, so that it took place; not more than independent roundings of 2^-4 at most can do."""
    x, w, dy = torch.randn(512, 256), torch.randn(256, 256), torch.randn(512, 256)
    y, gradients = with_gradients(ops.fp8_linear, (x, w), dy, (0, 1))
    plain, others = with_gradients(torch.nn.functional.linear, (x, w), dy, (0, 1))
    for a, e in zip((y, *gradients), (plain, *others)):
        error = ((a - e).norm() / e.norm()).item()
        assert 0.02 < error < 0.06, error


def test_an_expanded_upstream_gradient_is_taken(agree):
    x, w = torch.randn(6, 20, dtype=F64, requires_grad=True), torch.randn(9, 20, dtype=F64)
    (plain,) = torch.autograd.grad(ops.fp8_linear(x, w).sum(), x)
    (dense,) = torch.autograd.grad((ops.fp8_linear(x, w) * torch.ones(6, 9, dtype=F64)).sum(), x)
    agree(plain, dense)


# -------------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_experts_are_the_products_of_quantised_operands(agree, case, dtype):
    scales = random.choice(SCALES)
    compare_experts(agree, ids_of(case, 30, 3, 7), 7, 8, 16, dtype, scales)
    if dtype is F64:  # few numbers: there one that falls otherwise weighs too much
        compare_experts(agree, ids_of(case, 11, 2, 5), 5, 9, 7, dtype, scales)
        compare_experts(agree, ids_of(case, 1, 3, 6), 6, 8, 8, dtype, scales)


@pytest.mark.parametrize("scales", SCALES, ids=["float", "inputs", "all"])
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_tiles_along_tokens_start_anew_with_each_expert(agree, dtype, scales):
    """Experts of 0, 140, 5 and 260 tokens, scattered over the batch, and widths that end in short tiles."""
    ids = torch.tensor([1] * 140 + [2] * 5 + [3] * 260 + [9] * 20)[torch.randperm(425)].unsqueeze(1)
    compare_experts(agree, ids, 4, 136, 8, dtype, scales)
    if dtype is F64:
        compare_experts(agree, ids[:100], 4, 5, 72, dtype, scales)


def compare_experts(agree, ids, n_experts, d, f, dtype, scales):
    inputs = expert_inputs(ids, n_experts, d, f, dtype)
    dy = (torch.randn(len(ids), d) * 10.0 ** torch.randint(-3, 1, (len(ids), 1))).to(dtype)
    op = lambda *a: ops.fp8_experts(*a, scales)  # noqa: E731
    y, gradients = with_gradients(op, inputs, dy, (0, 1, 2, 4))
    wide = [t if t.dtype == torch.int64 else t.double() for t in inputs]
    expected = by_hand.experts(*wide, dy.double(), *scales)
    names = ("y", "x", "w13", "w2", "gates")
    for what, a, e, like in zip(names, (y, *gradients), expected, (*inputs[:1], *inputs[:3], inputs[4])):
        assert a.dtype == like.dtype
        if dtype is F64:
            agree(a, e, what=what, scale=1.0 if len(ids) == 1 else 0.0)
        else:  # a number on the edge between two of E4M3 may fall otherwise
            error = (a.double() - e).norm() / e.norm().clamp_min(1e-6)
            assert error < (1e-2 if dtype is F32 else 0.08), f"{what} {error:.3g}"
    again = with_gradients(lambda *a: ops.fp8_experts(*a, scales, recompute_z=True), inputs, dy, (0, 1, 2, 4))
    assert all(torch.equal(a, b) for a, b in zip((y, *gradients), (again[0], *again[1])))


def test_rows_that_fill_an_expert_up_weigh_on_no_scale():
    """bf16 on a CPU pads experts with copies of the first row; where that one is huge, no other token may notice."""
    ids = torch.tensor([[0], [1], [1], [1]])
    inputs = list(expert_inputs(ids, 3, 8, 8, BF16))
    dy = torch.randn(4, 8).bfloat16()
    _, (_, dw13, dw2, _) = with_gradients(ops.fp8_experts, inputs, dy, (0, 1, 2, 4))
    inputs[0] = inputs[0].clone()
    inputs[0][0] *= 1e4
    _, (_, huge13, huge2, _) = with_gradients(ops.fp8_experts, inputs, dy, (0, 1, 2, 4))
    assert torch.equal(dw13[1:], huge13[1:]) and torch.equal(dw2[1:], huge2[1:]) and not torch.equal(dw13[0], huge13[0])


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_garbage_in_tokens_without_an_expert_reaches_nobody(agree, dtype):
    ids = torch.cat([ids_of("spread", 5, 2, 4), torch.full((2, 2), 4)])
    inputs = expert_inputs(ids, 4, 8, 8, dtype)
    inputs[0][5:] = float("nan")
    dy = torch.randn(7, 8, dtype=dtype)
    dy[5:] = 0
    y, (dx, *rest) = with_gradients(ops.fp8_experts, inputs, dy, (0, 1, 2, 4))
    alone = (inputs[0][:5], *inputs[1:3], ids[:5], inputs[4][:5])
    y_alone, (dx_alone, *rest_alone) = with_gradients(ops.fp8_experts, alone, dy[:5], (0, 1, 2, 4))
    agree(y[:5], y_alone), agree(dx[:5], dx_alone)
    assert y[5:].eq(0).all() and dx[5:].eq(0).all()
    for g, e in zip(rest, rest_alone):
        agree(g[:5] if g.shape != e.shape else g, e)


def test_experts_without_tokens_get_a_zero_gradient_not_none():
    inputs = expert_inputs(torch.tensor([[1, 1], [3, 1]]), 5, 8, 8, F32)
    _, (_, *weights, _) = with_gradients(ops.fp8_experts, inputs, torch.randn(2, 8), (0, 1, 2, 4))
    for gradient in weights:
        norms = gradient.flatten(1).norm(dim=1)
        assert norms[[0, 2, 4]].eq(0).all() and norms[[1, 3]].gt(0).all()
    inputs = expert_inputs(torch.zeros(0, 2, dtype=torch.int64), 3, 8, 8, F32)
    y, gradients = with_gradients(ops.fp8_experts, inputs, torch.zeros(0, 8), (0, 1, 2, 4))
    assert y.shape == (0, 8) and all(g.eq(0).all() for g in gradients)


def test_fp32_gates_on_bf16_tokens_keep_their_own_gradient_dtype():
    x, w13, w2, ids, gates = expert_inputs(ids_of("spread", 9, 2, 4), 4, 8, 8, BF16)
    y, (dg,) = with_gradients(ops.fp8_experts, (x, w13, w2, ids, gates.float()), torch.ones(9, 8), (4,))
    assert y.dtype == BF16 and dg.dtype == F32


# ------------------------------------------------------------------------------------------------------------- promises


def test_the_ops_are_well_formed_for_autograd_and_compilers():
    dtype = random.choice([F64, F32, BF16])
    x, w, dy = (torch.randn(shape, dtype=dtype) for shape in ((6, 8), (5, 8), (6, 5)))
    op = torch.ops.moe
    torch.library.opcheck(op.fp8_linear.default, (x.clone().requires_grad_(), w.clone().requires_grad_(), True, False))
    torch.library.opcheck(op.fp8_linear_backward.default, (dy, x, w, False, True))
    plain = expert_inputs(ids_of("outside", 6, 2, 4), 4, 8, 8, dtype)
    graded = [t.clone().requires_grad_() if t.is_floating_point() else t for t in plain]
    transposed = torch.randn(8, 6, dtype=dtype).t().requires_grad_()  # results are laid out plainly all the same
    for recompute_z in (False, True):
        torch.library.opcheck(op.fp8_experts.default, (transposed, *graded[1:], False, True, recompute_z))
    z = op.fp8_experts.default(*plain, False, True, False)[1]
    torch.library.opcheck(op.fp8_experts_backward.default, (torch.randn_like(plain[0]), *plain, z, False, True))
    torch.library.opcheck(op.fp8_linear.default, (transposed, torch.randn(8, 5, dtype=dtype).t(), False, False))


@pytest.mark.parametrize("path", ["reference", "torch"])
def test_no_choice_of_a_path_changes_the_numbers(ops_path, path):
    inputs = expert_inputs(ids_of("spread", 9, 2, 4), 4, 8, 8, F32)
    before = ops.fp8_experts(*inputs)
    ops_path(path)
    assert torch.equal(ops.fp8_experts(*inputs), before)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda z: ops.fp8_linear(z(3, 5), z(2, 4)), ["(3, 5)", "(2, 4)"]),
        (
            lambda z: ops.fp8_experts(z(3, 5), z(2, 8, 4), z(2, 4, 4), z(3, 1).long(), z(3, 1)),
            ["fp8_experts", "(3, 5)"],
        ),
        (lambda z: ops.fp8_experts(z(3, 4), z(2, 8, 4), z(2, 4, 4), z(3, 2).long(), z(3, 1)), ["(3, 2)", "(3, 1)"]),
        (lambda z: ops.fp8_experts(z(3, 4), z(2, 8, 4), z(2, 4, 4), z(2, 1).long(), z(2, 1)), ["(2, 1)", "N=3"]),
    ],
)
def test_wrong_shapes_are_refused_by_name(call, words):
    with pytest.raises(ValueError) as error:
        call(torch.zeros)
    assert all(word in str(error.value) for word in words), error.value
