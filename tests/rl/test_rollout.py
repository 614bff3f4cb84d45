"""Rollouts: masks from lengths, log-probabilities and expert choices of a full forward, draws that follow the sample."""

import pytest
import torch

from moe.data.tasks import ALPHABET
from moe.data.tokenizer import Tokenizer
from moe.model import Transformer
from moe.rl.rollout import rollout, sample_seed


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.characters(ALPHABET)


@pytest.fixture
def model(small, tokenizer):
    return Transformer(small(vocab_size=24, num_nextn_predict_layers=1))


def drawn(model, tokenizer, prompts, group=3, length=6, temperature=0.8, step=1):
    seeds = [sample_seed(0, step, hash(tuple(p)), s) for p in prompts for s in range(group)]
    return rollout(model, tokenizer, prompts, group, length, temperature, seeds)


PROMPTS = [[0, 5, 6, 7, 8], [0, 9], [0, 3, 4, 3]]


def test_prompt_answer_and_padding_are_told_apart_by_length_alone(model, tokenizer):
    r = drawn(model, tokenizer, PROMPTS)
    for i, new in enumerate(r.new):
        prompt = PROMPTS[i // 3]
        assert r.tokens[i, : len(prompt) + len(new)].tolist() == prompt + new
        assert r.valid[i].nonzero().flatten().tolist() == list(range(len(prompt) + len(new)))
        assert r.answer[i].nonzero().flatten().tolist() == list(range(len(prompt), len(prompt) + len(new)))
        assert r.truncated[i] == (new[-1] != tokenizer.eos) and (not r.truncated[i] or len(new) == 6)


def test_log_probabilities_and_choices_are_those_of_a_full_forward(model, tokenizer, agree):
    r = drawn(model, tokenizer, PROMPTS)
    with torch.no_grad():
        out = model.eval()(r.tokens, mask=r.valid)
    full = (out.logits / 0.8).log_softmax(-1)[:, :-1].gather(2, r.tokens[:, 1:, None]).squeeze(2)
    agree(r.logp, full * r.answer[:, 1:], 1e-4)
    assert not r.logp[~r.answer[:, 1:]].any()
    for name, routing in out.routings.items():
        routed = r.valid.clone()  # the last sampled token was never an input
        for i, new in enumerate(r.new):
            routed[i, len(PROMPTS[i // 3]) + len(new) - 1] = False
        recorded = r.routings[name].long()
        assert torch.equal(recorded[routed].sort(-1).values, routing.experts[routed].sort(-1).values)
        assert (recorded[~r.valid] == -1).all()


def test_a_sample_does_not_depend_on_its_batch_and_group_members_differ(model, tokenizer):
    together = drawn(model, tokenizer, PROMPTS).new
    alone = [new for prompt in PROMPTS for new in drawn(model, tokenizer, [prompt]).new]
    assert together == alone
    assert len({tuple(new) for new in together[:3]}) > 1
    assert drawn(model, tokenizer, PROMPTS, step=2).new != together


def test_seeds_of_neighbouring_places_differ():
    places = [(a, b, c, d) for a in range(3) for b in range(4) for c in range(5) for d in range(6)]
    seeds = {sample_seed(*p) for p in places}
    assert len(seeds) == len(places) and all(0 <= s < 2**63 for s in seeds)
