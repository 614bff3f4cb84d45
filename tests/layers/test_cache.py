"""The latent cache: what it weighs, what it stores where, and how it grows, shrinks and refuses."""

import pytest
import torch

from moe.layers.cache import LatentCache


def write(cache, layer, batch, time, value):
    return cache.write(layer, torch.full((batch, time, 3), value), torch.full((batch, time, 2), -value))


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_cache_weighs_latent_and_rotary_key_of_each_token_and_layer(dtype, size):
    cache = LatentCache(layers=5, batch=3, capacity=11, kv_lora_rank=16, qk_rope_head_dim=4, dtype=dtype)
    assert cache.nbytes == (16 + 4) * size * 5 * 3 * 11


def test_cache_of_v3_weighs_70_kilobytes_a_token():
    from moe.config import ModelConfig

    cache = LatentCache.for_model(ModelConfig.preset("v3-671b"), 1, 2, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * 70272  # 35,136 numbers: DeepSeek-V2 table 1


def test_ragged_writes_land_at_each_sequences_end():
    cache = LatentCache(2, 2, 6, 3, 2)
    write(cache, 1, 2, 3, 1.0)
    assert cache.longest == 0 and cache.lengths.tolist() == [0, 0]  # only advance counts
    cache.advance(torch.tensor([1, 3]))
    assert cache.positions(2).tolist() == [[1, 2], [3, 4]]
    c, k = write(cache, 1, 2, 2, 5.0)
    assert c.shape == (2, 5, 3) and k.shape == (2, 5, 2)
    assert c[0, :, 0].tolist() == [1, 5, 5, 0, 0] and c[1, :, 0].tolist() == [1, 1, 1, 5, 5]
    assert k[0, :, 0].tolist() == [-1, -5, -5, 0, 0]
    assert cache.c_kv[0].eq(0).all()  # the other layer is untouched


def test_latent_and_rotary_key_of_a_token_lie_side_by_side_and_are_written_in_place():
    cache = LatentCache(2, 2, 6, 3, 2)
    at = [latents.data_ptr() for latents in cache.latents]
    write(cache, 0, 2, 4, 1.0)
    cache.advance(4)
    c, k = write(cache, 0, 2, 1, 2.0)
    assert [latents.data_ptr() for latents in cache.latents] == at == [c.data_ptr(), cache.latents[1].data_ptr()]
    assert torch.equal(cache.seen(0, 1), torch.cat((c, k), -1)) and cache.seen(0, 1).shape == (2, 5, 5)
    assert cache.latents[0][0, 4].tolist() == [2, 2, 2, -2, -2]


@pytest.mark.parametrize("lengths", [[2, 2], [1, 3]], ids=["even", "ragged"])
def test_appending_a_whole_row_is_writing_its_two_parts(lengths):
    parts, whole = LatentCache(1, 2, 6, 3, 2), LatentCache(1, 2, 6, 3, 2)
    for cache in (parts, whole):
        cache.advance(torch.tensor(lengths))
    new = torch.randn(2, 2, 5)
    parts.write(0, new[..., :3], new[..., 3:])
    whole.append(0, new)
    assert torch.equal(parts.latents[0], whole.latents[0]) and whole.latents[0].count_nonzero() == 20


@pytest.mark.parametrize("lengths, time", [([3, 3], 2), ([1, 3], 1), ([0, 2], 3), ([2, 2], 1)])
def test_keys_that_come_later_are_hidden_from_each_query(lengths, time):
    cache = LatentCache(1, 2, 9, 3, 2)
    cache.advance(torch.tensor(lengths))
    hidden = cache.later(time)
    expected = [
        [[-torch.inf if key > length + t else 0.0 for key in range(max(lengths) + time)] for t in range(time)]
        for length in lengths
    ]
    if lengths == [2, 2] and time == 1:
        assert hidden is None  # nobody has anything to hide
    else:
        assert hidden.tolist() == expected
        assert cache.later(time) is hidden  # made once for all layers
        cache.advance(1)
        assert cache.later(time) is None or cache.later(time).shape[2] == hidden.shape[2] + 1


def test_cache_refuses_more_than_it_holds():
    cache = LatentCache(1, 1, 4, 3, 2)
    write(cache, 0, 1, 3, 1.0)
    cache.advance(3)
    with pytest.raises(ValueError, match="cache of 4 tokens cannot hold 5"):
        write(cache, 0, 1, 2, 1.0)
    write(cache, 0, 1, 1, 2.0)
    assert cache.c_kv[0][0, :, 0].tolist() == [1, 1, 1, 2]


def test_truncated_tokens_are_written_over():
    cache = LatentCache(1, 2, 4, 3, 2)
    write(cache, 0, 2, 4, 1.0)
    cache.advance(torch.tensor([4, 2]))
    cache.truncate(torch.tensor([3, 9]))
    assert cache.lengths.tolist() == [3, 2] and (cache.longest, cache.shortest) == (3, 2)
    c, _ = write(cache, 0, 2, 1, 7.0)
    assert c[0, :, 0].tolist() == [1, 1, 1, 7] and c[1, :, 0].tolist() == [1, 1, 7, 1]


def test_kept_rows_keep_their_past_in_the_order_asked():
    cache = LatentCache(2, 3, 4, 3, 2)
    for layer in range(2):
        cache.c_kv[layer][:, 0, 0] = torch.tensor([10.0, 20.0, 30.0]) + layer
    cache.advance(torch.tensor([1, 3, 2]))
    cache.keep(torch.tensor([2, 0]))
    assert cache.lengths.tolist() == [2, 1] and cache.longest == 2
    assert cache.c_kv[1][:, 0, 0].tolist() == [31, 11]
    assert cache.nbytes == (3 + 2) * 4 * 2 * 2 * 4
    cache.keep(torch.tensor([], dtype=torch.int64))
    assert cache.longest == 0


def test_cache_remembers_no_graph():
    cache = LatentCache(1, 1, 2, 3, 2)
    cache.write(0, torch.ones(1, 1, 3, requires_grad=True) * 2, torch.ones(1, 1, 2))
    assert not cache.c_kv[0].requires_grad
