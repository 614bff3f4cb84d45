"""RMSNorm, SwiGLU and rotary tables with YaRN, against their formulas and hand-computed numbers."""

import math

import pytest
import torch

from moe.config import UserError
from moe.layers.basics import RMSNorm, Rotary, SwiGLU, rotate

V3 = dict(
    type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0,
    mscale_all_dim=1.0,
)  # fmt: skip


def test_rms_norm_divides_by_the_root_mean_square(agree):
    norm = RMSNorm(5, eps=0.1).double()
    norm.weight.data.normal_()
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    upstream = torch.randn_like(x)
    agree(norm(x), expected)
    actual, exact = (torch.autograd.grad(y, (x, norm.weight), upstream) for y in (norm(x), expected))
    for a, e in zip(actual, exact):
        agree(a, e)


def test_rms_norm_starts_at_one_and_is_blind_to_scale(agree):
    x = torch.randn(4, 64)
    assert RMSNorm(64).weight.eq(1).all()
    agree(RMSNorm(64, 1e-12)(x * 1000), RMSNorm(64, 1e-12)(x))


def test_swiglu_gates_with_the_first_rows(agree):
    layer = SwiGLU(4, 3).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    w13, w2 = layer.w13.weight, layer.w2.weight
    gate, up = x @ w13[:3].t(), x @ w13[3:].t()
    expected = (gate * torch.sigmoid(gate) * up) @ w2.t()
    agree(layer(x), expected)
    upstream = torch.randn_like(x)
    actual, exact = (torch.autograd.grad(y, (x, w13, w2), upstream) for y in (layer(x), expected))
    for a, e in zip(actual, exact):
        agree(a, e)


def test_plain_rotary_frequencies_are_powers_of_the_base():
    rotary = Rotary(8, theta=100.0)
    assert rotary.frequency == pytest.approx([1, 100**-0.25, 0.1, 100**-0.75], rel=1e-12)
    assert rotary.softmax_factor == 1 and rotary.magnitude == 1


def test_yarn_of_v3_leaves_pairs_to_10_divides_pairs_from_23_and_ramps_between():
    plain = [10000 ** (-2 * i / 64) for i in range(32)]
    yarn = Rotary(64, 10000.0, V3).frequency
    assert yarn[:11] == pytest.approx(plain[:11], rel=1e-12)
    assert yarn[23:] == pytest.approx([f / 40 for f in plain[23:]], rel=1e-12)
    for i in range(11, 23):
        ramp = (i - 10) / 13
        assert yarn[i] == pytest.approx(plain[i] * (1 - ramp) + plain[i] / 40 * ramp, rel=1e-12)


@pytest.mark.parametrize(
    "changes, factor, magnitude",
    [
        ({}, 1.873854, 1.0),
        (dict(mscale=0.707, mscale_all_dim=0.707), 1.2608037**2, 1.0),  # V2-Lite
        (dict(mscale_all_dim=None), 1.0, 1.368888),  # the magnitude goes to cos and sin instead
        (dict(mscale=0.707, mscale_all_dim=1.0), 1.873854, 1.2608037 / 1.368888),
        (dict(factor=1), 1.0, 1.0),
    ],
)
def test_yarn_scales_logits_by_m_squared(changes, factor, magnitude):
    rotary = Rotary(64, 10000.0, {k: v for k, v in {**V3, **changes}.items() if v is not None})
    assert rotary.softmax_factor == pytest.approx(factor, rel=2e-6)
    assert rotary.magnitude == pytest.approx(magnitude, rel=2e-6)


def test_tables_are_fp32_whatever_the_positions_and_right_far_out():
    rotary = Rotary(8, 10000.0, {**V3, "mscale_all_dim": 0})
    positions = torch.tensor([[0, 1, 5], [100, 1000, 2000]])
    cos, sin = rotary(positions)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (2, 3, 4)
    for b in range(2):
        for t in range(3):
            for pair, frequency in enumerate(rotary.frequency):
                angle = positions[b, t].item() * frequency
                assert cos[b, t, pair].item() == pytest.approx(1.368888 * math.cos(angle), abs=3e-4)
                assert sin[b, t, pair].item() == pytest.approx(1.368888 * math.sin(angle), abs=3e-4)


def test_rotate_turns_neighbouring_channels_as_complex_numbers(agree):
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)  # [B, T, H, R]
    angle = torch.randn(2, 3, 3, dtype=torch.float64)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * torch.exp(1j * angle)[:, :, None])
    actual = rotate(x, angle.cos(), angle.sin())
    agree(actual, expected.flatten(-2))
    upstream = torch.randn_like(x)
    agree(torch.autograd.grad(actual, x, upstream)[0], torch.autograd.grad(expected.flatten(-2), x, upstream)[0])


def test_rotation_keeps_the_dtype_and_rounds_only_once(agree):
    x = torch.randn(1, 5, 2, 8)
    cos, sin = Rotary(8)(torch.arange(5).unsqueeze(0))
    turned = rotate(x.bfloat16(), cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.bfloat16().float(), cos, sin).bfloat16())


def test_rotated_products_depend_on_distance_alone(agree):
    rotary = Rotary(16, 10000.0, V3)
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        turned = [rotate(x, *rotary(torch.tensor([[at]]))) for x, at in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    for distance in (0, 1, 7):
        agree(score(distance + 90, 90), score(distance, 0), 2e-5, scale=q.norm() * k.norm())
    assert (score(9, 0) - score(0, 9)).abs() > 1e-6


@pytest.mark.parametrize(
    "scaling, words",
    [
        (dict(type="linear", factor=2), ["rope_scaling.type='linear'", "yarn"]),
        (dict(type="yarn", factor=2), ["rope_scaling.original_max_position_embeddings=None"]),
        (dict(V3, factor=0.5), ["rope_scaling.factor=0.5", ">= 1"]),
        (dict(V3, factor="40"), ["rope_scaling.factor=40", "number"]),
        (dict(V3, beta_fats=3), ["rope_scaling.beta_fats", "beta_fast"]),
        (dict(factor=2), ["rope_scaling.type=None"]),
    ],
)
def test_scalings_that_mean_nothing_are_refused(scaling, words):
    with pytest.raises(UserError) as error:
        Rotary(8, scaling=scaling)
    assert all(word in str(error.value) for word in words), error.value


def test_default_scaling_is_plain_rotary():
    assert Rotary(8, scaling=dict(rope_type="default")).frequency == Rotary(8).frequency
