"""Block-scaled E4M3 against tiles worked out by hand, a table of all its numbers, and torch's own float8."""

import pytest
import torch

from moe.kernels import fp8
from tests import fp8_reference as by_hand

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
QUANTISERS = [
    (fp8.quantise_rows, by_hand.rows),
    (fp8.quantise_columns, by_hand.columns),
    (fp8.quantise_blocks, by_hand.blocks),
]


def bits_of(dtype):
    """Every finite number of a 16-bit format within 448, as fp32."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return x[x.abs() <= 448]


def same(actual, expected):
    assert torch.equal(actual, expected), (actual - expected).abs().max()


# -------------------------------------------------------------------------------------------------------------- numbers


def test_the_table_of_the_reference_is_torchs_float8():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    same(by_hand.TABLE, codes.double())
    x = torch.cat([bits_of(BF16), bits_of(F16), torch.rand(10000) * 896 - 448])
    same(by_hand.e4m3(x.double()), x.to(torch.float8_e4m3fn).double())


def test_numbers_round_as_float8_does():
    near = torch.nextafter(torch.full((1,), 448.0), torch.tensor(1e9))  # what amax / 448 may leave of amax
    x = torch.cat([bits_of(BF16), bits_of(F16), torch.rand(10000) * 896 - 448, torch.randn(10000) * 2**-8, near])
    same(fp8._e4m3(x.clone()), x.to(torch.float8_e4m3fn).float())
    assert fp8._e4m3(torch.tensor([float("nan")])).isnan()


S = 2.0**-5  # scale of the tile below: every step is exact


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "number, stored",
    [
        (448, 448),
        (431, 416), (432, 448), (433, 448),  # spacing 32
        (17, 16), (19, 20), (18, 18), (17.001, 18),  # spacing 2: ties go to the even mantissa
        (1, 1), (1.0625, 1), (1.1875, 1.25),
        (0.3, 0.3125),
        (2**-6, 2**-6),  # the smallest normal number; below it steps of 2^-9
        (2**-9, 2**-9), (1.5 * 2**-9, 2**-8), (2.5 * 2**-9, 2**-8), (2**-10, 0), (2**-11, 0), (0, 0),
    ],
)  # fmt: skip
def test_a_tile_worked_out_by_hand(sign, number, stored):
    x = torch.zeros(1, 128, dtype=F64)
    x[0, 7], x[0, 100] = 448 * S, sign * number * S
    for power_of_two in (False, True):  # 2^-5 is one
        y = fp8.quantise_rows(x, power_of_two)
        assert y[0, 100] == sign * stored * S and y[0, 7] == 448 * S and y.count_nonzero() == 1 + (stored > 0)


def test_a_scale_is_rounded_up_to_a_power_of_two():
    for amax, scale in [(448, 1), (449, 2), (1, 2**-8), (1.75, 2**-8), (1.76, 2**-7), (3.5, 2**-7), (2**-20, 2**-28)]:
        assert fp8._scale(torch.tensor(float(amax)), True) == scale
    x = torch.tensor([[449.0, 33.0]])
    same(fp8.quantise_rows(x, True), torch.tensor([[448.0, 32.0]]))  # 224.5 and 16.5 in units of 2
    torch.testing.assert_close(fp8.quantise_rows(x), torch.tensor([[449.0, 32 * 449 / 448]]))


def test_a_tile_without_numbers_stays_zero():
    x = torch.randn(4, 384)
    x[1:, 128:256] = 0
    for quantise, _ in QUANTISERS:
        y = quantise(x)
        assert y.isfinite().all() and y[1:, 128:256].eq(0).all()
    assert fp8.quantise_rows(torch.full((1, 3), -0.0)).eq(0).all()


@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e-29])
def test_small_gradients_keep_their_digits(size):
    """The floor under amax is there for empty tiles, not for what a large batch divides."""
    x = torch.randn(2, 128)
    y = fp8.quantise_rows(x * size)
    assert ((y / size - x).abs() <= x.abs() / 15 + x.abs().amax(1, keepdim=True) * 2**-17).all()


def test_below_the_floor_numbers_fade_out():
    x = torch.tensor([[1e-32, 1e-36]])
    y = fp8.quantise_rows(x)
    assert y[0, 0] == pytest.approx(1e-32, rel=1 / 15) and y[0, 1] == 0 and y.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (130, 3), (128, 128), (129, 257), (300, 20)], ids=str)
def test_every_tile_has_its_own_scale(shape, dtype, power_of_two):
    """Sizes of tiles differ by orders of magnitude, so a scale taken from a neighbour would show."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-2, 2, shape)
    x = x.to(dtype)
    before = x.clone()
    for quantise, reference in QUANTISERS:
        y = quantise(x, power_of_two)
        assert y.dtype == dtype and y.is_contiguous()
        same(y, reference(x, power_of_two).to(F32 if dtype != F64 else F64).to(dtype))
    same(x, before)


