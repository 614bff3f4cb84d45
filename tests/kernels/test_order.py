"""The counting sort against torch's stable sort: exact, whatever the ids are."""

import random

import pytest
import torch

from moe.kernels import launch, order, route
from moe.kernels.order import sort_by_expert
from tests.kernels.guards import guard

DTYPES = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8]


def golden(experts, n_experts):
    """order (without its tail), inv, ends by torch.sort, ids outside [0, E) left out."""
    flat = experts.flatten().long()
    flat = torch.where((flat >= 0) & (flat < n_experts), flat, n_experts)
    counts = torch.bincount(flat, minlength=n_experts + 1)[:n_experts]
    perm = torch.sort(flat, stable=True).indices[: counts.sum()]
    inv = torch.full_like(flat, -1)
    inv[perm] = torch.arange(len(perm))
    return perm, inv.view(experts.shape), counts.cumsum(0)


def check(experts, n_experts, hist=None):
    found = sort_by_expert(experts, n_experts, hist)
    assert [t.dtype for t in found] == [torch.int32] * 3 and found.order.shape == (experts.numel(),)
    perm, inv, ends = golden(experts, n_experts)
    assert torch.equal(found.ends.long(), ends) and torch.equal(found.inv.long(), inv)
    assert torch.equal(found.order[: len(perm)].long(), perm)
    return found


def histogram(experts, n_experts):
    """Choices of each block of 8 tokens, as `route` hands it over."""
    blocks = [torch.bincount(b[(b >= 0) & (b < n_experts)].long(), minlength=n_experts) for b in experts.split(8)]
    return torch.stack(blocks).int()


def outside(experts, n_experts, share):
    """Some ids become nobody's: E itself, larger, negative."""
    wrong = torch.tensor([n_experts, n_experts + 1, -1, 2**40 + 1, -(2**40)])[torch.randint(0, 5, experts.shape)]
    return torch.where(torch.rand(experts.shape) < share, wrong, experts)


@pytest.mark.parametrize(
    "n, k, n_experts",
    [(130, 8, 256), (41, 6, 64), (9, 16, 1024), (1, 1, 1), (1, 3, 7), (77, 5, 12), (129, 1, 3), (40, 2, 65)],
)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_order_is_that_of_a_stable_sort(monkeypatch, n, k, n_experts, share):
    guarded = guard(monkeypatch, order)
    experts = outside(torch.randint(0, n_experts, (n, k)), n_experts, share)
    first = check(experts, n_experts)
    second = check(experts, n_experts, histogram(experts, n_experts))
    guarded.check()
    live = int(first.ends[-1])
    for a, e in zip(first, second):  # the same, and beyond the live rows equally unwritten
        assert torch.equal(a, e)
    assert first.order[live:].eq(torch.iinfo(torch.int32).min).all()


def test_random_shapes(monkeypatch):
    guarded = guard(monkeypatch, order)
    for _ in range(8):
        n, k, n_experts = random.randint(1, 90), random.randint(1, 16), random.randint(1, 90)
        experts = outside(torch.randint(0, n_experts, (n, k)), n_experts, random.choice([0, 0.1, 0.9]))
        check(experts, n_experts, random.choice([None, histogram(experts, n_experts)]))
    guarded.check()


@pytest.mark.parametrize("expert", [0, 3, 8])
def test_a_hot_expert_keeps_the_order_of_its_choices(expert):
    experts = torch.full((70, 4), expert)
    for hist in (None, histogram(experts, 9)):
        assert check(experts, 9, hist).order.tolist() == list(range(280))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_of_any_integer_type(dtype):
    low = 0 if dtype == torch.uint8 else -3
    check(torch.randint(low, 127, (30, 3)).to(dtype), 100)
    check(torch.randint(low, 127, (5, 2)).to(dtype), 300)  # more experts than the type can name


def test_several_chunks_of_blocks_add_up(monkeypatch):
    monkeypatch.setattr(order, "CHUNK", 4)
    experts = outside(torch.randint(0, 20, (150, 3)), 20, 0.2)
    check(experts, 20, histogram(experts, 20))  # 19 blocks
    monkeypatch.setattr(order, "SLOTS", 16)
    check(experts, 20)


def test_more_choices_than_a_block_holds_are_counted_again():
    experts = torch.randint(0, 50, (12, 33))
    check(experts, 50, histogram(experts, 50))
    with launch.recording(90) as found:
        sort_by_expert(experts, 50, histogram(experts, 50))
    assert [f.kernel.__name__ for f in found] == ["_count", "_before", "_place"]


def test_the_histogram_of_the_router_serves():
    n, e, k = 53, 32, 4
    ids, _, hist = route.route(torch.randn(n, e), torch.randn(e), k, 8, 3, mask=torch.rand(n) < 0.7)
    before = hist.clone()
    check(ids, e, hist)
    assert torch.equal(hist, before)  # it is somebody's count, and stays


def test_views_are_read_as_what_they_show():
    wide = torch.randint(-1, 9, (40, 14))
    for experts in (wide[::3, 1:6], wide[:14].t(), wide[:, :1].expand(40, 3)):
        check(experts, 9, histogram(experts, 9))
        check(experts, 9)


def test_without_choices_nothing_is_placed():
    for shape in ((0, 4), (5, 0), (0, 0)):
        found = sort_by_expert(torch.empty(shape, dtype=torch.int64), 6)
        assert found.order.shape == (0,) and found.inv.shape == shape and found.ends.tolist() == [0] * 6


def test_a_launch_asks_for_shapes_only():
    def launches(device):
        experts = torch.zeros(50, 3, dtype=torch.int64, device=device)
        hist = torch.zeros(7, 20, dtype=torch.int32, device=device)
        with launch.recording(80) as found:
            sort_by_expert(experts, 20)
            sort_by_expert(experts, 20, hist)
        return [(f.kernel.__name__, f.grid, [tuple(a.shape) if torch.is_tensor(a) else a for a in f.args], f.options)
                for f in found]  # fmt: skip

    assert launches("meta") == launches("cpu")
    assert [name for name, *_ in launches("meta")] == ["_count", "_before", "_place", "_before", "_place"]


@pytest.mark.parametrize(
    "experts, hist, words",
    [
        (torch.zeros(4, 2), None, "integers"),
        (torch.zeros(4, 2, dtype=torch.bool), None, "integers"),
        (torch.zeros(8, dtype=torch.int64), None, "[N, K]"),
        (torch.zeros(9, 2, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int32), "[2, 6] int32"),
        (torch.zeros(9, 2, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64), "int64"),
        (torch.empty(2**28, 8, dtype=torch.int32, device="meta"), None, "int32; route fewer tokens"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(experts, hist, words):
    with pytest.raises(ValueError) as error:
        sort_by_expert(experts, 6, hist)
    assert words in str(error.value) and "\n" not in str(error.value)
