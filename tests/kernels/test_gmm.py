"""The grouped product against float64 products, one expert at a time."""

import pytest
import torch

from moe.kernels import gmm as module
from moe.kernels import launch, tiles
from moe.kernels.gmm import gmm, zero_tail
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


def inputs(case, a, b, transpose, dtype=F32):
    chosen = choose(COUNTS[case])
    rows = torch.randn(len(chosen.order), a).to(dtype)
    return chosen, garbage_after(rows, chosen.live), torch.randn(6, *((b, a) if transpose else (a, b))).to(dtype)


def golden(rows, w, chosen, transpose):
    """The live rows in float64."""
    found = [rows[own].double() @ (w[e].double().T if transpose else w[e].double()) for e, own in chosen.experts()]
    return torch.cat(found)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("case", COUNTS)
def test_rows_meet_their_own_expert_and_nobodys_rows_are_left_alone(agree, monkeypatch, case, transpose, tile):
    guarded = guard(monkeypatch, tiles)
    chosen, rows, w = inputs(case, 72, 40, transpose)
    y = gmm(rows, w, chosen.ends, transpose, TILES[tile])
    guarded.check()
    assert y.shape == (len(rows), 40) and y.dtype == F32
    agree(y[: chosen.live], golden(rows, w, chosen, transpose), ROUNDED[F32])
    assert y[chosen.live :].isnan().all()


@pytest.mark.parametrize("a, b", [(13, 20), (1, 1), (16, 33), (130, 8), (64, 64)])
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("transpose", [True, False])
def test_short_types_are_rounded_once_and_widths_may_be_odd(agree, dtype, transpose, a, b):
    chosen, rows, w = inputs("empty ones", a, b, transpose, dtype)
    for config in (None, TILES["few rows"]):
        y = gmm(rows, w, chosen.ends, transpose, config)
        assert y.dtype == dtype
        expected = golden(rows, w, chosen, transpose)
        agree(y[: chosen.live], expected, ROUNDED[dtype])
        assert dtype == F32 or nearest(y[: chosen.live], expected) > 0.9


@pytest.mark.parametrize("transpose", [True, False])
def test_layout_does_not_matter(transpose):
    chosen, rows, w = inputs("empty ones", 24, 16, transpose, F16)
    expected = gmm(rows, w, chosen.ends, transpose)[: chosen.live]
    for _ in range(2):
        assert torch.equal(gmm(awkward(rows), awkward(w), chosen.ends, transpose)[: chosen.live], expected)
    assert torch.equal(gmm(rows, w.mT.contiguous().mT, chosen.ends, transpose)[: chosen.live], expected)
    expanded = rows[:1].expand_as(rows)
    y = gmm(expanded, w, chosen.ends, transpose)[: chosen.live]
    assert torch.equal(y, gmm(expanded.contiguous(), w, chosen.ends, transpose)[: chosen.live])


@pytest.mark.parametrize("tile", ["tall", "few rows"])
def test_the_same_bits_for_every_grid(monkeypatch, tile):
    chosen, rows, w = inputs("spread", 40, 40, True)
    found = []
    for sms in (1, 3, 64):
        monkeypatch.setitem(launch.SMS, 90, sms)
        found.append(gmm(rows, w, chosen.ends, True, TILES[tile])[: chosen.live])
    assert all(torch.equal(found[0], other) for other in found)


def test_without_rows_or_columns_there_is_nothing_to_do():
    ends = torch.zeros(3, dtype=torch.int32)
    assert gmm(torch.randn(0, 8), torch.randn(3, 5, 8), ends, True).shape == (0, 5)
    assert gmm(torch.randn(4, 8), torch.randn(3, 0, 8), ends, True).shape == (4, 0)


@pytest.mark.parametrize("case", COUNTS)
def test_nobodys_rows_become_zero_on_request(case):
    chosen, rows, _ = inputs(case, 37, 1, True, BF16)
    rows[: chosen.live] = 3
    assert zero_tail(rows, chosen.ends) is rows
    assert (rows[: chosen.live] == 3).all() and (rows[chosen.live :] == 0).all()


@interpreted
@pytest.mark.parametrize("k", [37, 64], ids=["no whole step of depth", "whole steps, and columns that are not"])
@pytest.mark.parametrize("tile", TILES)
def test_nothing_outside_the_tensors_is_touched(monkeypatch, tile, k):
    fenced = fence(monkeypatch, module)
    for transpose in (True, False):
        chosen, rows, w = inputs("only the last", k, 44, transpose)
        gmm(rows, w, chosen.ends, transpose, TILES[tile])
    chosen, rows, w = inputs("nobody", k, 44, True)
    zero_tail(gmm(rows, w, chosen.ends, True, TILES[tile]), chosen.ends)
    assert fenced.touched


@interpreted
def test_experts_rows_and_results_may_lie_beyond_two_billion_elements(monkeypatch, agree):
    n, k, m = 1 << 21, 16, 1 << 11
    across, config = n // 16, Config(16, 16, 16, 4, 1)
    one_tile(monkeypatch, module, module._gmm, (m // 16) * across - 1)
    ends = torch.tensor([5, m], dtype=torch.int32)  # 1 tile, then 128: the last but one of them is asked for
    whole = sparse(m, 1 << 21)
    rows, w = whole[:, :k], sparse((n + 1) << 11).as_strided((2, n, k), (1 << 10, 1 << 11, 1))
    first = 5 + (m // 16 - 2) * 16
    rows[first : first + 16], w[1, -16:] = torch.randn(16, k), torch.randn(16, k)
    y = gmm(rows, w, ends, True, config)
    agree(y[first : first + 16, -16:], rows[first : first + 16].double() @ w[1, -16:].double().T, ROUNDED[F16])
    assert first * (1 << 21) > 2**31


@interpreted
def test_weights_may_lie_beyond_two_billion_elements(monkeypatch, agree):
    one_tile(monkeypatch, module, module._gmm, 0)
    w = sparse((1 << 31) + (1 << 20)).as_strided((3, 16, 16), (1 << 30, 1 << 10, 1))
    rows, w[2] = torch.randn(4, 16).half(), torch.randn(16, 16).half()
    for transpose in (True, False):
        y = gmm(rows, w, torch.tensor([0, 0, 4], dtype=torch.int32), transpose, TILES["few rows"])
        agree(y, rows.double() @ (w[2].double().T if transpose else w[2].double()), ROUNDED[F16])


def test_what_does_not_fit_is_refused_in_one_line():
    rows, w, ends = torch.randn(4, 8), torch.randn(3, 5, 8), torch.zeros(3, dtype=torch.int32)
    wrong = [
        ((rows.double(), w.double(), ends, True), "float64"),
        ((rows, w.half(), ends, True), "w is torch.float16"),
        ((rows, w, ends.long(), True), "ends must be contiguous int32"),
        ((rows, w, ends, False), "shapes do not fit"),
        ((rows, w, ends[:2], True), "shapes do not fit"),
    ]
    for arguments, says in wrong:
        with pytest.raises(ValueError, match=says) as error:
            gmm(*arguments)
        assert "\n" not in str(error.value)


def test_a_recording_on_the_meta_device_asks_for_the_same():
    chosen, rows, w = inputs("spread", 32, 48, True, BF16)
    seen = []
    for device in ("cpu", "meta"):
        with launch.recording(90) as launches:
            gmm(rows.to(device), w.to(device), chosen.ends.to(device), True)
        (started,) = launches
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in started.args]
        seen.append((started.grid, shapes, started.options))
    assert seen[0] == seen[1]
