"""Weight gradients against float64 products, one expert at a time."""

import pytest
import torch

from moe.kernels import dw as module
from moe.kernels import launch, tiles
from moe.kernels.dw import dw
from tests.kernels.grouped import (
    BF16,
    COUNTS,
    F16,
    F32,
    ROUNDED,
    TILES,
    Config,
    awkward,
    choose,
    fence,
    garbage_after,
    nearest,
    one_tile,
    sparse,
)
from tests.kernels.guards import guard

interpreted = pytest.mark.skipif(not launch.INTERPRET, reason="plays with the interpreter")
GATHER = [None, "a", "b"]


def inputs(case, n_a, n_b, gather, top_k=2, dtype=F32):
    """Choices; a and b, of which one is [N, .] of tokens and the other rows, NaN past the last expert's."""
    chosen = choose(COUNTS[case], top_k)
    n, m = chosen.inv.shape[0], chosen.inv.numel()
    a, b = (torch.randn(n if gather == own else m, width).to(dtype) for own, width in (("a", n_a), ("b", n_b)))
    return (
        chosen,
        a if gather == "a" else garbage_after(a, chosen.live),
        b if gather == "b" else garbage_after(b, chosen.live),
    )


def arguments(chosen, gather, top_k=2):
    return (chosen.ends,) if gather is None else (chosen.ends, chosen.order, gather, top_k)


def golden(chosen, a, b, gather, top_k=2):
    """In float64: zeros for an expert without rows."""
    rows_a = a[chosen.slots // top_k] if gather == "a" else a
    rows_b = b[chosen.slots // top_k] if gather == "b" else b
    return torch.stack([rows_a[own].double().T @ rows_b[own].double() for _, own in chosen.experts()])


@pytest.mark.parametrize("gather", GATHER)
@pytest.mark.parametrize("case", COUNTS)
def test_each_expert_sums_over_its_own_rows_and_without_rows_is_zero(agree, monkeypatch, case, gather):
    """Weights of several tiles in both directions, the last ones cut."""
    guarded = guard(monkeypatch, tiles)
    chosen, a, b = inputs(case, 40, 72, gather)
    found = dw(a, b, *arguments(chosen, gather), config=Config(32, 64, 32, 4, 2))
    guarded.check()
    assert found.dtype == F32
    expected = golden(chosen, a, b, gather)
    agree(found, expected, ROUNDED[F32])
    assert not found[[count == 0 for count in chosen.counts]].any()


@pytest.mark.parametrize("n_a, n_b, top_k", [(13, 20, 3), (1, 1, 1), (64, 16, 2)])
@pytest.mark.parametrize("gather", GATHER)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_short_types_are_added_in_fp32_and_rounded_once(agree, dtype, gather, n_a, n_b, top_k):
    chosen, a, b = inputs("empty ones", n_a, n_b, gather, top_k, dtype)
    expected = golden(chosen, a, b, gather, top_k)
    found = dw(a, b, *arguments(chosen, gather, top_k))
    assert found.dtype == dtype
    agree(found, expected, ROUNDED[dtype])
    assert nearest(found, expected) > 0.9
    whole = dw(a, b, *arguments(chosen, gather, top_k), out_dtype=F32)
    assert whole.dtype == F32
    agree(whole, expected, ROUNDED[F32])


@pytest.mark.parametrize("gather", GATHER)
def test_layout_does_not_matter(gather):
    chosen, a, b = inputs("empty ones", 24, 16, gather, dtype=BF16)
    expected = dw(a, b, *arguments(chosen, gather))
    assert torch.equal(dw(awkward(a), awkward(b), *arguments(chosen, gather)), expected)


def test_the_same_bits_for_every_grid_and_tile_order(monkeypatch):
    chosen, a, b = inputs("spread", 40, 24, "b")
    expected = dw(a, b, *arguments(chosen, "b"), config=TILES["few rows"])
    start = module.launch

    def on_few_programs(kernel, grid, *args, **options):
        start(kernel, (min(grid[0], 3),) if kernel is module._dw else grid, *args, **options)

    monkeypatch.setattr(module, "launch", on_few_programs)
    assert torch.equal(dw(a, b, *arguments(chosen, "b"), config=TILES["few rows"]), expected)


@pytest.mark.parametrize("n_experts", [1, 5, 16, 100, 256])
def test_experts_are_visited_by_falling_count_the_lower_id_first(n_experts):
    counts = torch.randint(0, 6, (n_experts,))
    visit = module.by_falling_count(counts.cumsum(0).int())
    assert torch.equal(visit.long(), torch.sort(counts, descending=True, stable=True).indices)


def test_without_rows_weights_are_zero():
    ends = torch.zeros(3, dtype=torch.int32)
    found = dw(torch.randn(0, 8), torch.randn(0, 5), ends)
    assert found.shape == (3, 8, 5) and not found.any()
    found = dw(torch.randn(0, 8), torch.randn(0, 5), ends, ends[:0], "a", 2, out_dtype=BF16)
    assert found.dtype == BF16 and not found.any()


@interpreted
@pytest.mark.parametrize("gather", GATHER)
def test_nothing_outside_the_tensors_is_touched(monkeypatch, gather):
    fenced = fence(monkeypatch, module)
    for case in ("only the last", "empty ones", "nobody"):
        chosen, a, b = inputs(case, 37, 44, gather)
        dw(a, b, *arguments(chosen, gather), config=TILES["few rows"])
    assert fenced.touched


@interpreted
@pytest.mark.parametrize("gather", GATHER)
def test_rows_and_weights_may_lie_beyond_two_billion_elements(monkeypatch, agree, gather):
    n_a, n_b, m = 1 << 16, 1 << 15, 1 << 16
    each = (n_a // 16) * (n_b // 16)
    one_tile(monkeypatch, module, module._dw, 3 * each - 1)  # the last tile of the expert with the fewest rows
    ends = torch.tensor([m // 2, m - 5, m], dtype=torch.int32)
    a, b, order = sparse(m, n_a), sparse(m, n_b * 2)[:, :n_b], torch.arange(m, dtype=torch.int32)
    a[-5:, -16:], b[-5:, -16:] = torch.randn(5, 16), torch.randn(5, 16)
    given = (ends,) if gather is None else (ends, order, gather, 1)
    found = dw(a, b, *given, config=Config(16, 16, 16, 4, 1))
    agree(found[2, -16:, -16:], a[-5:, -16:].double().T @ b[-5:, -16:].double(), ROUNDED[F16])


def test_what_does_not_fit_is_refused_in_one_line():
    chosen, a, b = inputs("empty ones", 8, 4, "a")
    wrong = [
        ((a.double(), b.double(), chosen.ends, chosen.order, "a", 2), "float64"),
        ((a, b.half(), chosen.ends, chosen.order, "a", 2), "b is torch.float16"),
        ((a, b, chosen.ends), "shapes do not fit"),
        ((a, b, chosen.ends, chosen.order, "a", 3), "shapes do not fit"),
        ((a, b, chosen.ends, chosen.order, "b", 2), "shapes do not fit"),
        ((a, b, chosen.ends, chosen.order, None, 2), "shapes do not fit"),
        ((a, b, chosen.ends, None, "a", 2), "shapes do not fit"),
        ((a, b, chosen.ends, chosen.order, "c", 2), "shapes do not fit"),
    ]
    for given, says in wrong:
        with pytest.raises(ValueError, match=says) as error:
            dw(*given)
        assert "\n" not in str(error.value)
