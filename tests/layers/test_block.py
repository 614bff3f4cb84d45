"""A pre-norm block is its parts, dense or MoE."""

import pytest
import torch

from moe import Block
from moe.config import UserError


@pytest.mark.parametrize("layer, dense", [(0, True), (1, False), (3, False)])
def test_block_adds_attention_then_feed_forward_each_behind_its_norm(small, agree, layer, dense):
    block = Block(small(), layer).double()
    for name, p in block.named_parameters():
        if "norm" in name:
            p.data.normal_(1, 0.3)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    mask = torch.rand(2, 6) < 0.8
    y, routing = block(x, segment_ids=segments, mask=mask)
    middle = x + block.attn(block.attn_norm(x), segment_ids=segments)
    if dense:
        assert routing is None
        agree(y, middle + block.ffn(block.ffn_norm(middle)))
    else:
        out, expected = block.ffn(block.ffn_norm(middle), mask=mask)
        agree(y, middle + out)
        assert torch.equal(routing.experts, expected.experts) and routing.experts[~mask].eq(8).all()


def test_a_model_without_experts_is_dense_everywhere(small):
    assert Block(small(n_routed_experts=0), 2)(torch.randn(1, 3, 24))[1] is None


def test_an_unknown_attention_is_named(small):
    with pytest.raises(UserError, match="model.attention='mal' is not one of .*did you mean 'mla'"):
        Block(small(attention="mal"), 0)
