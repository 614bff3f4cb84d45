"""MLA against the paper's equations in float64, its two forms against each other, and what caches promise."""

import pytest
import torch

from moe.config import UserError
from moe.kernels.native import library
from moe.layers import attention
from moe.layers.attention import MLA
from moe.layers.basics import Rotary, rotate
from moe.layers.cache import LatentCache

SHAPE = dict(
    hidden_size=14, num_attention_heads=3, kv_lora_rank=9, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=7
)
YARN = dict(type="yarn", factor=4, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0)


def make(q_lora_rank=6, dtype=torch.float64, **changes):
    layer = MLA(**{**SHAPE, "q_lora_rank": q_lora_rank, **changes}).to(dtype)
    for name, p in layer.named_parameters():
        p.data.normal_(1.0 if "norm" in name else 0.0, 0.4)
    return layer


def angles_of(layer, positions):
    """Rotary tables in float64, made here."""
    angle = positions.double().unsqueeze(-1) * torch.tensor(layer.rotary.frequency, dtype=torch.float64)
    return angle.cos(), angle.sin()


def by_the_paper(layer, x, positions, segments=None):
    """Equations 1-11 one token, head and key at a time; positions [B, T]."""

    def norm(c, weight):
        return c / (c.square().mean() + 1e-6).sqrt() * weight

    def turn(c, position):
        z = torch.complex(c[::2], c[1::2])
        frequency = torch.tensor(layer.rotary.frequency, dtype=torch.float64)
        return torch.view_as_real(z * torch.exp(1j * position * frequency)).flatten()

    weights = dict(layer.named_parameters())
    heads, nope, rope, v_dim, rank = layer.heads, layer.nope, layer.rope, layer.v, layer.kv_lora_rank
    up = weights["kv_b.weight"].view(heads, nope + v_dim, rank)
    w_uk, w_uv = up[:, :nope], up[:, nope:]
    scale = (nope + rope) ** -0.5 * layer.rotary.softmax_factor
    rows = []
    for b in range(x.shape[0]):
        latents, keys = [], []
        for t in range(x.shape[1]):
            h, at = x[b, t], positions[b, t]
            down = weights["kv_a.weight"] @ h
            latents.append(norm(down[:rank], weights["kv_a_norm.weight"]))
            keys.append(turn(down[rank:], at))
            c_q = norm(weights["q_a.weight"] @ h, weights["q_a_norm.weight"]) if "q_a.weight" in weights else h
            q = (weights["q_b.weight" if "q_a.weight" in weights else "q.weight"] @ c_q).view(heads, nope + rope)
            outputs = []
            for i in range(heads):
                q_c, q_r = q[i, :nope], turn(q[i, nope:], at)
                seen = [j for j in range(t + 1) if segments is None or segments[b, j] == segments[b, t]]
                s = torch.stack([q_c @ (w_uk[i] @ latents[j]) + q_r @ keys[j] for j in seen]) * scale
                outputs.append(sum(p * (w_uv[i] @ latents[j]) for p, j in zip(s.softmax(0), seen)))
            rows.append(weights["o.weight"] @ torch.cat(outputs))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("q_lora_rank", [None, 6])
@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize("heads, packed", [(3, False), (1, True)])
def test_mla_is_the_papers_attention_in_value_and_every_gradient(agree, q_lora_rank, scaling, heads, packed):
    layer = make(q_lora_rank, rope_scaling=scaling, num_attention_heads=heads)
    x = torch.randn(2, 6, 14, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]]) if packed else None
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]) if packed else torch.arange(6).expand(2, 6)
    actual = layer(x, segment_ids=segments, angles=angles_of(layer, positions))
    expected = by_the_paper(layer, x, positions, segments)
    agree(actual, expected)
    inputs = [x, *layer.parameters()]
    upstream = torch.randn_like(x)
    for name, a, e in zip(
        ["x", *dict(layer.named_parameters())],
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream),
    ):  # fmt: skip
        agree(a, e, what=name)


def test_mla_makes_its_own_positions_and_tables(agree):
    layer = make(rope_scaling=YARN)
    x = torch.randn(2, 9, 14, dtype=torch.float64)
    exact = layer(x, angles=angles_of(layer, torch.arange(9)))
    agree(layer(x), exact, 1e-5)  # tables are fp32
    agree(layer(x, positions=torch.arange(9).expand(2, 9)), layer(x))
    agree(layer(x, positions=torch.arange(9) + 50), layer(x), 1e-4)  # only distances matter
    assert (layer(x, positions=torch.arange(9) * 2) - layer(x)).abs().max() > 1e-4


