"""Generation against the full forward pass and transformers: greedy, ragged, sampled, stopped, scored, recorded, refused."""

import pytest
import torch

import moe
from moe.config import UserError
from moe.inference import decoding
from moe.inference.decoding import Sampling, stream_keys, uniform
from moe.layers.cache import LatentCache

YARN = dict(type="yarn", factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)


@pytest.fixture
def model(small):
    return moe.Transformer(small(initializer_range=0.4)).double()


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [35, 8, 9, 7, 9, 3, 2, 3]]


SHAPES = {
    "v3": dict(),
    "full-rank queries": dict(q_lora_rank=None),
    "yarn": dict(rope_scaling=YARN),
    "no groups": dict(n_group=1, topk_group=1),
    "softmax router": dict(scoring_func="softmax", n_group=1, topk_group=1, norm_topk_prob=False),
    "all layers MoE, tied": dict(first_k_dense_replace=0, n_shared_experts=0, tie_word_embeddings=True),
    "dense": dict(first_k_dense_replace=3),
}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_is_the_one_the_full_forward_would_draw(small, shape, temperature):
    model = moe.Transformer(small(initializer_range=0.4, num_nextn_predict_layers=0, **SHAPES[shape])).double()
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            buffer.normal_(0, 0.1)
    out = moe.generate(model, PROMPTS, 9, temperature, seed=11)
    keys = stream_keys(11, len(PROMPTS))
    model.eval()
    for i, prompt in enumerate(PROMPTS):
        row = list(prompt)
        for step in range(9):
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0, -1]
            p = (logits / (temperature or 1)).softmax(-1)
            u = float(uniform(keys[i : i + 1], step))
            token = int((p.cumsum(0) > u).nonzero()[0]) if temperature else int(logits.argmax())
            assert out.tokens[i][step] == token
            assert out.logprobs[i][step] == pytest.approx(float(p[token].log()), abs=1e-5)
            row.append(token)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_greedy_is_that_of_transformers_on_the_export_left_padded_batch_included(small, tmp_path, experts):
    transformers = pytest.importorskip("transformers")
    model = moe.Transformer(small(initializer_range=0.4, num_nextn_predict_layers=0, moe_intermediate_size=8))
    moe.to_hf(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=experts).eval()
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    theirs = peer.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, longest:]
    assert moe.generate(model, PROMPTS, 8).tokens == theirs.tolist()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize(
    "prompts", [PROMPTS, PROMPTS[:1], [[5]], [[7, 2], [1, 1]]], ids=["ragged", "one", "token", "even"]
)
def test_logprobs_are_those_of_one_pass_over_the_whole_text(small, prompts, dtype, tolerance):
    model = moe.Transformer(small(initializer_range=0.2)).to(dtype)
    out = moe.generate(model, prompts, 12, temperature=1.0, seed=4, keep_routings=True)
    model.eval()
    for i, (prompt, tokens, logprobs) in enumerate(zip(prompts, out.tokens, out.logprobs, strict=True)):
        text = torch.tensor([prompt + tokens])
        choices = {name: chosen[i : i + 1, : text.shape[1]] for name, chosen in out.routings.items()}
        with torch.no_grad():  # replayed: where two experts tie within the rounding, either is right
            logp = model(text, routings=choices).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        assert logprobs == pytest.approx(logp.gather(1, text[0, len(prompt) :, None])[:, 0].tolist(), abs=tolerance)


def test_weights_changed_between_two_calls_are_seen(small):
    changed = small(initializer_range=0.4, num_nextn_predict_layers=0)
    model, fresh = moe.Transformer(changed), moe.Transformer(changed)
    before = moe.generate(model, PROMPTS, 6)
    model.load_state_dict(fresh.state_dict())
    assert moe.generate(model, PROMPTS, 6) == moe.generate(fresh, PROMPTS, 6) != before


def test_generation_does_not_depend_on_the_batch(model):
    together = moe.generate(model, PROMPTS, 6)
    for i, prompt in enumerate(PROMPTS):
        alone = moe.generate(model, [prompt], 6)
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == pytest.approx(together.logprobs[i], abs=1e-5)


def test_sampling_is_reproducible_and_follows_the_seed(model):
    first, again, other = (moe.generate(model, PROMPTS, 8, temperature=1.0, seed=s) for s in (5, 5, 6))
    assert first == again and first.tokens != other.tokens
    torch.rand(3)  # the global generator plays no part
    assert moe.generate(model, PROMPTS, 8, temperature=1.0, seed=5) == first


