"""The bias rule by hand, what counts toward it and what must not, and that it balances."""

import pytest
import torch

import moe
from moe.config import value_at
from moe.layers.balance import BALANCERS, routers
from moe.layers.router import Router
from moe.layers.routing import Routing
from moe.objectives import Pretraining


def routing_with(counts):
    empty = torch.empty(0)
    return Routing(empty, empty, torch.tensor(counts), {}, {})


def moved(rule, counts, bias, speed=0.001):
    balancer = BALANCERS[rule]
    state = balancer.init(len(bias))
    for c in counts:
        state = balancer.observe(state, routing_with(c))
    return balancer.update(state, torch.tensor(bias), speed)


@pytest.mark.parametrize(
    "counts, signs",
    [
        ([[5, 1, 3, 3]], [-1, 1, 0, 0]),  # overloaded down, underloaded up, exactly average stays
        ([[2, 2, 2, 2]], [0, 0, 0, 0]),
        ([[9, 1, 1, 1]], [-1, 1, 1, 1]),
        ([[0, 0, 0, 0]], [0, 0, 0, 0]),
        ([[4, 0, 0, 0], [0, 4, 4, 4]], [0, 0, 0, 0]),  # two micro-batches: only the sum counts
        ([[3, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 2]], [-1, 1, 1, -1]),
        ([[1, 1, 1, 2]], [1, 1, 1, -1]),  # mean 1.25: no integer rounding
    ],
)
def test_bias_moves_one_step_against_the_load(counts, signs):
    before = [0.5, -0.25, 2.0, 0.0]
    after = moved("bias", counts, before)
    assert after.dtype == torch.float32
    assert (after - torch.tensor(before)).tolist() == pytest.approx([0.001 * s for s in signs], abs=1e-7)


def test_counts_beyond_fp32_still_find_the_overloaded_expert():
    many = 2**25
    after = moved("bias", [[many + 1, many, many, many]], [0.0] * 4, 1.0)
    assert after.tolist() == [-1, 1, 1, 1]


def test_the_rule_none_counts_and_leaves_the_bias():
    assert moved("none", [[9, 0, 0]], [1.0, 2.0, 3.0]).tolist() == [1, 2, 3]
    assert BALANCERS["none"].observe(BALANCERS["none"].init(2), routing_with([3, 4]))["counts"].tolist() == [3, 4]


def test_speed_zero_freezes():
    assert moved("bias", [[9, 0]], [0.25, 0.5], 0.0).tolist() == [0.25, 0.5]


# --------------------------------------------------------------------------------------------------- in a whole model


def test_every_router_is_found_under_the_name_its_routing_uses(small):
    model = moe.Transformer(small(num_nextn_predict_layers=2))
    out = model(torch.randint(0, 37, (2, 8)))
    assert set(routers(model)) == set(out.routings) == {"layers.1", "layers.2", "mtp.0", "mtp.1"}


def biases(model):
    return {name: router.bias.clone() for name, router in routers(model).items()}


def test_update_balance_moves_every_router_by_its_own_counts_mtp_too(small):
    model = moe.Transformer(small())
    out = model(torch.randint(0, 37, (2, 8)))
    moe.update_balance(model, out.routings, speed=0.01)
    for name, bias in biases(model).items():
        counts = out.routings[name].counts.double()
        torch.testing.assert_close(bias, (0.01 * torch.sign(counts.mean() - counts)).float(), rtol=0, atol=0)
        assert bias.abs().max() > 0
    assert out.routings["mtp.0"].counts.sum() == 2 * 7 * 3


def test_micro_batches_count_as_the_one_big_batch(small):
    tokens = torch.randint(0, 37, (6, 9))
    model = moe.Transformer(small())
    moe.update_balance(model, model(tokens).routings)
    whole = biases(model)
    for router in routers(model).values():
        router.bias.zero_()
    moe.update_balance(model, [model(t).routings for t in tokens.split([1, 2, 3])])
    assert all(torch.equal(whole[n], b) for n, b in biases(model).items())


def test_evaluation_between_steps_changes_nothing(small):
    tokens = torch.randint(0, 37, (2, 9))
    model = moe.Transformer(small())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    out = model(tokens)
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randint(0, 37, (4, 9)))
    moe.generate(model, [[1, 2, 3]], 4)
    model.train()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    again = model(tokens)
    assert all(torch.equal(out.routings[n].counts, again.routings[n].counts) for n in out.routings)


