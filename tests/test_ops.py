"""Every op against loops in float64: values and every gradient, odd sizes, empty experts, masked choices."""

import pytest
import torch
import torch.nn.functional as F

from moe import ops
from moe.config import UserError
from moe.kernels import eager, reference

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def with_gradients(function, inputs, upstream, argnums):
    """function(*inputs) and its gradients in the tensors at `argnums`, against `upstream`."""
    inputs = [x.detach().clone().requires_grad_() if i in argnums else x for i, x in enumerate(inputs)]
    y = function(*inputs)
    gradients = torch.autograd.grad(y, [inputs[i] for i in argnums], upstream.to(y.dtype), allow_unused=True)
    return y, gradients


# ------------------------------------------------------------------------------------------------------------- experts


def expert_inputs(ids, n_experts, d, f, dtype):
    """x, w13, w2, ids, gates for [N, K] ids. The reference gets the same rounded numbers in float64."""
    n, k = ids.shape
    x, w13, w2 = torch.randn(n, d), torch.randn(n_experts, 2 * f, d) * d**-0.5, torch.randn(n_experts, d, f) * f**-0.5
    return x.to(dtype), w13.to(dtype), w2.to(dtype), ids, torch.rand(n, k, dtype=dtype) + 0.1


def ids_of(name, n, k, n_experts):
    distinct = torch.rand(n, n_experts).topk(k, -1).indices
    match name:
        case "spread":
            return distinct
        case "few":  # experts 0 and the last get nothing
            return (1 + torch.rand(n, n_experts - 2).topk(min(k, n_experts - 2), -1).indices).contiguous()
        case "one hot expert":
            return torch.full((n, k), 2)
        case "one choice":
            return distinct[:, :1].contiguous()
        case "outside":
            ids = distinct.clone()
            ids[torch.rand(n, k) < 0.5] = n_experts
            ids[0], ids[-1, 0] = n_experts, -1
            ids[n // 2, 0] = n_experts + 12345
            return ids
        case "all outside":
            return torch.full((n, k), n_experts)
        case "duplicates":
            ids = distinct.clone()
            ids[:, 1] = ids[:, 0]
            return ids
    raise AssertionError(name)


CASES = ["spread", "few", "one hot expert", "one choice", "outside", "all outside", "duplicates"]


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


# ----------------------------------------------------------------------------------------------------------- attention


def attention_inputs(batch, time, heads, dqk, dv, dtype):
    return [torch.randn(batch, time, heads, d).to(dtype) for d in (dqk, dqk, dv)]


def segments_of(batch, time):
    return torch.sort(torch.randint(0, 3, (batch, time)), -1).values


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("batch, time, heads, dqk, dv", [(2, 9, 3, 5, 4), (1, 7, 1, 4, 6), (2, 1, 2, 3, 3)])
def test_attention_agrees_with_the_loops_in_value_and_every_gradient(agree, packed, dtype, batch, time, heads, dqk, dv):
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
            agree(g, e, 3e-2 if dtype is BF16 else None, f"gradient of {name}", natural)
        else:
            assert g.abs().max() < 1e-6


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
    assert eager.BLOCK == 128
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
def test_attention_without_gradients_gives_the_same_numbers_and_keeps_no_probabilities(packed, time):
    q, k, v = attention_inputs(2, time, 2, 5, 3, F32)
    segments = segments_of(2, time) if packed else None
    quiet = eager.attention_forward(q, k, v, 0.3, segments, with_grad=False)
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


# ---------------------------------------------------------------------------------------------------------------- norm


def norm_inputs(layout, dtype):
    match layout:
        case "vector":
            x = torch.randn(5)
        case "split":  # as the latent arrives in MLA: a part of wider rows
            x = torch.randn(2, 3, 11).split([7, 4], -1)[0]
        case "transposed":
            x = torch.randn(3, 2, 8).transpose(0, 1)
        case "columns":
            x = torch.randn(6, 4).t()
        case "nothing":
            x = torch.randn(0, 4)
        case _:
            x = torch.randn(2, 3, 64) * 50
    return x.to(dtype), (1 + 0.3 * torch.randn(x.shape[-1])).to(dtype)


NORMS = ["vector", "split", "transposed", "columns", "nothing", "large"]


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("layout", NORMS)
def test_norm_agrees_with_its_formula_in_value_and_every_gradient(agree, dtype, layout):
    x, weight = norm_inputs(layout, dtype)
    upstream = torch.randn(x.shape).to(dtype)
    exact, exact_gradients = with_gradients(
        lambda x, w: reference.rms_norm(x, w, 0.1), (x.double(), weight.double()), upstream, (0, 1)
    )
    x.requires_grad_(), weight.requires_grad_()  # the layout stays, unlike in a clone
    y = ops.rms_norm(x, weight, 0.1)
    gradients = torch.autograd.grad(y, (x, weight), upstream)
    assert y.dtype == dtype
    agree(y, exact, what="y")
    for name, g, e in zip(("x", "weight"), gradients, exact_gradients):
        assert g.dtype == dtype
        agree(g, e, what=f"gradient of {name}", scale=0.02 if layout == "large" else 1.0)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [3, 700])
