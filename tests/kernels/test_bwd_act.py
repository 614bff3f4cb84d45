"""Backward of down projection and SwiGLU against float64 autograd, one expert at a time."""

import pytest
import torch

from moe.kernels import bwd_act as module
from moe.kernels import launch, tiles
from moe.kernels.bwd_act import bwd_act
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
    """Choices; dy [N, D], w2 [6, D, F], z [M, 2F], gates [N, K]; NaN wherever nobody may look."""
    chosen = choose(COUNTS[case], top_k)
    gates = (torch.rand(chosen.inv.shape) + 0.1).masked_fill(chosen.inv < 0, float("nan"))
    z = garbage_after(torch.randn(chosen.inv.numel(), 2 * f).to(dtype), chosen.live)
    return chosen, torch.randn(len(gates), d).to(dtype), (torch.randn(6, d, f) * d**-0.5).to(dtype), z, gates


def golden(chosen, rows, w2, z, row_gates):
    """dz, h and the gates' gradient of live rows, by autograd in float64."""
    z, gates = z[: chosen.live].double().requires_grad_(), row_gates.double().requires_grad_()
    gate, up = z.chunk(2, 1)
    h = gate * torch.sigmoid(gate) * up * gates.unsqueeze(1)
    y = torch.cat([h[own] @ w2[e].double().T for e, own in chosen.experts()])
    dz, dgates = torch.autograd.grad(y, (z, gates), rows.double())
    return dz, h.detach(), dgates


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", COUNTS)
def test_gathered_gradients_agree_with_autograd(agree, monkeypatch, case, tile):
    """F of several tiles, so that the gates' gradient is a sum of parts."""
    guarded = guard(monkeypatch, tiles)
    chosen, dy, w2, z, gates = inputs(case, 40, 72)
    dz, h, dgates = bwd_act(dy, w2, z, gates, chosen.ends, chosen.order, TILES[tile])
    guarded.check()
    expected = golden(chosen, dy[chosen.slots // 2], w2, z, gates.flatten()[chosen.slots])
    assert dz.dtype == h.dtype == dgates.dtype == F32 and dgates.shape == gates.shape
    for name, a, e in zip(("dz", "h"), (dz, h), expected):
        agree(a[: chosen.live], e, ROUNDED[F32], what=name)
        assert a[chosen.live :].isnan().all()
    agree(dgates.flatten()[chosen.slots], expected[2], ROUNDED[F32], what="dgates", scale=0.1)
    assert (dgates[chosen.inv < 0] == 0).all()


@pytest.mark.parametrize("case", ["empty ones", "nobody"])
def test_gradients_in_order_are_taken_as_they_are(agree, case):
    chosen, dy, w2, z, gates = inputs(case, 33, 24, 1)
    dy, gates = garbage_after(dy, chosen.live), garbage_after(gates[:, 0].nan_to_num(1.0), chosen.live)
    dz, h, dgates = bwd_act(dy, w2, z, gates, chosen.ends)
    expected = golden(chosen, dy[: chosen.live], w2, z, gates[: chosen.live])
    for a, e in zip((dz, h, dgates), expected):
        agree(a[: chosen.live], e, ROUNDED[F32], scale=0.1)
    assert dz[chosen.live :].isnan().all() and dgates.shape == gates.shape and not dgates[chosen.live :].any()


@pytest.mark.parametrize("d, f, top_k", [(13, 20, 3), (1, 1, 1), (64, 80, 2)])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_short_types_are_rounded_once_and_widths_may_be_odd(agree, dtype, d, f, top_k):
    chosen, dy, w2, z, gates = inputs("empty ones", d, f, top_k, dtype)
    expected = golden(chosen, dy[chosen.slots // top_k], w2, z, gates.flatten()[chosen.slots])
    for config in (None, TILES["few rows"]):
        *found, dgates = bwd_act(dy, w2, z, gates, chosen.ends, chosen.order, config)
        for a, e in zip(found, expected):
            assert a.dtype == dtype
            agree(a[: chosen.live], e, ROUNDED[dtype])
            assert nearest(a[: chosen.live], e) > 0.9
        agree(dgates.flatten()[chosen.slots], expected[2], ROUNDED[F32], scale=0.1)
    short = bwd_act(dy, w2, z, gates.to(dtype), chosen.ends, chosen.order)[2]
    assert short.dtype == dtype and (short[chosen.inv < 0] == 0).all()


def test_h_is_that_of_the_forward_pass(agree):
    from moe.kernels.up_swiglu import up_swiglu

    chosen, x, _, _, gates = inputs("spread", 24, 16)
    z, h = up_swiglu(x, torch.randn(6, 32, 24), gates, chosen.ends, chosen.order)
    again = bwd_act(x, torch.randn(6, 24, 16), z, gates, chosen.ends, chosen.order)[1]
    agree(again[: chosen.live], h[: chosen.live], ROUNDED[F32])


def test_layout_does_not_matter():
    chosen, dy, w2, z, gates = inputs("empty ones", 24, 16, dtype=F16)
    expected = bwd_act(dy, w2, z, gates, chosen.ends, chosen.order)
    other = bwd_act(awkward(dy), awkward(w2), awkward(z), gates.T.contiguous().T, chosen.ends, chosen.order)
    for a, e in zip(other[:2], expected[:2]):
        assert torch.equal(a[: chosen.live], e[: chosen.live])
    assert torch.equal(other[2], expected[2])


@pytest.mark.parametrize("tile", TILES)
def test_the_same_bits_for_every_grid(monkeypatch, tile):
    chosen, dy, w2, z, gates = inputs("empty ones", 24, 40)
    found = []
    for sms in (1, 3, 64):
        monkeypatch.setitem(launch.SMS, 90, sms)
        dz, h, dgates = bwd_act(dy, w2, z, gates, chosen.ends, chosen.order, TILES[tile])
        found.append((dz[: chosen.live], h[: chosen.live], dgates))
    assert all(torch.equal(a, e) for other in found for a, e in zip(other, found[0]))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extreme_activations_have_finite_gradients():
    z = torch.tensor([[-3e4, 2.0], [3e4, 2.0], [-100.0, 2.0], [0.0, 2.0]])
    dz, h, dgates = bwd_act(
        torch.ones(4, 1), torch.ones(1, 1, 1), z, torch.ones(4), torch.tensor([4], dtype=torch.int32)
    )
    assert dz.tolist()[:2] == [[0.0, 0.0], [2.0, 3e4]] and dz[3].tolist() == [1.0, 0.0]
    assert dz.isfinite().all() and h.isfinite().all() and dgates.isfinite().all()


def test_without_rows_there_is_nothing_to_do():
    ends, w2 = torch.zeros(3, dtype=torch.int32), torch.randn(3, 8, 5)
    dz, h, dgates = bwd_act(torch.randn(0, 8), w2, torch.randn(0, 10), torch.randn(0, 2), ends, ends[:0])
    assert dz.shape == (0, 10) and h.shape == (0, 5) and dgates.shape == (0, 2)


@interpreted
@pytest.mark.parametrize("k", [37, 64], ids=["no whole step of depth", "whole steps, and columns that are not"])
@pytest.mark.parametrize("tile", TILES)
def test_nothing_outside_the_tensors_is_touched(monkeypatch, tile, k):
    fenced = fence(monkeypatch, module)
    for case in ("only the last", "spread", "nobody"):
        chosen, dy, w2, z, gates = inputs(case, k, 44)
        bwd_act(dy, w2, z, gates, chosen.ends, chosen.order, TILES[tile])
    bwd_act(torch.randn(gates.numel(), k), w2, z, gates.flatten(), chosen.ends, config=TILES[tile])
    assert fenced.touched


@interpreted
def test_everything_may_lie_beyond_two_billion_elements(monkeypatch, agree):
    f, d, m = 1 << 20, 16, 1 << 12
    one_tile(monkeypatch, module, module._bwd_act, (m // 16) * (f // 16) - 1)
    monkeypatch.setattr(module, "_add_partials", None)
    started = module.launch
    monkeypatch.setattr(module, "launch", lambda kernel, *a, **o: kernel and started(kernel, *a, **o))
    ends, first = torch.tensor([5, 5, m], dtype=torch.int32), 5 + (m // 16 - 2) * 16
    dy, order, gates = sparse(1 << 11, 1 << 21)[:, :d], torch.zeros(m, dtype=torch.int32), torch.ones(1 << 11, 2)
    order[first:] = 2 * 2000  # the first choice of token 2000
    w2 = sparse((1 << 31) + (1 << 27)).as_strided((3, d, f), (1 << 30, f, 1))
    z = sparse(m, 2 * f)
    dy[2000], w2[2, :, -16:] = torch.randn(d), torch.randn(d, 16)
    own = slice(first, first + 16)
    z[own, f - 16 : f], z[own, -16:] = torch.randn(16, 16), torch.randn(16, 16)
    dz, h, _ = bwd_act(dy, w2, z, gates, ends, order, Config(16, 16, 16, 4, 1))
    p, gate, up = dy[2000].double() @ w2[2, :, -16:].double(), z[own, f - 16 : f].double(), z[own, -16:].double()
    s = torch.sigmoid(gate)
    agree(h[own, -16:], gate * s * up, ROUNDED[F16])
    agree(dz[own, -16:], p * gate * s, ROUNDED[F16])
    agree(dz[own, f - 16 : f], p * up * s * (1 + gate * (1 - s)), ROUNDED[F16])


@interpreted
def test_parts_of_the_gates_gradient_may_lie_beyond_two_billion_elements(monkeypatch):
    parts, m = 5, 1 << 29
    one_tile(monkeypatch, module, module._add_partials, m // 256 - 1)
    partial, dgates = sparse(parts, m, dtype=F32), sparse(m, dtype=F32)
    partial[:, -256:] = torch.randn(parts, 256)
    module.launch(
        module._add_partials, (1,), partial, torch.tensor([m], dtype=torch.int32), torch.zeros(1, dtype=torch.int32), dgates, m, 1, parts,
        GATHER=False, BLOCK=256, num_warps=4,
    )  # fmt: skip
    expected = torch.zeros(256)
    for part in partial[:, -256:]:
        expected += part
    assert torch.equal(dgates[-256:], expected)


def test_what_does_not_fit_is_refused_in_one_line():
    chosen, dy, w2, z, gates = inputs("empty ones", 8, 4)
    wrong = [
        ((dy.double(), w2.double(), z.double(), gates, chosen.ends, chosen.order), "float64"),
        ((dy, w2, z.half(), gates, chosen.ends, chosen.order), "z is torch.float16"),
        ((dy, w2, z[:, 1:], gates, chosen.ends, chosen.order), "shapes do not fit"),
        ((dy, w2, z, gates, chosen.ends), "shapes do not fit"),
        ((dy, w2.mT, z, gates, chosen.ends, chosen.order), "shapes do not fit"),
        ((dy, w2, z, gates.int(), chosen.ends, chosen.order), "gates"),
    ]
    for arguments, says in wrong:
        with pytest.raises(ValueError, match=says) as error:
            bwd_act(*arguments)
        assert "\n" not in str(error.value)