def test_checkpointing_counts_once_and_gives_equal_gradients(small, agree):
    model = moe.Transformer(small()).double()
    tokens = torch.randint(0, 37, (2, 9))
    results = []
    for on in (False, True):
        model.activation_checkpointing = on
        model.zero_grad()
        calls = []
        handles = [r.register_forward_hook(lambda *_: calls.append(1)) for r in routers(model).values()]
        out = Pretraining(model)(tokens, None, None, 16.0, mtp_weight=0.3)
        out.loss.backward()
        for handle in handles:
            handle.remove()
        results.append((out, {n: p.grad.clone() for n, p in model.named_parameters()}, len(calls)))
    (plain, gradients, once), (saved, same, twice) = results
    assert once == 3 and twice == 6  # the routers did run again in the backward pass
    agree(saved.loss, plain.loss)
    for name, state in plain.balance.items():
        assert torch.equal(state["counts"], saved.balance[name]["counts"])
    for name, g in gradients.items():
        agree(same[name], g, what=name)


def test_padding_is_not_counted_main_or_mtp(small):
    model = moe.Transformer(small())
    tokens = torch.randint(0, 37, (2, 8))
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    out = model(tokens, mask=mask)
    assert out.routings["layers.1"].counts.sum() == 11 * 3
    assert out.routings["mtp.0"].counts.sum() == (7 + 2) * 3  # position and the token it looks at are both real
    assert out.routings["mtp.0"].experts[1, 2:].eq(8).all()


def test_routings_of_another_model_are_refused(small):
    model = moe.Transformer(small())
    out = model(torch.randint(0, 37, (1, 5)))
    with pytest.raises(ValueError, match="layers.1.*fit no router.*model.layers.1"):
        moe.update_balance(Pretraining(model), out.routings)


def test_a_few_hundred_updates_balance_a_skewed_router():
    router = Router(8, 32, 4, 4, 2).eval()
    skew = torch.linspace(-1, 1, 32)[torch.randperm(32)]

    def maxvio(n=4096):
        counts = router(torch.cat([torch.randn(n, 7), torch.ones(n, 1)], 1)).counts.double()
        return (counts.max() / counts.mean() - 1).item()

    with torch.no_grad():
        router.weight.copy_(torch.cat([0.5 * torch.randn(32, 7), skew.unsqueeze(1)], 1))
        before = maxvio()
        balancer = BALANCERS["bias"]
        for _ in range(300):
            x = torch.cat([torch.randn(1024, 7), torch.ones(1024, 1)], 1)
            state = balancer.observe(balancer.init(32), router(x))
            router.bias.copy_(balancer.update(state, router.bias, 0.003))
        after = maxvio()
    assert before > 1.0 and after < 0.35 and after < before / 3, (before, after)


# ------------------------------------------------------------------------------------------------------------ schedule


def test_a_schedule_steps_and_joins_points_by_lines():
    steps = [[0, 0.3], [0.67, 0.3], [0.67, 0.1]]
    assert [value_at(steps, p) for p in (0, 0.5, 0.6699, 0.67, 0.9, 1)] == [0.3, 0.3, 0.3, 0.1, 0.1, 0.1]
    line = [[0, 0.02], [0.5, 0.01], [1, 0]]
    assert value_at(line, 0.25) == pytest.approx(0.015) and value_at(line, 0.75) == pytest.approx(0.005)
    assert value_at(line, 1) == 0 and value_at(0.001, 0.4) == 0.001 and value_at(2, 0) == 2.0
    late = [[0.2, 5], [0.4, 7]]
    assert value_at(late, 0.1) == 5 and value_at(late, 0.3) == pytest.approx(6) and value_at(late, 0.9) == 7


def test_the_rule_aux_counts_and_leaves_the_bias_to_the_routers_loss():
    assert moved("aux", [[9, 0, 0]], [1.0, 2.0, 3.0]).tolist() == [1, 2, 3]


def test_the_batch_wise_loss_evens_a_load_out(small):
    """Gradient steps on the loss alone: a router that prefers two experts comes to use all eight."""
    router = Router.from_config(small(balance="aux", aux_alpha=1.0, seq_aux_alpha=0.0, n_group=1, topk_group=1))
    with torch.no_grad():
        router.weight[:2] += 0.5
    x = torch.randn(512, 24) + 1.0
    spread = []
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(60):
        routing = router(x)
        spread.append(routing.counts.max().item() / routing.counts.double().mean().item() - 1)
        optimizer.zero_grad()
        routing.losses["batch_aux"].backward()
        optimizer.step()
    assert spread[0] > 1 and spread[-1] < 0.5