def test_a_sampled_continuation_depends_on_its_place_not_on_its_neighbours(model):
    first = moe.generate(model, PROMPTS, 8, temperature=1.0, seed=5)
    others = moe.generate(model, [PROMPTS[0], [7, 7], [1, 2, 3, 4]], 8, temperature=1.0, seed=5)
    assert others.tokens[0] == first.tokens[0]
    twice = moe.generate(model, [[1, 2, 3]] * 6, 12, temperature=1.0, seed=1)
    assert len({tuple(t) for t in twice.tokens}) > 1  # equal prompts draw their own numbers


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_logprobs_are_those_of_a_teacher_forced_forward(model, temperature, top_p):
    out = moe.generate(model, PROMPTS, 7, temperature=temperature, top_p=top_p, seed=3)
    model.eval()
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        for step, (token, logprob) in enumerate(zip(tokens, logprobs)):
            logp = (logits[step] / (temperature or 1)).log_softmax(-1)
            if top_p < 1:  # the smallest set of best tokens that reaches top_p, renormalised
                order = sorted(range(37), key=lambda t: -logp[t])
                kept, mass = [], 0.0
                for t in order:
                    if mass >= top_p:
                        break
                    kept.append(t)
                    mass += logp[t].exp().item()
                assert token in kept
                assert logprob == pytest.approx((logp[token] - logp[kept].logsumexp(0)).item(), abs=1e-4)
            else:
                assert logprob == pytest.approx(logp[token].item(), abs=1e-5)


# --------------------------------------------------------------------------------------------------------------- drawing


def splitmix(state):
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, 2**64 + 3, -7])
def test_draws_are_splitmix64s_in_unsigned_arithmetic(seed):
    golden = 0x9E3779B97F4A7C15
    keys = [splitmix((splitmix((seed + golden) % 2**64) + i * golden) % 2**64) for i in range(5)]
    for step in (0, 1, 1000):
        expected = [(splitmix((key + (step + 1) * golden) % 2**64) >> 12) / 2**52 for key in keys]
        assert uniform(stream_keys(seed, 5), step).tolist() == expected


@pytest.mark.parametrize("along", ["sequences", "steps", "seeds"])
def test_draws_are_uniform_and_uncorrelated_in_every_direction(seed, along):
    n = 20_000
    if along == "sequences":
        u = uniform(stream_keys(seed, n), 3)
    elif along == "steps":
        n = 5000
        u = torch.cat([uniform(stream_keys(seed, 1), step) for step in range(n)])
    else:
        u = uniform(stream_keys(range(seed, seed + n), n), 0)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    chi = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert chi < 63 + 6 * (2 * 63) ** 0.5  # mean and six deviations
    assert abs(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]) < 6 / n**0.5


def draw(logits, temperature, top_p, seed, n):
    return decoding._sample(logits.expand(n, -1), Sampling(temperature, top_p, stream_keys(seed, n)), 0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_twenty_thousand_draws_fit_the_softmax(seed, temperature):
    logits, n = torch.randn(40) * 1.5, 20_000
    tokens, logp = draw(logits, temperature, 1.0, seed, n)
    p = (logits.double() / temperature).softmax(-1)
    counts, rare = torch.bincount(tokens, minlength=40), p * n < 10
    expected = torch.cat((p[~rare], p[rare].sum()[None])) * n
    seen = torch.cat((counts[~rare], counts[rare].sum()[None]))
    keep = expected > 1
    chi, free = ((seen - expected)[keep] ** 2 / expected[keep]).sum(), int(keep.sum()) - 1
    assert chi < free + 6 * (2 * free) ** 0.5 + 6
    torch.testing.assert_close(logp.double(), p.log()[tokens], rtol=1e-5, atol=1e-5)


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_cold_is_greedy(seed):
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    tokens, logp = draw(logits, 1.0, 0.7, seed, 4000)  # 0.5 alone does not reach 0.7
    assert set(tokens.tolist()) == {1, 3}
    torch.testing.assert_close(logp.exp(), torch.tensor([0, 0.625, 0, 0.375])[tokens])
    assert abs(float((tokens == 1).double().mean()) - 0.625) < 6 * (0.625 * 0.375 / 4000) ** 0.5
    assert set(draw(logits, 1.0, 0.01, seed, 400)[0].tolist()) == {1}
    assert set(draw(logits, 0.02, 1.0, seed, 400)[0].tolist()) == {1}
    greedy, logp = draw(logits, 0.0, 1.0, seed, 2)
    assert greedy.tolist() == [1, 1] and logp.tolist() == pytest.approx([-0.6931472] * 2)


def test_a_token_without_probability_is_never_drawn(monkeypatch):
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf])
    for u in (0.0, 1 - 2.0**-52):  # the ends of what `uniform` gives
        monkeypatch.setattr(
            decoding, "uniform", lambda keys, step, u=u: torch.full((len(keys),), u, dtype=torch.float64)
        )
        assert draw(logits, 1.0, 1.0, 0, 1)[0].tolist() == [1 if u == 0 else 3]


