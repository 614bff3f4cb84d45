"""MLA's core as one op against loops in float64, under compilers, and inside the layer against the composed path."""

import pytest
import torch

from moe import MLA, LatentCache, ops
from moe.kernels import reference
from moe.kernels.native import library
from moe.layers.basics import Rotary
from tests.op_cases import segments_of, with_gradients

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())
F32, BF16 = torch.float32, torch.bfloat16


def latent_inputs(batch, time, heads, nope, rope, value, dtype, rows=1):
    q, kv = torch.randn(batch, time, heads, nope + rope), torch.randn(batch, time, heads, nope + value)
    k_rope = torch.randn(batch, time, rope)
    positions = torch.stack([torch.arange(time) + 3 * row for row in range(rows)])
    return [x.to(dtype) for x in (q, kv, k_rope)] + [*Rotary(rope)(positions)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows, packed", [(1, False), (2, True)])
def test_it_agrees_with_the_loops_in_value_and_every_gradient(agree, dtype, rows, packed):
    inputs = latent_inputs(2, 21, 3, 5, 4, 7, dtype, rows)
    segments = segments_of(2, 21) if packed else None
    upstream = torch.randn(2, 21, 3, 7).to(dtype)
    o, gradients = with_gradients(lambda *a: ops.latent_attention(*a, 0.3, segments), inputs, upstream, (0, 1, 2))
    exact = [x.double() for x in inputs]
    e, expected = with_gradients(
        lambda *a: reference.latent_attention(*a, 0.3, segments), exact, upstream.double(), (0, 1, 2)
    )
    assert o.dtype == dtype
    agree(o, e)
    for name, a, b in zip(("q", "kv", "k_rope"), gradients, expected):
        agree(a, b, 3e-2 if dtype is BF16 else None, name)


def test_the_op_is_well_formed_for_autograd_and_compilers():
    q, kv, k_rope, cos, sin = latent_inputs(2, 6, 2, 4, 2, 3, F32)
    leaves = [x.requires_grad_() for x in (q, kv, k_rope)]
    for segments in (None, segments_of(2, 6)):
        torch.library.opcheck(torch.ops.moe.latent_attention_native.default, (*leaves, cos, sin, 0.3, segments))
        torch.library.opcheck(torch.ops.moe.attention_native.default, (kv, kv, kv, 0.3, segments))
        plain = [x.detach() for x in leaves]
        kept = *plain, cos, sin, *torch.ops.moe.latent_attention_native.default(*plain, cos, sin, 0.3, segments)
        upstream = torch.randn_like(kept[-2])
        torch.library.opcheck(torch.ops.moe.latent_attention_native_backward.default, (upstream, *kept, 0.3, segments))
        kept = *plain[1:2] * 3, *torch.ops.moe.attention_native.default(*plain[1:2] * 3, 0.3, segments)
        upstream = torch.randn_like(kept[-2])
        torch.library.opcheck(torch.ops.moe.attention_native_backward.default, (upstream, *kept, 0.3, segments))


def test_a_compiled_layer_holds_one_node_of_it_and_gives_the_same(agree, ops_path):
    from torch._dynamo.testing import CompileCounter  # loads the compiler

    ops_path("native")
    layer = MLA(24, 3, 10, 12, 6, 4, 5)
    x, upstream = torch.randn(2, 20, 24), torch.randn(2, 20, 24)
    nodes = []

    class Counter(CompileCounter):
        def __call__(self, graph, inputs):
            nodes.extend(str(node.target) for node in graph.graph.nodes)
            return super().__call__(graph, inputs)

    torch.compile(layer, backend=Counter(), fullgraph=True)(x)
    assert sum("latent_attention_native" in name for name in nodes) == 1
    eager = with_gradients(layer, (x,), upstream, (0,))
    compiled = with_gradients(torch.compile(layer, backend="aot_eager", fullgraph=True), (x,), upstream, (0,))
    agree(compiled[0], eager[0])
    agree(compiled[1][0], eager[1][0])


@pytest.mark.parametrize("q_lora_rank", [None, 10])
def test_the_layer_gives_what_its_composed_form_gives(agree, ops_path, q_lora_rank):
    layer = MLA(24, 3, q_lora_rank, 12, 6, 4, 5, rope_scaling=dict(
        type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0))  # fmt: skip
    x, segments, upstream = torch.randn(2, 40, 24), segments_of(2, 40), torch.randn(2, 40, 24)
    found = []
    for path in ("native", "torch"):
        ops_path(path)
        cache = LatentCache(1, 2, 50, 12, 4)
        y, gradients = with_gradients(lambda x: layer(x, segment_ids=segments), (x,), upstream, (0,))
        layer(x, cache=cache)
        found.append((y, *gradients, cache.latents[0][:, :40]))
    for a, e in zip(*found):
        agree(a, e)


def test_shapes_that_do_not_fit_are_one_line():
    q, kv, k_rope, cos, sin = latent_inputs(2, 6, 2, 4, 2, 3, F32)
    for wrong in (
        dict(kv=kv[:, :5]),
        dict(k_rope=k_rope[:1]),
        dict(cos=cos[:, :5], sin=sin[:, :5]),
        dict(sin=sin[:, :3]),
    ):
        given = dict(q=q, kv=kv, k_rope=k_rope, cos=cos, sin=sin) | wrong
        with pytest.raises(ValueError, match="latent_attention: ") as caught:
            ops.latent_attention(*given.values(), 0.3)
        assert "\n" not in str(caught.value)
