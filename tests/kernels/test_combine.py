"""The sum of each token's rows against a loop in float64."""

import pytest
import torch

from moe.kernels import combine as module
from moe.kernels import launch, tiles
from moe.kernels.combine import combine
from tests.kernels.grouped import (
    BF16,
    COUNTS,
    F16,
    F32,
    ROUNDED,
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


def inputs(case, d, top_k, dtype=F32):
    chosen = choose(COUNTS[case], top_k)
    rows = torch.randn(chosen.inv.numel(), d).to(dtype)
    return garbage_after(rows, chosen.live), chosen.inv


def golden(rows, inv, base=None):
    found = torch.zeros(inv.shape[0], rows.shape[1], dtype=torch.float64) if base is None else base.double()
    for n, own in enumerate(inv.tolist()):
        for row in own:
            if row >= 0:
                found[n] += rows[row].double()
    return found


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("d, top_k", [(72, 3), (1, 1), (600, 2)])
@pytest.mark.parametrize("with_base", [False, True])
def test_each_token_gets_its_own_rows_and_nobodys_none(agree, monkeypatch, case, d, top_k, with_base):
    guarded = guard(monkeypatch, tiles)
    rows, inv = inputs(case, d, top_k)
    base = torch.randn(inv.shape[0], d) if with_base else None
    y = combine(rows, inv, base)
    guarded.check()
    agree(y, golden(rows, inv, base), ROUNDED[F32], scale=0.1)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_short_types_are_added_in_fp32_and_rounded_once(agree, dtype):
    rows, inv = inputs("spread", 40, 5, dtype)
    base = torch.randn(inv.shape[0], 40).to(dtype)
    for given in (None, base):
        y, expected = combine(rows, inv, given), golden(rows, inv, given)
        assert y.dtype == dtype
        agree(y, expected, ROUNDED[dtype])
        assert nearest(y, expected) > 0.95
    ones = combine(torch.tensor([[256.0], [1.0], [-256.0]]).to(dtype), torch.tensor([[0, 1, 2]], dtype=torch.int32))
    assert ones.item() == 1  # bf16 has no 257


def test_the_choices_are_added_in_their_order():
    rows = torch.tensor([[1e8], [1.0], [-1e8]])
    assert combine(rows, torch.tensor([[0, 1, 2], [0, 2, 1]], dtype=torch.int32)).flatten().tolist() == [0.0, 1.0]


def test_layout_does_not_matter():
    rows, inv = inputs("empty ones", 24, 2, BF16)
    base = torch.randn(inv.shape[0], 24).bfloat16()
    right = combine(rows, inv, base)
    assert torch.equal(combine(awkward(rows), inv, awkward(base)), right)
    wide = torch.full((inv.shape[0], 48), float("nan")).bfloat16()  # aligned, so that it is read where it lies
    wide[:, :24] = base
    assert torch.equal(combine(rows, inv, wide[:, :24]), right)


def test_the_same_bits_for_every_grid(monkeypatch):
    rows, inv = inputs("a hot one", 1030, 2)
    found = []
    for sms in (1, 64):
        monkeypatch.setitem(launch.SMS, 90, sms)
        found.append(combine(rows, inv))
    assert torch.equal(*found)


def test_no_tokens_no_choices_no_columns():
    nothing = torch.zeros(0, 2, dtype=torch.int32)
    assert combine(torch.randn(0, 8), nothing).shape == (0, 8)
    assert combine(torch.randn(4, 0), torch.zeros(2, 2, dtype=torch.int32)).shape == (2, 0)
    alone = torch.full((3, 2), -1, dtype=torch.int32)
    assert not combine(torch.randn(0, 8), alone).any()


@interpreted
def test_nothing_outside_the_tensors_is_touched(monkeypatch):
    fenced = fence(monkeypatch, module)
    for case in ("only the last", "spread", "nobody"):
        rows, inv = inputs(case, 37, 3)
        combine(rows, inv, torch.randn(inv.shape[0], 37))
    assert fenced.touched


@interpreted
def test_rows_base_and_result_may_lie_beyond_two_billion_elements(monkeypatch, agree):
    n, d = 1 << 10, 1 << 22
    block = 512
    one_tile(monkeypatch, module, module._combine, (n // (module.ELEMENTS // block)) * (d // block) - 1)
    rows, base, inv = sparse(n, d), sparse(n, d), torch.full((n, 1), -1, dtype=torch.int32)
    inv[-1], rows[1000, -block:], base[-1, -block:] = 1000, torch.randn(block), torch.randn(block)
    y = combine(rows, inv, base)
    agree(y[-1, -block:], rows[1000, -block:].double() + base[-1, -block:].double(), ROUNDED[F16])


def test_what_does_not_fit_is_refused_in_one_line():
    rows, inv = inputs("empty ones", 8, 2)
    wrong = [
        ((rows.double(), inv), "float64"),
        ((rows, inv.long()), "inv must be contiguous int32"),
        ((rows, inv, rows[:, :4]), "shapes do not fit"),
        ((rows, inv, torch.zeros(inv.shape[0], 8).half()), "base is torch.float16"),
    ]
    for arguments, says in wrong:
        with pytest.raises(ValueError, match=says) as error:
            combine(*arguments)
        assert "\n" not in str(error.value)
