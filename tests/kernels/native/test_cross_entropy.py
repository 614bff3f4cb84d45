"""Native cross-entropy of logits, and the head around it, against float64: losses and gradients, by every level."""

import pytest
import torch
import torch.nn.functional as F

from moe.kernels import reference
from moe.kernels.native import library
from tests.op_cases import head_inputs, with_gradients

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())
ce = pytest.importorskip("moe.kernels.native.cross_entropy")

F32, BF16 = torch.float32, torch.bfloat16
LEVELS = library.levels() if not library.status() else []


@pytest.fixture(params=LEVELS)
def level(request):
    library.use_level(request.param)
    yield request.param
    library.use_level("")


def loss_of(logits, targets, gradient=True):
    """-> (sum of the losses, what the logits are then)."""
    total, logits = torch.zeros((), dtype=torch.float64), logits.clone()
    ce.cross_entropy_(logits, targets, total, gradient)
    return total, logits


def by_pytorch(logits, targets):
    return with_gradients(
        lambda x: F.cross_entropy(x, targets, ignore_index=-1, reduction="sum"),
        (logits.double(),), torch.tensor(1.0), (0,),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("n, vocab", [(1, 1), (5, 2), (7, 16), (9, 37), (3, 256), (40, 71), (0, 5)])
def test_losses_and_gradients_agree_with_cross_entropy(agree, level, dtype, n, vocab):
    logits, targets = (torch.randn(n, vocab) * 4).to(dtype), torch.randint(0, vocab, (n,))
    targets[torch.rand(n) < 0.3] = -1
    right, (gradient,) = by_pytorch(logits, targets)
    loss, found = loss_of(logits, targets)
    agree(loss, right, 1e-6, scale=1.0)
    agree(found, gradient, scale=1.0)
    assert found[targets < 0].eq(0).all()
    loss, found = loss_of(logits, targets, gradient=False)
    agree(loss, right, 1e-6, scale=1.0)
    assert torch.equal(found, logits)


def test_losses_are_added_to_those_before_them(agree, level):
    logits, targets = torch.randn(6, 11), torch.randint(0, 11, (6,))
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 6)):
        ce.cross_entropy_(logits[part].clone(), targets[part], total, False)
    agree(total, loss_of(logits, targets)[0], 1e-12)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits_neither_overflow_nor_vanish(agree, level, shift):
    logits, targets = torch.randn(5, 37) * 300 + shift, torch.randint(0, 37, (5,))
    right, (gradient,) = by_pytorch(logits, targets)
    loss, found = loss_of(logits, targets)
    agree(loss, right, 1e-6)
    agree(found, gradient, scale=1.0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 16, 36])
def test_logits_that_are_no_numbers_show_in_loss_and_gradient(level, wrong, at):
    logits, targets = torch.randn(3, 37), torch.tensor([1, 5, -1])
    logits[1:, at] = wrong
    loss, found = loss_of(logits, targets)
    assert loss.isnan() and found[1].isnan().all() and not found[0].isnan().any() and found[2].eq(0).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("n, chunk", [(13, 4), (13, 1024), (1, 1), (0, 4)])
def test_the_head_agrees_with_loops_in_value_and_every_gradient(agree, level, dtype, n, chunk):
    hidden, weight, targets = head_inputs(n, 6, 37, dtype)
    exact, gradients = with_gradients(
        lambda h, w: reference.linear_cross_entropy(h, w, targets), (hidden.double(), weight.double()),
        torch.tensor(1.0), (0, 1),
    )  # fmt: skip
    found = ce.linear_cross_entropy_forward(hidden, weight, targets, chunk, True)
    assert found[0].dtype == F32 and found[1].dtype == found[2].dtype == dtype
    agree(found[0], exact, 1e-2 if dtype is BF16 else None, scale=1.0)
    for a, e in zip(found[1:], gradients):
        agree(a, e, scale=1.0)
    quiet = ce.linear_cross_entropy_forward(hidden, weight, targets, chunk, False)
    assert torch.equal(quiet[0], found[0]) and quiet[1].numel() == quiet[2].numel() == 0


def test_a_target_past_the_vocabulary_is_refused():
    hidden, weight, _ = head_inputs(3, 6, 7, F32)
    with pytest.raises(IndexError, match="target 7"):
        ce.linear_cross_entropy_forward(hidden, weight, torch.tensor([1, 7, -5]), 2, True)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(level, dtype):
    logits, targets, found = torch.randn(101, 53).to(dtype), torch.randint(-9, 53, (101,)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(loss_of(logits, targets))
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