def test_a_list_of_seeds_makes_a_sequence_independent_of_its_batch(model):
    together = moe.generate(model, PROMPTS, 8, 1.0, seed=[9, 4, 9, 2])
    shuffled = moe.generate(model, [PROMPTS[i] for i in (2, 0, 3)], 8, 1.0, seed=[9, 9, 2])
    assert [shuffled.tokens[i] for i in (1, 0, 2)] == [together.tokens[i] for i in (0, 2, 3)]
    assert moe.generate(model, [PROMPTS[1]], 8, 1.0, seed=[4]).tokens[0] == together.tokens[1]
    assert moe.generate(model, [PROMPTS[1]], 8, 1.0, seed=4).tokens[0] == together.tokens[1]  # the stream (4, 0)
    same = moe.generate(model, [[1, 2, 3]] * 3, 12, 5.0, seed=[6, 6, 7])  # hot, or two seeds may draw the same
    assert same.tokens[0] == same.tokens[1] != same.tokens[2]


# -------------------------------------------------------------------------------------------------- streams and records


def test_the_stream_gives_each_token_as_it_is_drawn(model):
    seen = []
    eos = moe.generate(model, PROMPTS, 6, 1.0, seed=3).tokens[2][1]
    out = moe.generate(model, PROMPTS, 6, 1.0, seed=3, eos=eos, stream=lambda i, token: seen.append((i, token)))
    for i in range(4):
        assert [token for j, token in seen if j == i] == out.tokens[i]
    assert [i for i, _ in seen[:4]] == [0, 1, 2, 3]  # step by step, not sequence by sequence


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_routings_are_those_of_a_full_forward_and_replaying_them_gives_its_logits(model, temperature):
    free = moe.generate(model, PROMPTS, 7, temperature, seed=1)
    eos = free.tokens[0][3]
    out = moe.generate(model, PROMPTS, 7, temperature, seed=1, eos=eos, keep_routings=True)
    texts = [p + new for p, new in zip(PROMPTS, out.tokens)]
    longest = max(map(len, texts))
    assert set(out.routings) == {"layers.1", "layers.2"}
    assert out.routings["layers.1"].shape == (4, longest, 3) and out.routings["layers.1"].dtype == torch.int16
    model.eval()
    padded = torch.tensor([t + [0] * (longest - len(t)) for t in texts])
    with torch.no_grad():
        replayed = model(padded, routings=out.routings)
        for i, text in enumerate(texts):
            full = model(torch.tensor([text]))
            for name, recorded in out.routings.items():
                expected = full.routings[name].experts[0, : len(text) - 1]
                assert torch.equal(recorded[i, : len(text) - 1].long().sort(-1).values, expected.sort(-1).values)
                assert recorded[i, len(text) - 1 :].eq(-1).all()  # the last token was never read
            torch.testing.assert_close(
                replayed.logits[i, : len(text) - 1], full.logits[0, :-1], rtol=1e-9, atol=1e-9
            )  # the sums have the order of the choices
    assert free.routings is None
    model.train()(padded, routings=out.routings).logits.sum().backward()  # ordinary tensors, which autograd may keep
    assert moe.generate(model, PROMPTS, 0, keep_routings=True).routings == {}


def test_no_tensor_of_mtp_is_touched(small):
    model = moe.Transformer(small(initializer_range=0.4))
    plain = moe.Transformer(small(initializer_range=0.4, num_nextn_predict_layers=0))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")})
    for p in model.mtp.parameters():
        p.data.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        assert moe.generate(model, PROMPTS, 6, temperature) == moe.generate(plain, PROMPTS, 6, temperature)


