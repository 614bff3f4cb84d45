"""The start-up check: it passes where the kernels are right, and names what is wrong where they are not."""

import pytest
import torch

from moe.kernels import chain, selftest

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", selftest.TOLERANCE, ids=str)
def test_right_kernels_agree(dtype):
    assert selftest.disagreement(CPU, dtype) == ""


def test_its_layer_has_an_expert_without_tokens_a_crowded_one_and_ids_of_nobody():
    ids = selftest.case(torch.float32)["experts"]
    inside = ids[(ids >= 0) & (ids < selftest.E)]
    counts = torch.bincount(inside, minlength=selftest.E)
    assert (counts == 0).sum() == 1 and counts.max() > 1.5 * counts.float().mean() and len(inside) < ids.numel()


def test_it_moves_no_random_number_of_the_user():
    before = torch.get_rng_state()
    selftest.case(torch.float32)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("wrong, word", [(1.01, "dw2 off by"), (float("nan"), "dw2 off by nan")])
def test_a_wrong_gradient_is_named_with_its_size(monkeypatch, wrong, word):
    backward = chain.experts_backward

    def faulty(*args):
        dx, dw13, dw2, dgates = backward(*args)
        return dx, dw13, dw2 * wrong, dgates

    monkeypatch.setattr(chain, "experts_backward", faulty)
    assert word in selftest.disagreement(CPU, torch.float32)


@pytest.mark.parametrize(
    "part, wrong, word",
    [(0, lambda ids: ids.flip(1), "chose other experts"), (1, lambda g: g * 1.001, "gates off by 0.001"), (2, lambda h: h + 1, "counted wrong")],
    ids=["ids", "gates", "counts"],
)  # fmt: skip
def test_a_wrong_router_is_named(monkeypatch, part, wrong, word):
    route = selftest.router.route

    def faulty(*args):
        found = list(route(*args))
        found[part] = wrong(found[part])
        return found

    monkeypatch.setattr(selftest.router, "route", faulty)
    assert word in selftest.disagreement(CPU, torch.float32)


def test_a_failing_compiler_is_a_disagreement_in_one_line(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("ptxas says no\nand much more")

    monkeypatch.setattr(chain, "experts_forward", fails)
    assert selftest.disagreement(CPU, torch.float32) == "RuntimeError: ptxas says no"
