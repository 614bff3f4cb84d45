"""The policy objective on a whole model: log-probabilities, replay, masks, and independence of how samples are cut."""

import dataclasses

import pytest
import torch

from moe.model import Transformer
from moe.objectives.reinforcement import Reinforcement, Samples


@pytest.fixture
def model(small):
    return Transformer(small(num_nextn_predict_layers=0)).double().eval()


def lengths_of(batch=6, longest=11):
    prompt = torch.randint(1, 4, (batch,))
    answer = torch.randint(1, longest - 4, (batch,))
    return prompt, answer


@pytest.fixture
def samples(model):
    """Ragged samples whose padding is legal tokens; the sampler's figures are those of a full forward."""
    prompt, answer = lengths_of()
    total, longest = prompt + answer, int((prompt + answer).max())
    tokens = torch.randint(0, 37, (len(prompt), longest))
    at = torch.arange(longest)
    valid = at < total.unsqueeze(1)
    mask = valid & (at >= prompt.unsqueeze(1))
    with torch.no_grad():
        out = model(tokens, mask=valid)
    logp = out.logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2) * mask[:, 1:]
    routes = {k: torch.where(valid.unsqueeze(-1), r.experts, -1).to(torch.int16) for k, r in out.routings.items()}
    advantages = torch.randn(len(prompt), dtype=torch.float64)
    return Samples(tokens, mask, valid, logp, logp, advantages, routes)


def divisors(s):
    return float(s.answer[:, 1:].sum()), float(len(s.tokens))


def gradients(model, *losses):
    model.zero_grad()
    sum(losses).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_log_probabilities_are_those_of_the_whole_model_at_the_temperature(model, samples, agree):
    objective = Reinforcement(model, temperature=0.7)
    logp, entropy, _ = objective.score(samples)
    full = (model(samples.tokens, mask=samples.valid).logits / 0.7).log_softmax(-1)[:, :-1]
    mask = samples.answer[:, 1:]
    agree(logp, full.gather(2, samples.tokens[:, 1:, None]).squeeze(2) * mask, 1e-5)
    agree(entropy, -(full.exp() * full).sum(-1) * mask, 1e-5)


def test_on_policy_gradient_is_minus_advantage_times_score(model, samples, agree):
    """REINFORCE by autograd on the plain model: at ratio 1 every surrogate has this gradient."""
    tokens, _ = divisors(samples)
    got = gradients(model, Reinforcement(model, replay=False)(samples, *divisors(samples)).loss)
    full = model(samples.tokens, mask=samples.valid).logits.log_softmax(-1)[:, :-1]
    logp = full.gather(2, samples.tokens[:, 1:, None]).squeeze(2)
    expected = gradients(model, -(samples.advantages.unsqueeze(1) * logp * samples.answer[:, 1:]).sum() / tokens)
    assert got.keys() == expected.keys()
    for name in got:
        agree(got[name], expected[name], 1e-5, name, scale=1e-3)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "gspo", "cispo", "dr_grpo"])
def test_cutting_padding_and_order_change_nothing(model, samples, loss, agree):
    objective = Reinforcement(model, loss=loss, max_length=16)
    moved = samples._replace(logp_old=samples.logp_old + 0.1 * torch.randn_like(samples.logp_old) * samples.answer[:, 1:])
    whole = gradients(model, objective(moved, *divisors(moved)).loss)
    order = torch.randperm(len(moved.tokens))
    parts = [moved.rows(order[:1]), moved.rows(order[1:4]), moved.rows(order[4:])]
    cut = gradients(model, *(objective(p, *divisors(moved)).loss for p in parts))
    wide = moved._replace(
        tokens=torch.nn.functional.pad(moved.tokens, (0, 3), value=5),
        answer=torch.nn.functional.pad(moved.answer, (0, 3)),
        valid=torch.nn.functional.pad(moved.valid, (0, 3)),
        logp_rollout=torch.nn.functional.pad(moved.logp_rollout, (0, 3)),
        logp_old=torch.nn.functional.pad(moved.logp_old, (0, 3), value=float("nan")),
        routings={k: torch.nn.functional.pad(v, (0, 0, 0, 3), value=-1) for k, v in moved.routings.items()},
    )
    padded = gradients(model, objective(wide, *divisors(moved)).loss)
    for name in whole:
        agree(cut[name], whole[name], 1e-9, name, scale=1e-6)
        agree(padded[name], whole[name], 1e-9, name, scale=1e-6)


def test_a_row_in_which_nothing_counts_has_no_gradient(model, samples):
    none = samples._replace(answer=torch.zeros_like(samples.answer))
    out = Reinforcement(model)(none, 5.0, 2.0)
    assert float(out.loss.detach()) == 0
    assert all(not g.any() for g in gradients(model, out.loss).values())


def test_replay_keeps_the_samplers_experts_and_the_routers_gradient(model, samples, small):
    other = Transformer(dataclasses.replace(model.config)).double().eval()  # other weights choose other experts
    free, forced = Reinforcement(other, replay=False), Reinforcement(other, replay=True)
    sums = free(samples, *divisors(samples)).sums
    assert int(sums["choices"]) == int(samples.valid[:, :-1].sum()) * 3 * 2 and int(sums["flips"]) > 0
    out = forced(samples, *divisors(samples))
    assert int(out.sums["flips"]) == 0 and int(out.sums["choices"]) == int(sums["choices"])
    grads = gradients(other, out.loss)
    assert all(grads[n].any() for n in grads if n.endswith("router.weight"))


def test_the_same_weights_replayed_are_the_same_bits(model, samples):
    free = Reinforcement(model, replay=False).score(samples)[0]
    forced = Reinforcement(model, replay=True).score(samples)[0]
    assert torch.equal(free, forced)
