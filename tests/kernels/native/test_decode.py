"""The native step of decoding against the whole model in float64: by every level, dtype, batch and shape.

The float64 model reads prompt and new tokens in one expanded forward pass, with the step's own expert choices replayed.
"""

import random
from ctypes import c_int64

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from moe.kernels.native import library
from moe.layers.cache import LatentCache
from moe.model import Transformer

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())
decoding = pytest.importorskip("moe.inference.decoding")
native = pytest.importorskip("moe.inference.native")

F32, BF16 = torch.float32, torch.bfloat16
LEVELS = library.levels() if not library.status() else []
YARN = dict(type="yarn", factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
WHOLE = dict(  # whole vectors, and half of one
    hidden_size=64, kv_lora_rank=32, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    num_attention_heads=8, moe_intermediate_size=48, intermediate_size=80,
)  # fmt: skip
SHAPES = {
    "v3": dict(),
    "whole vectors": WHOLE,
    "full-rank queries": dict(q_lora_rank=None),
    "no groups": dict(n_group=1, topk_group=1),
    "softmax": dict(scoring_func="softmax", n_group=1, topk_group=1, norm_topk_prob=False),
    "softmax, groups": dict(scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=2.5),
    "no shared expert, tied": dict(n_shared_experts=0, first_k_dense_replace=0, tie_word_embeddings=True),
    "two shared experts": dict(n_shared_experts=2),
    "dense": dict(first_k_dense_replace=3),
    "yarn": dict(rope_scaling=YARN),
    "odd": dict(
        hidden_size=17, q_lora_rank=9, kv_lora_rank=11, qk_nope_head_dim=3, v_head_dim=7, num_attention_heads=3
    ),
    "many heads": dict(num_attention_heads=19),
}


@pytest.fixture(params=LEVELS)
def level(request):
    before = library.level()
    library.use_level(request.param)
    yield request.param
    library.use_level(before)


def model_of(config, dtype):
    model = Transformer(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("router.bias"):
                p.normal_(0, 0.1)
            elif p.ndim == 1:
                p.uniform_(0.5, 1.5)
    return model


class Trial:
    """Prompts prefilled by PyTorch, then steps of given tokens; everything that a step leaves, kept."""

    def __init__(self, model, batch, prompt, threads=1):
        self.model, c = model, model.config
        self.cache = LatentCache.for_model(c, batch, prompt + 12, dtype=model.embed.weight.dtype)
        lengths = torch.randint(1, prompt + 1, (batch,))
        lengths[0] = prompt
        ids = torch.randint(0, c.vocab_size, (batch, prompt))
        mask = torch.arange(prompt) < lengths.unsqueeze(1)
        with torch.no_grad():
            routings = model.encode(ids, mask=mask, cache=self.cache)[1]
        self.cache.advance(lengths)
        self.texts = [row[:n].tolist() for row, n in zip(ids, lengths)]
        self.chosen = {name: [r.experts[i, :n] for i, n in enumerate(lengths)] for name, r in routings.items()}
        self.logits = [[] for _ in range(batch)]
        self.step = native.Stepper(model, self.cache, keep_experts=True)
        self.step.args.threads = threads

    def take(self, time):
        batch = len(self.texts)
        new = torch.randint(0, self.model.config.vocab_size, (batch, time))
        out = self.step(new.flatten().tolist())
        self.cache.advance(time)
        for i in range(batch):
            self.texts[i] += new[i].tolist()
            self.logits[i].append(out.logits.view(batch, time, -1)[i].clone())
            for name, ids in out.experts.items():
                self.chosen[name][i] = torch.cat((self.chosen[name][i], ids[i].long()))
        return out

    def agrees(self, agree, exact, what, loose=1.0):
        """The logits of all steps are those of the float64 model: in bf16 by their largest and their typical error."""
        longest = max(map(len, self.texts))
        texts = torch.tensor(
            [text + [0] * (longest - len(text)) for text in self.texts]
        )  # nobody sees what comes later
        replay = {name: pad_sequence(rows, batch_first=True) for name, rows in self.chosen.items()}
        with torch.no_grad():
            full = exact(texts, routings=replay).logits
        found = [torch.cat(steps) for steps in self.logits]
        right = torch.cat(
            [full[i, len(text) - len(f) : len(text)] for i, (text, f) in enumerate(zip(self.texts, found))]
        )
        bf16 = self.model.embed.weight.dtype is BF16
        agree(torch.cat(found), right, loose * (1e-1 if bf16 else 1e-5), what, scale=1.0)
        assert not bf16 or (torch.cat(found) - right).norm() < loose * 4e-2 * right.norm(), what


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_step_is_the_full_forward_in_float64(small, agree, level, dtype, shape):
    model = model_of(small(num_nextn_predict_layers=0, **SHAPES[shape]), dtype)
    exact = Transformer(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    for batch, prompt, times in ((1, 5, (1, 3)), (9, 3, (1,))):
        trial = Trial(model, batch, prompt)
        for time in times:
            out = trial.take(time)
        trial.agrees(agree, exact, f"{batch} x {times}")
        if dtype is F32:
            logits = out.logits.double()
            assert out.drawn == logits.argmax(-1).tolist()
            found = torch.tensor(out.logprobs, dtype=torch.float64)
            agree(found, logits.log_softmax(-1).amax(-1), 1e-6, scale=1.0)
            agree(out.hidden @ model.head.weight.T, out.logits, 1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_long_contexts_go_through_several_ranges_of_keys(small, agree, level, dtype):
    std = 0.4 if dtype is F32 else 0.2
    model = model_of(small(num_nextn_predict_layers=0, initializer_range=std, max_position_embeddings=1000), dtype)
    exact = Transformer(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    for prompt, time in ((478, 1), (479, 3), (970, 2)):  # around the edge of 480, and past two
        trial = Trial(model, 2, prompt)
        trial.take(time)
        trial.take(1)
        trial.agrees(agree, exact, f"{prompt} + {time}", 1.0 if dtype is BF16 else 5.0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_random_shapes(small, agree, level, dtype):
    for _ in range(4):  # no norm of a few numbers, which cancel now and then
        groups, size = random.choice([(1, 5), (2, 3), (4, 2), (3, 9)])
        kept = random.randint(1, groups)
        shape = dict(
            hidden_size=random.randint(9, 70), q_lora_rank=random.choice([None, random.randint(9, 40)]),
            kv_lora_rank=random.randint(9, 40), qk_nope_head_dim=random.randint(1, 20), v_head_dim=random.randint(1, 20),
            qk_rope_head_dim=2 * random.randint(1, 10), num_attention_heads=random.choice([1, 2, 5, 8, 9, 16, 17]),
            intermediate_size=random.randint(1, 70), moe_intermediate_size=random.randint(1, 40),
            n_shared_experts=random.randint(0, 2), n_routed_experts=groups * size, n_group=groups, topk_group=kept,
            num_experts_per_tok=random.randint(2, kept * size), vocab_size=random.randint(20, 50),
        )  # fmt: skip
        model = model_of(small(num_nextn_predict_layers=0, **shape), dtype)
        exact = Transformer(model.config).double().eval()
        exact.load_state_dict(model.state_dict())
        trial = Trial(model, random.choice([1, 2, 6, 7, 8, 17, 35]), random.randint(1, 6))
        trial.take(random.randint(1, 3))
        trial.agrees(agree, exact, str(shape), 2.0 if dtype is BF16 else 4.0)


def test_choices_are_those_of_the_router_and_latents_those_of_attention(small, agree, level):
    for change in (dict(), dict(n_group=1, topk_group=1), dict(scoring_func="softmax", norm_topk_prob=False)):
        model = model_of(small(num_nextn_predict_layers=0, **change), F32)
        trial = Trial(model, 5, 4)
        other = LatentCache.for_model(model.config, 5, 16)
        other.latents, other.lengths = [x.clone() for x in trial.cache.latents], trial.cache.lengths
        other._count(other.lengths)
        start = [len(text) for text in trial.texts]
        out = trial.take(2)
        new = torch.tensor([text[n:] for text, n in zip(trial.texts, start)])
        with torch.no_grad():
            hidden, routings = model.encode(new, cache=other)
        agree(out.hidden.view(hidden.shape), hidden)
        for name, routing in routings.items():
            assert torch.equal(out.experts[name].long(), routing.experts)  # best first, as the router has them
        for mine, theirs in zip(trial.cache.latents, other.latents):
            agree(mine, theirs)


TEAMS = [  # enough work for more than one thread
    (WHOLE | dict(hidden_size=512), 1, 1), (WHOLE, 3, 2), (WHOLE, 40, 1), (dict(), 200, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(small, level, dtype, seed):
    for change, batch, time in TEAMS:
        model = model_of(small(num_nextn_predict_layers=0, **change), dtype)
        found = []
        for threads in (1, 2):
            torch.manual_seed(seed)
            trial = Trial(model, batch, 9, threads)
            out = trial.take(time)
            found.append((out.logits.clone(), out.hidden.clone(), out.logprobs, *trial.cache.latents))
        for other in found[1:]:
            assert found[0][2] == other[2]
            assert all(torch.equal(a, b) for a, b in zip(found[0], other) if isinstance(a, torch.Tensor))


PLACES = [
    "embed.weight", "layers.1.attn_norm.weight", "layers.0.attn.q_a.weight", "layers.1.attn.kv_b.weight",
    "layers.2.attn.o.weight", "layers.1.ffn.router.weight", "layers.1.ffn.shared.w13.weight", "norm.weight", "head.weight",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_weight_that_is_not_a_number_shows(small, level, place):
    model = model_of(small(num_nextn_predict_layers=0), F32)
    trial = Trial(model, 2, 3)
    model.get_parameter(place).data.view(-1)[3:40] = float("nan")
    assert all(x != x for x in Trial.take(trial, 1).logprobs[:1]) or place == "embed.weight"
    model.get_parameter(place).data.fill_(float("nan"))
    assert all(x != x for x in Trial.take(trial, 1).logprobs)


def test_ties_go_to_the_lowest_id(small, level):
    model = model_of(small(num_nextn_predict_layers=0), F32)
    model.head.weight.data[:] = model.head.weight.data[:1]
    model.layers[1].ffn.router.weight.data.zero_()
    model.layers[1].ffn.router.bias.data.zero_()
    out = Trial(model, 3, 4).take(1)
    assert out.drawn == [0] * 3
    assert out.experts["layers.1"].tolist() == [[[0, 1, 2]]] * 3  # of groups 0 and 1


@pytest.mark.parametrize("vocab", [2, 16, 37, 300])
@pytest.mark.parametrize("temperature", [0.02, 0.7, 1.0, 4.0])
def test_draws_are_those_of_the_pytorch_path(small, level, vocab, temperature, seed):
    model = model_of(small(num_nextn_predict_layers=0, vocab_size=vocab, initializer_range=0.5), F32)
    trial, keys = Trial(model, 40, 2), decoding.stream_keys(seed, 40)
    for number in (1, 2, 1000):
        sampling = decoding.Sampling(temperature, 1.0, keys)
        out = trial.step([0] * 40, sampling, number)
        trial.cache.advance(1)
        drawn, logp = decoding._sample(out.logits, sampling, number)
        rounding = 1e-6 / min(temperature, 1)  # of logits over temperature: now and then one draw falls into the gap
        same = torch.tensor(out.drawn) == drawn
        assert same.sum() >= 39
        torch.testing.assert_close(torch.tensor(out.logprobs)[same], logp[same], rtol=10 * rounding, atol=10 * rounding)
    assert trial.step([0] * 40, sampling._replace(top_p=0.9)).drawn is None
    several = trial.step([1, 0, 1] * 40, sampling, 7)  # drafts: one number each
    for t in range(3):
        drawn = decoding._sample(several.logits[t::3], sampling, 7 + t)[0].tolist()
        assert sum(a == b for a, b in zip(several.drawn[t::3], drawn)) >= 39


def test_only_tokens_with_a_chance_are_drawn(small, level):
    """At both ends of what a stream gives; the keys are found by undoing the counter's mixing."""
    model = model_of(small(num_nextn_predict_layers=0), F32)
    trial = Trial(model, 2, 3)
    model.head.weight.data.zero_()
    model.head.weight.data[[5, 20]] = 300.0  # these two alone, or all but these
    keys = torch.tensor([key_of(0), key_of(2**64 - 1)])
    out = trial.step([1, 2], decoding.Sampling(1.0, 1.0, keys), 0)
    for row, token, end in zip(out.logits, out.drawn, (0, -1)):
        assert token == [i for i in range(37) if row[i] > row.amax() - 80][end]


def key_of(mixed):
    """The stream whose number 0 is splitmix64's word `mixed`, as int64."""
    z, word = mixed, 2**64

    def undone(z, bits):
        x = z
        for _ in range(64 // bits + 1):
            x = z ^ (x >> bits)
        return x

    z = undone(z, 31) * pow(0x94D049BB133111EB, -1, word) % word
    z = undone(z, 27) * pow(0xBF58476D1CE4E5B9, -1, word) % word
    z = (undone(z, 30) - 0x9E3779B97F4A7C15) % word
    return z - word if z >= word // 2 else z


def test_a_cache_without_room_and_an_unknown_id_are_refused_before_anything_is_written(small):
    from moe.kernels.native import decode

    trial = Trial(model_of(small(num_nextn_predict_layers=0), F32), 2, 3)
    trial.take(1)
    before = [x.clone() for x in trial.cache.latents]
    with pytest.raises(ValueError, match="cache of 15 tokens cannot hold 16"):
        trial.step([1] * 24)
    with pytest.raises(ValueError, match=r"an id is outside \[0, 37\)"):
        trial.step([1, 37])
    lengths = (c_int64 * 2)(3, 15)
    trial.step.args.b, trial.step.args.t, trial.step.args.lengths = 2, 1, native.addressof(lengths)
    with pytest.raises(ValueError, match="too large"):
        decode.decode_step(trial.step.args)
    assert all(torch.equal(a, b) for a, b in zip(before, trial.cache.latents))
