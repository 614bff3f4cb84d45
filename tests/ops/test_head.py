"""Head and loss in one against cross-entropy, values and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from moe import ops
from moe.kernels import reference
from moe.kernels.native import library
from tests.op_cases import head_inputs, with_gradients

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
needs_native = pytest.mark.skipif(library.status() != "", reason=library.status())


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


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("n, chunk", [(13, 4), (1, 512), (0, 512)])
def test_the_native_head_is_well_formed_and_agrees_with_pytorchs(agree, ops_path, dtype, n, chunk):
    hidden, weight, targets = head_inputs(n, 6, 37, dtype)
    found = []
    for path in ("torch", "native"):
        ops_path(path)
        loss, gradients = with_gradients(
            lambda h, w: ops.linear_cross_entropy(h, w, targets, chunk), (hidden, weight), torch.tensor(0.37), (0, 1)
        )
        found.append((loss, *gradients))
        with torch.no_grad():
            assert torch.equal(ops.linear_cross_entropy(hidden.requires_grad_(), weight, targets, chunk), loss)
    for a, e in zip(*found):
        assert a.dtype == e.dtype
        agree(a, e, 1e-2 if dtype is BF16 and a.ndim == 0 else None, scale=0.37)
    for with_grad in (True, False):
        torch.library.opcheck(
            torch.ops.moe.linear_cross_entropy_native.default,
            (hidden.detach(), weight, targets, chunk, with_grad),
        )
