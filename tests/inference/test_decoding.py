"""Generation against the full forward pass: greedy, ragged, sampled, stopped, scored, refused."""

import pytest
import torch

import moe
from moe.config import UserError
from moe.inference.decoding import _sample
from moe.layers.cache import LatentCache


@pytest.fixture
def model(small):
    return moe.Transformer(small(initializer_range=0.4)).double()


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [35, 8, 9, 7, 9, 3, 2, 3]]


def greedy(model, prompt, n):
    """The full forward over everything, once a token, no cache; and log-probabilities of the choices."""
    model.eval()
    row, logprobs = list(prompt), []
    for _ in range(n):
        with torch.no_grad():
            logp = model(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        row.append(int(logp.argmax()))
        logprobs.append(logp.max().item())
    return row[len(prompt) :], logprobs


def test_greedy_is_the_argmax_of_the_full_forward_for_ragged_prompts(model):
    out = moe.generate(model, PROMPTS, max_new_tokens=9)
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        expected, expected_logprobs = greedy(model, prompt, 9)
        assert tokens == expected
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-5)


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


def test_drawn_tokens_follow_the_distribution_and_top_p_cuts_its_tail():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = [torch.Generator().manual_seed(i) for i in range(4000)]
    tokens, logp = _sample(logits.expand(4000, 4), 1.0, 1.0, draws)
    share = torch.bincount(tokens, minlength=4) / 4000
    assert (share - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.04
    torch.testing.assert_close(logp, logits[tokens])
    tokens, logp = _sample(logits.expand(4000, 4), 1.0, 0.7, draws)  # 0.5 alone does not reach 0.7
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logp.exp(), torch.tensor([0.625, 0.375])[tokens])
    tokens, _ = _sample(logits.expand(400, 4), 1.0, 0.01, draws[:400])
    assert set(tokens.tolist()) == {0}
    cold, _ = _sample(logits.expand(400, 4), 0.05, 1.0, draws[:400])
    assert set(cold.tolist()) == {0}


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
    assert moe.generate(model, [], 5) == ([], [])
    assert moe.generate(model, [[1], [2, 3]], 0) == ([[], []], [[], []])


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ([[1], []], {}, ["prompt 1 is empty"]),
        ([[1, 37]], {}, ["prompt 0", "[0, 37)"]),
        ([[-1]], {}, ["prompt 0", "[0, 37)"]),
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
