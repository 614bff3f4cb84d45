"""Native attention against loops and whole scores in float64: values and every gradient, by every level of this processor."""

import random
import threading

import pytest
import torch

from moe.kernels import packed, reference
from moe.kernels.native import library
from moe.layers.basics import rotate
from tests.op_cases import attention_inputs, segments_of, with_gradients

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())
native = pytest.importorskip("moe.kernels.native.attention")

F32, BF16 = torch.float32, torch.bfloat16
LEVELS = library.levels() if not library.status() else []
SIZES = [(2, 9, 3, 5, 4, 7), (1, 1, 2, 3, 2, 1), (2, 21, 1, 1, 2, 20), (1, 33, 2, 16, 8, 16)]  # B, T, H, nope, R, dv


@pytest.fixture(autouse=True)
def best_level_afterwards():
    yield
    if LEVELS:
        library.use_level("")


def latent_inputs(batch, time, heads, nope, rope, value, dtype, rows=1):
    """q, kv, k_rope, cos, sin."""
    q, kv = torch.randn(batch, time, heads, nope + rope), torch.randn(batch, time, heads, nope + value)
    angles = torch.rand(rows, time, rope // 2) * 6
    return [q.to(dtype), kv.to(dtype), torch.randn(batch, time, rope).to(dtype), angles.cos(), angles.sin()]


def plain(inputs, upstream, scale, segments=None):
    """o, dq, dk, dv."""
    o, lse = native.attention_forward(*inputs, scale, segments)
    return o, *native.attention_backward(upstream, *inputs, o, lse, scale, segments)


def latent(inputs, upstream, scale, segments=None):
    """o, dq, dkv, dk_rope."""
    o, lse = native.latent_forward(*inputs, scale, segments)
    return o, *native.latent_backward(upstream, *inputs, o, lse, scale, segments)


def whole_scores(q, k, v, scale, segments=None):
    """[T, T] scores at once, for lengths the loops are too slow for."""
    time = q.shape[1]
    seen = torch.ones(time, time, dtype=torch.bool).tril().expand(q.shape[0], -1, -1)
    if segments is not None:
        starts = packed.starts(segments, time)
        seen = seen & (starts[:, :, None] == starts[:, None, :])
    s = torch.einsum("bthd,bshd->bhts", q, k) * scale
    return torch.einsum("bhts,bshd->bthd", s.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def expanded(q, kv, k_rope, cos, sin, scale, segments=None):
    """MLA as the layer puts it together elsewhere."""
    nope, heads = q.shape[3] - k_rope.shape[2], q.shape[2]
    rotary = rotate(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, heads, -1)
    q = torch.cat((q[..., :nope], rotate(q[..., nope:], cos, sin)), -1)
    return whole_scores(q, torch.cat((kv[..., :nope], rotary), -1), kv[..., nope:], scale, segments)


def compare(agree, run, right, inputs, upstream, scale, segments, dtype, what, levels=LEVELS):
    exact = [x.double() for x in inputs]
    o, gradients = with_gradients(lambda *a: right(*a, scale, segments), exact, upstream.double(), (0, 1, 2))
    for level in levels:
        library.use_level(level)
        for i, (a, e) in enumerate(zip(run(inputs, upstream, scale, segments), (o, *gradients))):
            assert a.dtype == dtype and a.is_contiguous()
            loose = 2e-2 if dtype is BF16 else 1e-5
            agree(
                a, e, loose, f"{'o' if not i else f'gradient {i}'} of {what} by {level}", scale=1.0
            )  # short rows cancel


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_values_and_gradients_agree_with_the_loops(agree, dtype, packed):
    for batch, time, heads, nope, rope, value in SIZES:
        segments = segments_of(batch, time) if packed else None
        upstream, what = torch.randn(batch, time, heads, value).to(dtype), (batch, time, heads, nope, rope, value)
        qkv = attention_inputs(batch, time, heads, nope + rope, value, dtype)
        compare(agree, plain, reference.attention, qkv, upstream, 0.4, segments, dtype, what)
        inputs = latent_inputs(batch, time, heads, nope, rope, value, dtype, rows=batch)
        compare(agree, latent, reference.latent_attention, inputs, upstream, 0.4, segments, dtype, what)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("time", [47, 64, 65, 577, 650, 1201])
def test_rows_longer_than_blocks_agree_with_whole_scores(agree, dtype, time):
    """Blocks: 48 queries, panels of 64 keys, 576 of either before sums are rescaled or written."""
    upstream = torch.randn(1, time, 2, 9).to(dtype)
    inputs = latent_inputs(1, time, 2, 7, 4, 9, dtype)
    levels = LEVELS if time < 1000 else LEVELS[-1:]
    compare(agree, latent, expanded, inputs, upstream, 0.6, None, dtype, time, levels)
    segments = (torch.rand(1, time) < 0.02).cumsum(1)
    compare(agree, latent, expanded, inputs, upstream, 0.6, segments, dtype, f"{time} in documents", levels)


def test_random_shapes_agree_with_whole_scores(agree):
    for _ in range(25):
        batch, time, heads = random.randint(1, 3), random.choice([1, 2, 15, 16, 17, 50, 97, 130]), random.randint(1, 3)
        nope, rope, value = random.randint(1, 70), 2 * random.randint(1, 20), random.randint(1, 70)
        dtype, level = random.choice([F32, BF16]), random.choice(LEVELS)
        segments = random.choice([None, segments_of(batch, time)])
        upstream, what = torch.randn(batch, time, heads, value).to(dtype), (batch, time, heads, nope, rope, value)
        inputs = latent_inputs(batch, time, heads, nope, rope, value, dtype, random.choice([1, batch]))
        scale = (nope + rope) ** -0.5
        compare(agree, latent, expanded, inputs, upstream, scale, segments, dtype, what, [level])
        qkv = attention_inputs(batch, time, heads, nope, value, dtype)
        compare(agree, plain, whole_scores, qkv, upstream, scale, segments, dtype, what, [level])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    inputs = latent_inputs(3, 70, 5, 12, 6, 10, dtype)
    upstream, segments = torch.randn(3, 70, 5, 10).to(dtype), segments_of(3, 70)
    for level in LEVELS:
        library.use_level(level)
        found = []
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            try:
                found.append(latent(inputs, upstream, 0.3, segments))
            finally:
                torch.set_num_threads(1)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_two_callers_at_once_get_what_each_gets_alone():
    cases = [(latent_inputs(2, time, 3, 12, 6, 10, F32), torch.randn(2, time, 3, 10)) for time in (150, 90)]
    alone, together = [latent(*case, 0.3) for case in cases], [[], []]

    def work(i):
        together[i] += [latent(*cases[i], 0.3) for _ in range(10)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for expected, results in zip(alone, together):
        assert len(results) == 10
        assert all(torch.equal(a, e) for result in results for a, e in zip(result, expected))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_document_gives_the_bits_it_gives_alone(dtype):
    q, kv, k_rope, cos, sin = latent_inputs(1, 170, 2, 12, 6, 10, dtype)
    upstream = torch.randn(1, 170, 2, 10).to(dtype)
    segments = torch.full((1, 170), 7)
    segments[:, 3:100], segments[:, 100], segments[:, 101:] = -1, 7, 2  # an id that comes again is another document
    whole = latent((q, kv, k_rope, cos, sin), upstream, 0.3, segments)
    for a, b in ((0, 3), (3, 100), (100, 101), (101, 170)):
        part = latent((q[:, a:b], kv[:, a:b], k_rope[:, a:b], cos[:, a:b], sin[:, a:b]), upstream[:, a:b], 0.3)
        assert all(torch.equal(w[:, a:b], p) for w, p in zip(whole, part))


def test_views_of_any_layout_are_read_as_what_they_show():
    q, k, v = attention_inputs(2, 19, 3, 8, 5, F32)
    upstream = torch.randn(2, 19, 3, 5)
    expected = plain((q, k[:, :, :1].expand(-1, -1, 3, -1).contiguous(), v), upstream, 0.3)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    beside = torch.cat((k, v), -1)[..., 8:]
    channels_first = upstream.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    found = plain((heads_first, k[:, :, :1].expand(-1, -1, 3, -1), beside), channels_first, 0.3)
    assert all(torch.equal(a, e) for a, e in zip(found, expected))
    assert torch.equal(plain((q.mT.contiguous().mT, k, v), upstream, 0.3)[0], plain((q, k, v), upstream, 0.3)[0])

    inputs, upstream = latent_inputs(2, 19, 3, 6, 4, 5, BF16, rows=2), torch.randn(2, 19, 3, 5).to(BF16)
    expected = latent(inputs, upstream, 0.3)
    inputs[2] = torch.cat((torch.randn(2, 19, 9).to(BF16), inputs[2]), -1)[..., 9:]
    inputs[3], inputs[4] = (x.double().mT.contiguous().mT for x in inputs[3:])
    assert all(torch.equal(a, e) for a, e in zip(latent(inputs, upstream, 0.3), expected))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_logarithm_of_the_denominator_is_told(agree, dtype):
    q, k, v = attention_inputs(1, 600, 1, 6, 4, dtype)
    s = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) * 0.4
    right = s.masked_fill(torch.ones(600, 600, dtype=torch.bool).triu(1), -torch.inf).logsumexp(-1)
    for level in LEVELS:
        library.use_level(level)
        lse = native.attention_forward(q, k, v, 0.4, None)[1]
        assert lse.dtype == F32
        agree(lse, right, 1e-4 if dtype is BF16 else 1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scores_of_any_size_give_finite_numbers(agree, dtype):
    q, k, v = attention_inputs(1, 700, 1, 8, 4, dtype)
    k[:, 600:] *= 3  # the largest score comes late, after a block
    for size in (0.0, 30.0, 1e4):
        right = whole_scores(q.double() * size, k.double(), v.double(), 1.0)
        for level in LEVELS:
            library.use_level(level)
            o, *gradients = plain((q, k, v), torch.randn_like(v), size)
            agree(o, right, 2e-2 if dtype is BF16 else 1e-5 + 1e-6 * size)
            assert all(g.isfinite().all() for g in gradients)


def test_no_position_hears_of_later_ones_and_nan_is_not_lost():
    for level in LEVELS:
        library.use_level(level)
        q, k, v = attention_inputs(1, 150, 2, 8, 6, BF16)
        before = native.attention_forward(q, k, v, 0.4, None)[0]
        late = [x.clone() for x in (q, k, v)]
        for x in late:
            x[:, 100:] = 9.0
        assert torch.equal(native.attention_forward(*late, 0.4, None)[0][:, :100], before[:, :100])
        late[0][:, 120, 1, 3] = float("nan")
        o, lse = native.attention_forward(*late, 0.4, None)
        expected = torch.zeros(1, 150, 2, dtype=torch.bool)
        expected[:, 120, 1] = True
        assert torch.equal(o.isnan().all(-1), expected) and torch.equal(o.isnan().any(-1), expected)
        dq, dk, dv = native.attention_backward(torch.ones_like(o), *late, o, lse, 0.4, None)
        assert dq[:, 120, 1].isnan().all() and dk[:, :121, 1].isnan().all() and dv[:, :121, 1].isnan().all()
        assert all(g[:, :, 0].isfinite().all() for g in (dq, dk, dv))


@pytest.mark.parametrize("batch, time", [(2, 0), (0, 3)])
def test_nothing_gives_nothing(batch, time):
    o, dq, dkv, dk_rope = latent(latent_inputs(batch, time, 2, 4, 2, 3, F32), torch.randn(batch, time, 2, 3), 0.3)
    assert o.shape == (batch, time, 2, 3) and dq.shape == (batch, time, 2, 6) and dk_rope.shape == (batch, time, 2)


def test_tensors_of_several_dtypes_are_refused():
    q, k, v = attention_inputs(1, 3, 1, 4, 4, F32)
    with pytest.raises(ValueError, match="queries are torch.float32"):
        native.attention_forward(q, k.bfloat16(), v, 0.3, None)
    inputs = latent_inputs(1, 3, 1, 4, 2, 4, F32)
    with pytest.raises(ValueError, match="convert them"):
        native.latent_forward(*inputs[:2], inputs[2].bfloat16(), *inputs[3:], 0.3, None)