def test_the_cache_holds_latents_and_rotary_keys_of_prompt_and_answer_and_nothing_else(model, monkeypatch):
    made, real = [], LatentCache.for_model.__func__

    def for_model(cls, *args, **kwargs):
        made.append(real(cls, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(LatentCache, "for_model", classmethod(for_model))
    moe.generate(model, PROMPTS, 5)
    assert [cache.nbytes for cache in made] == [(12 + 4) * 8 * 3 * (8 + 5) * 4]


def test_logits_that_are_not_finite_are_told(model):
    model.norm.weight.data[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="prompt 0: the model's logits are not finite at token 0"):
            moe.generate(model, [[1, 2]], 3, temperature)


def test_the_library_is_left_as_it_was(model):
    before = torch.backends.mkldnn.enabled, torch.is_grad_enabled()

    def stop(i, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moe.generate(model, [[1, 2]], 3, stream=stop)
    moe.generate(model, [[1, 2]], 3)
    assert (torch.backends.mkldnn.enabled, torch.is_grad_enabled()) == before


# ------------------------------------------------------------------------------------------------------------ sequences


def test_end_of_text_ends_a_sequence_and_the_others_go_on(model):
    free = moe.generate(model, PROMPTS, 10)
    eos = free.tokens[1][3]
    stopped = moe.generate(model, PROMPTS, 10, eos=eos)
    for whole, cut, logprobs in zip(free.tokens, stopped.tokens, stopped.logprobs):
        expected = whole[: whole.index(eos) + 1] if eos in whole else whole
        assert cut == expected and len(logprobs) == len(cut)
    everywhere = moe.generate(model, [PROMPTS[1]], 10, eos=free.tokens[1][0])
    assert everywhere.tokens == [[free.tokens[1][0]]]


def test_end_of_text_of_a_neighbour_does_not_disturb_sampling(model):
    free = moe.generate(model, PROMPTS, 10, temperature=1.0, seed=2)
    eos = free.tokens[0][2]
    stopped = moe.generate(model, PROMPTS, 10, temperature=1.0, seed=2, eos=eos)
    for whole, cut in zip(free.tokens, stopped.tokens):
        assert cut == (whole[: whole.index(eos) + 1] if eos in whole else whole)


def test_the_mode_of_the_model_is_given_back(model):
    for training in (True, False):
        model.train(training)
        moe.generate(model, [[1, 2]], 2)
        assert model.training is training
        with pytest.raises(UserError):
            moe.generate(model, [[]], 2)
        assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_nothing_to_do_gives_nothing(model):
    assert moe.generate(model, [], 5) == ([], [], None)
    assert moe.generate(model, [[1], [2, 3]], 0) == ([[], []], [[], []], None)


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ([[1], []], {}, ["prompt 1 is empty"]),
        ([[1, 37]], {}, ["prompt 0", "[0, 37)"]),
        ([[-1]], {}, ["prompt 0", "[0, 37)"]),
        ([[1], [2]], dict(seed=[3]), ["seed holds 1 numbers for 2 prompts"]),
        ([[1] * 500], dict(max_new_tokens=13), ["prompt 0 of 500", "max_new_tokens=13", "max_position_embeddings=512"]),
        ([[1]], dict(temperature=-1.0), ["temperature=-1.0"]),
        ([[1]], dict(temperature=float("nan")), ["temperature=nan"]),
        ([[1]], dict(top_p=0.0), ["top_p=0.0"]),
        ([[1]], dict(top_p=1.5), ["top_p=1.5"]),
        ([[1]], dict(max_new_tokens=-1), ["max_new_tokens=-1"]),
    ],
)
def test_bad_requests_are_refused_in_one_line(model, prompts, options, words):
    with pytest.raises(UserError) as error:
        moe.generate(model, prompts, **options)
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value)


def test_the_longest_allowed_prompt_still_generates(model):
    assert len(moe.generate(model, [[1] * 510], 2).tokens[0]) == 2


def test_prefill_counts_only_real_tokens_and_decoding_one_each(model):
    model.eval()
    cache = LatentCache.for_model(model.config, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
        model.encode(torch.tensor([[1, 2, 3], [4, 0, 0]]), mask=mask, cache=cache)
        cache.advance(torch.tensor([3, 1]))
        model.encode(torch.tensor([[5], [6]]), cache=cache)
        cache.advance(1)
    assert cache.lengths.tolist() == [4, 2] and cache.longest == 4
    assert cache.nbytes == (12 + 4) * 8 * 3 * 2 * 8


def test_half_precision_and_tied_models_generate(small):
    model = moe.Transformer(small(tie_word_embeddings=True)).to(torch.bfloat16)
    out = moe.generate(model, PROMPTS, 4, temperature=1.0)
    assert all(len(t) == 4 for t in out.tokens) and all(x <= 0 for row in out.logprobs for x in row)
