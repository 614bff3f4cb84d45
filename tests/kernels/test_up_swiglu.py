"""Up projection with SwiGLU against float64, one expert at a time, with rows gathered and rows in order."""

import pytest
import torch

from moe.kernels import launch, tiles
from moe.kernels import up_swiglu as module
from moe.kernels.up_swiglu import up_swiglu
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


def inputs(case, d, f, top_k=2, dtype=F32):
    """Choices; x [N, D], w13 [6, 2F, D], gates [N, K]. Gates of choices without an expert are NaN."""
    chosen = choose(COUNTS[case], top_k)
    gates = (torch.rand(chosen.inv.shape) + 0.1).masked_fill(chosen.inv < 0, float("nan"))
    return chosen, torch.randn(len(gates), d).to(dtype), (torch.randn(6, 2 * f, d) * d**-0.5).to(dtype), gates


def golden(chosen, rows, w13, row_gates):
    """z and h in float64, of live rows in expert order."""
    z = torch.cat([rows[own].double() @ w13[e].double().T for e, own in chosen.experts()])
    gate, up = z.chunk(2, 1)
    return z, gate * torch.sigmoid(gate) * up * row_gates.double().unsqueeze(1)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", COUNTS)
def test_gathered_rows_meet_their_own_expert_and_gate(agree, monkeypatch, case, tile):
    guarded = guard(monkeypatch, tiles)
    chosen, x, w13, gates = inputs(case, 72, 40)
    z, h = up_swiglu(x, w13, gates, chosen.ends, chosen.order, config=TILES[tile])
    guarded.check()
    expected = golden(chosen, x[chosen.slots // 2], w13, gates.flatten()[chosen.slots])
    for name, a, e in zip("zh", (z, h), expected):
        agree(a[: chosen.live], e, ROUNDED[F32], what=name)
        assert a.dtype == F32 and a[chosen.live :].isnan().all()


@pytest.mark.parametrize("case", ["empty ones", "nobody"])
def test_rows_in_order_are_taken_as_they_are(agree, case):
    chosen, x, w13, gates = inputs(case, 33, 24, 1)
    rows, gates = garbage_after(x, chosen.live), garbage_after(gates[:, 0].nan_to_num(1.0), chosen.live)
    z, h = up_swiglu(rows, w13, gates, chosen.ends)
    for a, e in zip((z, h), golden(chosen, rows, w13, gates[: chosen.live])):
        agree(a[: chosen.live], e, ROUNDED[F32])
        assert a[chosen.live :].isnan().all()
    none, again = up_swiglu(rows, w13, gates, chosen.ends, save_z=False)
    assert none is None and torch.equal(again[: chosen.live], h[: chosen.live])


@pytest.mark.parametrize("d, f, top_k", [(13, 20, 3), (1, 1, 1), (64, 80, 2)])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_short_types_are_rounded_once_and_widths_may_be_odd(agree, dtype, d, f, top_k):
    chosen, x, w13, gates = inputs("empty ones", d, f, top_k, dtype)
    expected = golden(chosen, x[chosen.slots // top_k], w13, gates.flatten()[chosen.slots])
    for config in (None, TILES["few rows"]):
        for a, e in zip(up_swiglu(x, w13, gates, chosen.ends, chosen.order, config=config), expected):
            assert a.dtype == dtype
            agree(a[: chosen.live], e, ROUNDED[dtype])
            assert nearest(a[: chosen.live], e) > 0.9


def test_gates_may_be_short_and_of_any_layout():
    chosen, x, w13, gates = inputs("empty ones", 16, 16)
    gates = gates.bfloat16()
    expected = up_swiglu(x, w13, gates.float(), chosen.ends, chosen.order)
    for other in (gates, gates.T.contiguous().T):
        for a, e in zip(up_swiglu(awkward(x), awkward(w13), other, chosen.ends, chosen.order), expected):
            assert torch.equal(a[: chosen.live], e[: chosen.live])


@pytest.mark.parametrize("tile", TILES)
def test_the_same_bits_for_every_grid(monkeypatch, tile):
    chosen, x, w13, gates = inputs("empty ones", 24, 40)
    found = []
    for sms in (1, 3, 64):
        monkeypatch.setitem(launch.SMS, 90, sms)
        z, h = up_swiglu(x, w13, gates, chosen.ends, chosen.order, config=TILES[tile])
        found.append(torch.cat([z, h], 1)[: chosen.live])
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extreme_activations_stay_finite():
    w13 = torch.tensor([[[1.0]], [[1.0]]]).transpose(0, 1).contiguous()  # z_gate = z_up = x
    x = torch.tensor([[-3e4], [3e4], [-88.8], [0.0]])
    _, h = up_swiglu(x, w13, torch.ones(4), torch.tensor([4], dtype=torch.int32))
    assert torch.equal(h[:2, 0], torch.tensor([0.0, 9e8])) and h.isfinite().all()


def test_without_rows_there_is_nothing_to_do():
    ends, w13 = torch.zeros(3, dtype=torch.int32), torch.randn(3, 10, 8)
    z, h = up_swiglu(torch.randn(0, 8), w13, torch.randn(0, 2), ends, torch.zeros(0, dtype=torch.int32))
    assert z.shape == (0, 10) and h.shape == (0, 5)
    assert up_swiglu(torch.randn(0, 8), w13, torch.randn(0), ends, save_z=False)[0] is None


@interpreted
@pytest.mark.parametrize("k", [37, 64], ids=["no whole step of depth", "whole steps, and columns that are not"])
@pytest.mark.parametrize("tile", TILES)
def test_nothing_outside_the_tensors_is_touched(monkeypatch, tile, k):
    fenced = fence(monkeypatch, module)
    for case in ("only the last", "spread", "nobody"):
        chosen, x, w13, gates = inputs(case, k, 44)
        up_swiglu(x, w13, gates, chosen.ends, chosen.order, config=TILES[tile])
    rows = torch.randn(gates.numel(), k)
    up_swiglu(rows, w13, gates.flatten(), chosen.ends, save_z=False, config=TILES[tile])
    assert fenced.touched


@interpreted
def test_tokens_weights_and_results_may_lie_beyond_two_billion_elements(monkeypatch, agree):
    f, k, m = 1 << 20, 16, 1 << 12
    one_tile(monkeypatch, module, module._up_swiglu, (m // 16) * (f // 16) - 1)
    ends = torch.tensor([5, 5, m], dtype=torch.int32)
    first = 5 + (m // 16 - 2) * 16
    x, order, gates = sparse(1 << 11, 1 << 21)[:, :k], torch.zeros(m, dtype=torch.int32), torch.ones(1 << 11, 2)
    order[first:] = 2 * 2000  # the first choice of token 2000
    w13 = sparse((1 << 31) + (1 << 27)).as_strided((3, 2 * f, k), (1 << 30, k, 1))
    x[2000], w13[2, f - 16 : f], w13[2, 2 * f - 16 :] = torch.randn(k), torch.randn(16, k), torch.randn(16, k)
    z, h = up_swiglu(x, w13, gates, ends, order, config=Config(16, 16, 16, 4, 1))
    expected = x[2000].double() @ w13[2, f - 16 : f].double().T, x[2000].double() @ w13[2, -16:].double().T
    for own in (first, first + 15):
        agree(z[own, f - 16 : f], expected[0], ROUNDED[F16])
        agree(z[own, -16:], expected[1], ROUNDED[F16])
        agree(h[own, -16:], expected[0] * torch.sigmoid(expected[0]) * expected[1], ROUNDED[F16])


def test_what_does_not_fit_is_refused_in_one_line():
    _, x, w13, gates = inputs("empty ones", 8, 4)
    chosen = choose(COUNTS["empty ones"], 2)
    wrong = [
        ((x.double(), w13.double(), gates, chosen.ends, chosen.order), "float64"),
        ((x, w13, gates, chosen.ends, chosen.order.long()), "order must be contiguous int32"),
        ((x, w13, gates, chosen.ends), "shapes do not fit"),
        ((x[1:], w13, gates, chosen.ends, chosen.order), "shapes do not fit"),
        ((x, w13[:, 1:], gates, chosen.ends, chosen.order), "shapes do not fit"),
        ((x, w13, gates.long(), chosen.ends, chosen.order), "gates"),
    ]
    for arguments, says in wrong:
        with pytest.raises(ValueError, match=says) as error:
            up_swiglu(*arguments)
        assert "\n" not in str(error.value)