def test_softmax_scale_of_v3_with_and_without_yarn():
    v3 = dict(
        hidden_size=8, num_attention_heads=1, q_lora_rank=None, kv_lora_rank=4, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=4,
    )  # fmt: skip
    yarn = dict(type="yarn", factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    assert MLA(**v3).scale == pytest.approx(0.0721688, rel=1e-6)
    assert MLA(**v3, rope_scaling=yarn).scale == pytest.approx(0.1352338, rel=1e-6)


@pytest.mark.parametrize("q_lora_rank, scaling", [(None, None), (6, YARN)])
def test_absorbed_decoding_equals_the_expanded_form_token_by_token(agree, q_lora_rank, scaling):
    layer = make(q_lora_rank, rope_scaling=scaling)
    x = torch.randn(3, 10, 14, dtype=torch.float64)
    expanded = layer(x)
    cache = LatentCache(1, 3, 10, 9, 4, dtype=torch.float64)
    for t in range(10):
        agree(layer(x[:, t : t + 1], cache=cache), expanded[:, t : t + 1], what=f"token {t}")
        cache.advance(1)


@pytest.mark.parametrize("q_lora_rank", [None, 6])
def test_absorbed_weights_are_the_products_told_in_the_paper(agree, q_lora_rank):
    layer = make(q_lora_rank, rope_scaling=YARN)
    down, query, out = layer.absorb()
    up = (layer.q_b if q_lora_rank else layer.q).weight.view(3, 9, -1)
    w_uk, w_uv = layer.kv_b.weight.view(3, 12, 9).split([5, 7], 1)
    x, c_q, z = (torch.randn(n, dtype=torch.float64) for n in (14, up.shape[-1], 3 * 9))
    rows = ([layer.q_a.weight @ x] if q_lora_rank else []) + [layer.kv_a.weight @ x]
    agree(down @ x, torch.cat(rows), what="down")
    q = [torch.cat((w_uk[h].t() @ (up[h, :5] @ c_q), up[h, 5:] @ c_q)) * layer.scale for h in range(3)]
    agree(query @ c_q, torch.cat(q), what="query")
    o = torch.cat([w_uv[h] @ z.view(3, 9)[h] for h in range(3)])
    agree(out @ z, layer.o.weight @ o, what="out")
    assert not any(w.requires_grad for w in (down, query, out))


def test_products_of_half_precision_weights_are_made_in_fp32(agree):
    layer = make(dtype=torch.bfloat16)
    exact = make(dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    for half, wide in zip(layer.absorb(), exact.absorb()):
        assert half.dtype == torch.bfloat16
        assert (half.double() - wide).abs().le(wide.abs() * 2**-8 + 1e-6).all()  # rounded once


def test_weights_are_absorbed_once_a_cache_and_anew_for_the_next(agree, monkeypatch):
    layer, made, real = make(), [], MLA.absorb
    monkeypatch.setattr(MLA, "absorb", lambda self: made.append(self) or real(self))
    x = torch.randn(1, 4, 14, dtype=torch.float64)

    def decoded():
        cache = LatentCache(1, 1, 4, 9, 4, dtype=torch.float64)
        steps = []
        for t in range(4):
            steps.append(layer(x[:, t : t + 1], cache=cache))
            cache.advance(1)
        return torch.cat(steps, 1)

    agree(decoded(), layer(x))
    assert len(made) == 1
    for p in layer.parameters():
        p.data.mul_(-1.3)
    agree(decoded(), layer(x))
    assert len(made) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_one_product_rotates_as_the_definition_does_and_follows_the_positions(agree, dtype):
    cache = LatentCache(1, 2, 9, 9, 4, dtype=dtype)
    rotary, rope = Rotary(4, 100.0), torch.randn(2, 3, 5, 4, dtype=dtype)
    for positions in (torch.tensor([[3, 4, 5], [0, 1, 2]]), torch.tensor([[7, 7, 7]]), torch.tensor([[1, 0, 2]])):
        angles = rotary(positions)
        agree(attention._turned(rope, *angles, cache).to(dtype), rotate(rope, *angles))
        made = cache.turn[1]
        attention._turned(rope, *angles, cache)
        assert cache.turn[1] is made  # by the first layer for all
    one = rope[:1, :1]
    agree(
        attention._turned(one, *rotary(torch.tensor([[6]])), cache).to(dtype), rotate(one, *rotary(torch.tensor([[6]])))
    )
    assert cache.turn[1].shape == (4, 4)


@pytest.mark.parametrize("pieces", [(4, 3, 2, 1), (1, 9), (7, 1, 2)])
def test_chunks_over_a_filled_cache_equal_one_pass(agree, pieces):
    layer = make()
    x = torch.randn(2, 10, 14, dtype=torch.float64)
    expanded, cache, start = layer(x), LatentCache(1, 2, 10, 9, 4, dtype=torch.float64), 0
    for piece in pieces:
        agree(layer(x[:, start : start + piece], cache=cache), expanded[:, start : start + piece])
        cache.advance(piece)
        start += piece


def test_a_cache_cut_and_reordered_between_steps_goes_on_as_if_it_had_been_so(agree):
    layer = make()
    x = torch.randn(3, 6, 14, dtype=torch.float64)
    cache = LatentCache(1, 3, 8, 9, 4, dtype=torch.float64)
    layer(x[:, :3], cache=cache)
    cache.advance(3)
    layer(torch.randn(3, 2, 14, dtype=torch.float64), cache=cache)  # drafts, of which one row keeps one
    cache.advance(2)
    cache.truncate(torch.tensor([3, 4, 3]))
    cache.keep(torch.tensor([2, 0]))
    for t in range(3, 6):
        agree(layer(x[[2, 0], t : t + 1], cache=cache), layer(x[[2, 0]])[:, t : t + 1])
        cache.advance(1)


def test_ragged_caches_give_each_sequence_its_own_past(agree):
    layer = make()
    lengths = torch.tensor([2, 5, 1])
    prompts = torch.randn(3, 5, 14, dtype=torch.float64)
    later = torch.randn(3, 4, 14, dtype=torch.float64)
    cache = LatentCache(1, 3, 9, 9, 4, dtype=torch.float64)
    layer(prompts, cache=cache)  # rows past a sequence's length are padding
    cache.advance(lengths)
    first = layer(later[:, :1], cache=cache)
    cache.advance(1)
    rest = layer(later[:, 1:], cache=cache)  # several tokens over ragged pasts
    for row, length in enumerate(lengths.tolist()):
        alone = layer(torch.cat((prompts[row, :length], later[row]))[None])[0, length:]
        agree(torch.cat((first[row], rest[row])), alone)


def test_packed_segments_equal_separate_sequences(agree):
    layer = make()
    x = torch.randn(1, 9, 14, dtype=torch.float64)
    segments = torch.tensor([[0, 0, 0, 0, 3, 3, 7, 7, 7]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    packed = layer(x, positions=positions, segment_ids=segments)
    agree(packed, torch.cat([layer(x[:, a:b]) for a, b in ((0, 4), (4, 6), (6, 9))], 1))
    running = layer(x, segment_ids=segments)  # running positions give the same scores, up to the fp32 tables
    agree(running, packed, 1e-5)


@pytest.mark.skipif(library.status() != "", reason=library.status())
@pytest.mark.parametrize("q_lora_rank, packed", [(None, True), (6, False)])
def test_the_native_path_gives_the_composed_forms_output_gradients_and_cache(agree, ops_path, q_lora_rank, packed):
    layer = make(q_lora_rank, torch.float32, rope_scaling=YARN)
    x, upstream = torch.randn(2, 70, 14, requires_grad=True), torch.randn(2, 70, 14)
    segments = torch.sort(torch.randint(0, 4, (2, 70)), -1).values if packed else None
    inputs, found = [x, *layer.parameters()], []
    for path in ("native", "torch"):
        ops_path(path)
        cache = LatentCache(1, 2, 80, 9, 4, dtype=torch.float32)
        y = layer(x, segment_ids=segments)
        assert torch.equal(layer(x.detach(), segment_ids=segments, cache=cache), y)  # prefill
        latents = cache.c_kv[0][:, :70], cache.k_rope[0][:, :70]
        found.append([y, *latents, *torch.autograd.grad(y, inputs, upstream)])
    for a, e in zip(*found):
        agree(a, e, 3e-5)


def test_a_later_token_changes_no_earlier_output():
    layer = make()
    x = torch.randn(1, 7, 14, dtype=torch.float64)
    changed = x.clone()
    changed[0, 4] += 1
    difference = (layer(changed) - layer(x)).abs().amax(-1)[0]
    assert difference[:4].lt(1e-12).all() and difference[4:].gt(1e-9).all()


def test_only_the_latent_is_normalised_and_the_rotary_key_is_shared(agree):
    layer = make()
    cache = LatentCache(1, 1, 4, 9, 4, dtype=torch.float64)
    x = torch.randn(1, 4, 14, dtype=torch.float64)
    layer(x, cache=cache)
    down = x @ layer.kv_a.weight.t()
    latent = down[..., :9]
    latent = latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.kv_a_norm.weight
    agree(cache.c_kv[0], latent)
    agree(cache.k_rope[0][:, 0], down[:, 0, 9:], 1e-7)  # position 0 turns nothing
    assert cache.k_rope[0].shape == (1, 4, 4)  # one key, no heads
    assert Rotary(4).frequency == layer.rotary.frequency


@pytest.mark.parametrize("time", [0, 1])
def test_nothing_and_one_token(time):
    layer = make()
    x = torch.randn(2, time, 14, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def test_half_precision_stays_near_float(agree):
    layer = make(dtype=torch.float32)
    x = torch.randn(2, 8, 14)
    exact = layer(x)
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    agree(half, exact, 0.1)


def test_odd_rotary_width_is_refused():
    with pytest.raises(UserError, match="qk_rope_head_dim=5 must be even"):
        make(qk_rope_head_dim=5)