def test_norm_without_gradients_is_the_same_for_few_rows_and_many(agree, dtype, rows):
    x, weight = (torch.randn(rows, 64) * 50).to(dtype), (1 + 0.3 * torch.randn(64)).to(dtype)
    assert (x.numel() > ops.SMALL) == (rows == 700)
    y = ops.rms_norm(x, weight, 0.1)
    assert y.dtype == dtype
    agree(y, reference.rms_norm(x.double(), weight.double(), 0.1))
    agree(y, ops.rms_norm(x.requires_grad_(), weight, 0.1), {F64: 1e-13, F32: 1e-6, BF16: 4e-3}[dtype])


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (4, 1)])
def test_a_weight_laid_out_for_few_rows_is_the_same_matrix_and_a_product_of_it(dtype, shape):
    weight = torch.randn(shape).to(dtype)
    laid = ops.for_few_rows(weight)
    assert torch.equal(laid, weight) and laid.shape == weight.shape and laid.dtype == dtype
    if dtype == F32:
        assert laid.t().is_contiguous()


@pytest.mark.parametrize("layout", NORMS)
def test_norm_is_well_formed_for_any_layout(layout):
    x, weight = norm_inputs(layout, F64)
    torch.library.opcheck(torch.ops.moe.rms_norm.default, (x.requires_grad_(), weight.requires_grad_(), 1e-6))
    if layout != "nothing":
        assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-6), (x, weight))
        torch.autograd.grad(ops.rms_norm(x, weight, 1e-6).sum(), (x, weight))  # an expanded upstream gradient


# ------------------------------------------------------------------------------------------------------ head with loss


def head_inputs(n, d, vocab, dtype, masked=0.3):
    targets = torch.randint(0, vocab, (n,))
    targets[torch.rand(n) < masked] = -1
    return torch.randn(n, d).to(dtype), torch.randn(vocab, d).to(dtype) * 0.5, targets


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("n, chunk", [(13, 4), (13, 13), (13, 1024), (1, 1), (12, 4)])
def test_head_loss_agrees_with_cross_entropy_in_value_and_every_gradient(agree, dtype, n, chunk):
    hidden, weight, targets = head_inputs(n, 6, 11, dtype)
    targets[0] = 3
    upstream = torch.tensor(0.37)
    loss, gradients = with_gradients(
        lambda h, w: ops.linear_cross_entropy(h, w, targets, chunk), (hidden, weight), upstream, (0, 1)
    )
    exact, exact_gradients = with_gradients(
        lambda h, w: F.cross_entropy(h @ w.t(), targets, ignore_index=-1, reduction="sum"),
        (hidden.double(), weight.double()), upstream, (0, 1),
    )  # fmt: skip
    assert loss.dtype == (F64 if dtype is F64 else F32)
    agree(loss, exact, 1e-2 if dtype is BF16 else None, scale=1.0)
    for g, e in zip(gradients, exact_gradients):
        assert g.dtype == dtype
        agree(g, e, scale=0.37)