def test_leading_dimensions_are_apart():
    x = torch.randn(2, 3, 130, 140) * 10.0 ** torch.arange(6).view(2, 3, 1, 1)
    for quantise, _ in QUANTISERS:
        same(quantise(x), torch.stack([torch.stack([quantise(m) for m in part]) for part in x]))


def test_columns_are_rows_of_the_transpose():
    x = torch.randn(300, 7)
    same(fp8.quantise_columns(x), fp8.quantise_rows(x.t()).t())


def test_an_outlier_spoils_its_own_tile_alone():
    x = torch.randn(256, 256)
    wild = x.clone()
    wild[5, 200] = 448e5  # everything beside it in the tile falls under half of the smallest step
    for quantise, touched in [
        (fp8.quantise_rows, (slice(5, 6), slice(128, 256))),
        (fp8.quantise_columns, (slice(0, 128), slice(200, 201))),
        (fp8.quantise_blocks, (slice(0, 128), slice(128, 256))),
    ]:
        calm, y = quantise(x), quantise(wild)
        hit = torch.zeros_like(x, dtype=torch.bool)
        hit[touched] = True
        same(y[~hit], calm[~hit])
        assert y[5, 200] == pytest.approx(448e5) and y[hit].count_nonzero() == 1


def test_nan_and_infinity_stay_in_their_tile_and_are_seen():
    for bad in ("nan", "inf"):
        x = torch.randn(2, 256)
        x[0, 3] = float(bad)
        y = fp8.quantise_rows(x)
        assert y[0, 3].isnan() and y[1].isfinite().all() and y[0, 128:].isfinite().all()


def test_a_block_may_have_another_size():
    x = torch.randn(10, 10) * 10.0 ** torch.randint(-2, 2, (10, 10))
    same(fp8.quantise_blocks(x, block=4).double(), by_hand.tiled(x, 4, 4).float().double())
    same(fp8.quantise_rows(x, block=3).double(), by_hand.tiled(x, 1, 3).float().double())


def test_nothing_is_quantised_to_nothing():
    for shape in [(0, 5), (5, 0), (2, 0, 3)]:
        assert all(quantise(torch.ones(shape)).shape == shape for quantise, _ in QUANTISERS)


def test_quantising_again_changes_nothing_under_powers_of_two():
    """Why V3 rounds the scales of what it will cut into other tiles; numbers far below their tile's largest aside."""
    x = (torch.rand(256, 256) + 0.1) * torch.where(torch.rand(256, 256) < 0.5, 1, -1)
    y = fp8.quantise_rows(x, True)
    same(fp8.quantise_columns(y, True), y)
    same(fp8.quantise_rows(fp8.quantise_rows(x)), fp8.quantise_rows(x))
    assert not torch.equal(fp8.quantise_columns(fp8.quantise_rows(x)), fp8.quantise_rows(x))


def test_bf16_adds_its_own_rounding_only_to_scales_that_are_no_powers_of_two():
    x = torch.randn(64, 256)
    exact = {power: fp8.quantise_rows(x.bfloat16().float(), power) for power in (False, True)}
    same(fp8.quantise_rows(x.bfloat16(), True).float(), exact[True])
    half = fp8.quantise_rows(x.bfloat16()).float()
    assert not torch.equal(half, exact[False]) and ((half - exact[False]).abs() <= exact[False].abs() * 2**-8).all()