def test_head_loss_matches_the_reference_loops(agree):
    hidden, weight, targets = head_inputs(7, 5, 9, F64)
    agree(ops.linear_cross_entropy(hidden, weight, targets), reference.linear_cross_entropy(hidden, weight, targets))


def test_any_negative_target_is_no_target(agree):
    hidden, weight, _ = head_inputs(4, 5, 9, F64)
    some = ops.linear_cross_entropy(hidden, weight, torch.tensor([2, -1, -100, 5]))
    agree(some, ops.linear_cross_entropy(hidden[[0, 3]], weight, torch.tensor([2, 5])))


def test_a_batch_without_targets_has_no_loss_and_zero_gradients():
    hidden, weight, _ = head_inputs(5, 4, 7, F32)
    none = torch.full((5,), -1)
    loss, gradients = with_gradients(
        lambda h, w: ops.linear_cross_entropy(h, w, none, 2), (hidden, weight), torch.tensor(1.0), (0, 1)
    )
    assert loss == 0 and all(g.eq(0).all() for g in gradients)


def test_head_loss_of_one_weight_used_twice_adds_its_gradients(agree):
    hidden, weight, targets = head_inputs(6, 4, 7, F64)
    other = torch.randint(0, 7, (6,))

    def twice(op):
        def total(h, w):
            embedded = w[other]  # the tied embedding
            return op(h + embedded, w, targets) + 0.3 * op(embedded, w, other)

        return with_gradients(total, (hidden, weight), torch.tensor(2.0), (0, 1))

    (loss, gradients), (exact, exact_gradients) = twice(ops.linear_cross_entropy), twice(reference.linear_cross_entropy)
    agree(loss, exact)
    for g, e in zip(gradients, exact_gradients):
        agree(g, e)


def test_head_loss_passes_gradcheck_and_needs_no_gradient_to_be_computed(agree):
    hidden, weight, targets = head_inputs(5, 3, 4, F64)
    with torch.no_grad():
        quiet = ops.linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    agree(quiet, ops.linear_cross_entropy(hidden, weight, targets))
    assert torch.autograd.gradcheck(
        lambda h, w: ops.linear_cross_entropy(h, w, targets, 2), (hidden, weight.requires_grad_())
    )


def test_head_loss_survives_large_logits(agree):
    hidden, weight, targets = head_inputs(6, 4, 7, F32)
    hidden = hidden * 300
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets, ignore_index=-1, reduction="sum")
    agree(ops.linear_cross_entropy(hidden, weight, targets), exact)


# ------------------------------------------------------------------------------------------------------------ the door


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_every_op_is_well_formed_for_autograd_and_compilers(dtype):
    expert = [t.requires_grad_() if t.is_floating_point() else t
              for t in expert_inputs(ids_of("outside", 6, 2, 4), 4, 8, 8, dtype)]  # fmt: skip
    torch.library.opcheck(torch.ops.moe.experts.default, expert)
    plain = [t.detach() for t in expert]
    torch.library.opcheck(
        torch.ops.moe.experts_backward.default,
        (torch.randn(6, 8, dtype=dtype), *plain, torch.ops.moe.experts.default(*plain)[1]),
    )
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
        torch.library.opcheck(torch.ops.moe.experts.default, (transposed, *inputs[1:]))
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
    assert ops.selected() == "torch"
    monkeypatch.setattr(ops, "_selected", "auto")  # restored afterwards
    ops.select("reference")
    assert ops.selected() == "reference"
    ops_path("torch")
    assert ops.selected() == "torch"
    ops_path("refrence")
    with pytest.raises(UserError, match="MOE_OPS='refrence'.*did you mean 'reference'"):
        ops.selected()
    with pytest.raises(UserError, match="train.ops='torhc'.*did you mean 'torch'"):
        ops.select("torhc")
