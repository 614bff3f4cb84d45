"""Metrics against hand counts; every fault that the health check knows is planted, and a healthy model is silent."""

import math

import pytest
import torch

from moe.analysis import diagnostics
from moe.analysis.diagnostics import HealthCheck, router_health, router_language_gradients
from moe.layers.balance import routers
from moe.model import Transformer
from moe.objectives import Pretraining

ROWS, TIME = 8, 24


@pytest.fixture
def trained(small):
    """trained(plant, **changes) -> (model, objective, counts, check, batch, losses) after one backward pass.

    `plant` breaks the model before the pass.
    """

    def make(plant=lambda model: None, **changes):
        config = small(**changes)
        model = Transformer(config).train()
        plant(model)
        objective = Pretraining(model)
        batch = (torch.randint(config.vocab_size, (ROWS, TIME + 1)), None, None)
        losses = objective(*batch, divisor=float(ROWS * TIME), mtp_weight=0.3)
        losses.loss.backward()
        counts = {layer: state["counts"] for layer, state in losses.balance.items()}
        return model, objective, counts, HealthCheck(config), batch, losses

    return make


def replace_gates(model, change):
    """Every router's gates pass through `change(routing)`."""
    for router in routers(model).values():

        def forward(*args, inner=router.forward, **options):
            routing = inner(*args, **{**options, "keep_scores": True})
            return routing._replace(gates=change(routing), scores=None)

        router.forward = forward


def constant(routing):
    """One expert a token, normalised: s / s."""
    s = routing.scores.gather(-1, routing.experts)
    return s / (s + 1e-20)


# ------------------------------------------------------------------------------------------------------------ metrics


def test_metrics_by_hand():
    balance = {
        "layers.1": {"counts": torch.tensor([4, 2, 1, 1])},
        "mtp.0": {"counts": torch.tensor([8, 0, 0, 0])},
    }
    stats = {
        "layers.1": {"tokens": torch.tensor(4), "margin": torch.tensor(1.0), "kept": torch.tensor(6)},
        "mtp.0": {"tokens": torch.tensor(2), "margin": torch.tensor(0.2), "kept": torch.tensor(1)},
    }
    biases = {"layers.1": torch.tensor([0.5, -0.25, 0.0, 0.0]), "mtp.0": torch.tensor([1.0, 1.0, 1.0, 1.25])}
    entropy = (0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3) / 2  # bits over two bits
    expected = {
        "moe/maxvio": (1 + 3) / 2,
        "moe/maxvio_worst": 3,
        "moe/maxvio/layers.1": 1,
        "moe/maxvio/mtp.0": 3,
        "moe/dead": 3,
        "moe/load_entropy": (entropy + 0) / 2,
        "moe/bias_range": 0.75,
        "moe/margin": (0.25 + 0.1) / 2,
        "moe/intervention": ((1 - 6 / 8) + (1 - 1 / 4)) / 2,
    }
    found = router_health(balance, stats, biases, k=2)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
        assert type(found[name]) is float, name


def test_equal_load_has_no_violation_and_full_entropy():
    found = router_health({"layers.0": {"counts": torch.full((6,), 7)}}, {}, {}, k=2)
    assert found["moe/maxvio"] == pytest.approx(0, abs=1e-12)
    assert found["moe/load_entropy"] == pytest.approx(1)
    assert found["moe/dead"] == 0
    assert "moe/margin" not in found and "moe/bias_range" not in found  # not known: not invented


def test_layers_of_unequal_width_no_tokens_and_no_layers():
    many = {"a": {"counts": torch.tensor([1, 3])}, "b": {"counts": torch.zeros(5, dtype=torch.int64)}}
    found = router_health(many, {}, {}, k=1)
    assert found["moe/dead"] == 5 and all(math.isfinite(value) for value in found.values())
    assert router_health({"a": {"counts": torch.tensor([9])}}, {}, {}, k=1)["moe/load_entropy"] == 0
    assert router_health({}, {}, {}, k=2) == {}


def test_metrics_of_a_model_that_ran(trained):
    model, _, counts, _, _, losses = trained()
    found = router_health(losses.balance, losses.health, {n: r.bias for n, r in routers(model).items()}, k=3)
    loads = [c.double() for c in counts.values()]
    assert found["moe/maxvio_worst"] == pytest.approx(max((c.max() / c.mean() - 1).item() for c in loads))
    assert found["moe/bias_range"] == 0
    assert 0 < found["moe/margin"] < 1
    assert 0 <= found["moe/intervention"] < 1  # the group limit intervenes, the bias not yet


def test_without_bias_and_groups_nothing_intervenes(trained):
    losses = trained(n_group=1, topk_group=1)[-1]
    assert router_health(losses.balance, losses.health, {}, k=3)["moe/intervention"] == 0


def test_one_transfer_from_the_device(trained, monkeypatch):
    model, _, _, _, _, losses = trained()
    transfers = []
    for name in ("tolist", "item", "__bool__", "__float__", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, real=real, name=name: transfers.append(name) or real(self, *a)
        )
    router_health(losses.balance, losses.health, {n: r.bias for n, r in routers(model).items()}, k=3)
    assert transfers == ["tolist"]


# -------------------------------------------------------------------------------------------------- a healthy model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "q_lora_rank": None},
        {"n_routed_experts": 0},
        {"num_nextn_predict_layers": 2},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"scoring_func": "softmax", "norm_topk_prob": False, "seq_aux_alpha": 0.0, "n_shared_experts": 0},
        {"initializer_range": None},
    ],
    ids=str,
)
def test_a_healthy_model_gives_no_message(trained, changes):
    model, objective, counts, check, batch, losses = trained(**changes)
    for _ in range(3):
        check.observe(counts)
    relative = router_language_gradients(objective, *batch)
    assert relative.keys() == counts.keys()
    main = float(losses.sums["loss"] / losses.sums["tokens"])
    told = check.gradients(model, counts) + check.language_gradients(relative) + check.first_loss(main) + check.idle()
    assert told + check.mtp_ratio(1.1 * main, main) == []


def test_gradients_may_come_from_the_engine(trained):
    model, _, counts, check, _, _ = trained()
    masters = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    assert check.gradients(model, counts, grads=masters) == []
    assert len(check.gradients(model, counts)) == len(masters)


def test_an_mtp_loss_that_took_no_part_is_no_fault(small):
    model = Transformer(small()).train()
    losses = Pretraining(model)(torch.randint(37, (ROWS, TIME + 1)), None, None, 100.0, mtp_weight=0.0)
    losses.loss.backward()
    counts = {layer: state["counts"] for layer, state in losses.balance.items()}
    check = HealthCheck(model.config)
    assert check.gradients(model, counts, mtp=False) == []
    assert all(m.startswith("mtp.0.") for m in check.gradients(model, counts)) and check.gradients(model, counts)


# --------------------------------------------------------------------------------------------------- planted: gradients


def only(messages, *parts):
    """Exactly one message, on one line, with all parts."""
    assert len(messages) == 1, messages
    assert "\n" not in messages[0]
    for part in parts:
        assert part in messages[0], messages[0]


def busiest(counts, layer):
    return int(counts[layer].argmax())


def test_zero_weights_of_one_expert(trained):
    def plant(model):
        with torch.no_grad():
            model.layers[1].ffn.experts.w2[:4] = 0  # an output of zero: nothing flows back into w13

    model, _, counts, check, _, _ = trained(plant)
    named = [e for e in range(4) if counts["layers.1"][e] >= diagnostics.MIN_TOKENS]
    assert named  # four experts cannot all be idle with this many tokens
    only(
        check.gradients(model, counts),
        "layers.1.ffn.experts.w13",
        f"experts {named[0]}",
        "weights are zero",
        "init_weights",
    )


def test_all_experts_zero_as_after_a_meta_device(trained):
    def plant(model):
        with torch.no_grad():
            for p in model.mtp[0].block.ffn.experts.parameters():
                p.zero_()

    model, _, counts, check, _, _ = trained(plant)
    told = check.gradients(model, counts)
    assert [m.split(":")[0] for m in told if "weights are zero" in m] == [
        "mtp.0.block.ffn.experts.w13", "mtp.0.block.ffn.experts.w2",
    ]  # fmt: skip


def test_experts_cut_off_from_the_loss(trained):
    model, _, counts, check, _, _ = trained(
        lambda m: replace_gates(m, lambda r: torch.zeros_like(r.gates)), n_shared_experts=1
    )
    told = check.gradients(model, counts)
    assert any("layers.1.ffn.experts.w2" in m and "does not reach the loss; check gates" in m for m in told)
    assert not any("weights are zero" in m for m in told)


def test_rows_of_other_experts_reach_an_idle_one(trained):
    def plant(model):
        model.layers[2].ffn.router.bias[[0, 1]] = -100.0  # a whole group, so nobody chooses them

    model, _, counts, check, _, _ = trained(plant)
    assert counts["layers.2"][:2].tolist() == [0, 0]
    assert check.gradients(model, counts) == []
    w13 = model.layers[2].ffn.experts.w13.grad
    w13[1] = w13[busiest(counts, "layers.2")]
    only(check.gradients(model, counts), "layers.2.ffn.experts.w13: experts 1 received", "no token", "sort by expert")


def test_few_tokens_may_have_no_gradient(trained):
    model, _, counts, check, _, _ = trained()
    expert = busiest(counts, "layers.1")
    for p in model.layers[1].ffn.experts.parameters():
        p.grad[expert] = 0
    assert len(check.gradients(model, counts)) == 2
    assert check.gradients(model, counts, min_tokens=ROWS * TIME + 1) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(trained, bad):
    model, _, counts, check, _, _ = trained()
    expert = busiest(counts, "layers.1")
    model.layers[1].ffn.experts.w2.grad[expert, 3, 2] = bad
    only(check.gradients(model, counts), "layers.1.ffn.experts.w2", f"for experts {expert}:", "not finite")
    model.layers[1].ffn.experts.w2.grad[expert] = 1.0
    model.layers[0].attn.o.weight.grad[1, 1] = bad
    only(check.gradients(model, counts), "layers.0.attn.o.weight", "not finite")


@pytest.mark.parametrize("gone", [None, "zeros"])
def test_a_parameter_without_gradient(trained, gone):
    model, _, counts, check, _, _ = trained()
    p = model.mtp[0].proj.weight
    p.grad = None if gone is None else torch.zeros_like(p)
    only(check.gradients(model, counts), "mtp.0.proj.weight has", "no gradient" if gone is None else "of zeros")
    p.requires_grad_(False)
    assert check.gradients(model, counts) == []


@pytest.mark.parametrize("plant", [lambda r: r.gates.detach(), constant], ids=["detached", "constant"])
def test_a_router_that_the_language_loss_cannot_teach(trained, plant):
    """The sequence-wise loss hides it from a look at `.grad`; the language loss alone shows it."""
    model, objective, counts, check, batch, _ = trained(lambda m: replace_gates(m, plant))
    assert check.gradients(model, counts) == []
    told = check.language_gradients(router_language_gradients(objective, *batch))
    assert [m.split(" ")[0] for m in told] == ["layers.1", "layers.2", "mtp.0"]
    assert all("norm_topk_prob=true" in m and "\n" not in m for m in told)


@pytest.mark.parametrize("plant", [lambda r: r.gates.detach() + 0 * r.gates, constant], ids=["detached", "constant"])
def test_a_dead_router_without_balance_loss_shows_in_its_gradient(trained, plant):
    model, _, counts, check, _, _ = trained(lambda m: replace_gates(m, plant), seq_aux_alpha=0.0)
    told = check.gradients(model, counts)
    assert [m.split(" ")[0] for m in told] == [
        "layers.1.ffn.router.weight", "layers.2.ffn.router.weight", "mtp.0.block.ffn.router.weight",
    ]  # fmt: skip


def test_the_language_gradient_equals_a_pass_without_balance_loss(trained, agree):
    """By the definition: a second model without the sequence-wise loss, on the same few tokens."""
    model, objective, _, _, (tokens, _, _), _ = trained(seq_aux_alpha=0.5)
    found = router_language_gradients(objective, tokens, limit=10)
    twin = Transformer(model.config).train()
    twin.load_state_dict(model.state_dict())
    for router in routers(twin).values():
        router.seq_aux_alpha = 0.0
    Pretraining(twin)(tokens[:1, :11], None, None, 10.0, mtp_weight=1.0).loss.backward()
    for layer, ffn in {"layers.1": twin.layers[1].ffn, "mtp.0": twin.mtp[0].block.ffn}.items():
        pairs = [p.norm() * p.grad.norm() for p in (ffn.router.weight, ffn.experts.w2)]
        assert found[layer] == pytest.approx((pairs[0] / pairs[1]).item(), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_language_gradient_leaves_no_trace(trained, checkpointing):
    model, objective, _, _, (tokens, _, _), _ = trained()
    model.activation_checkpointing = checkpointing
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    objective.eval()
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[3, 5:9] = True  # the only targets: the window must find them
    segments = torch.zeros_like(tokens)
    assert len(router_language_gradients(objective, tokens, segments, mask, limit=6)) == 3
    assert not objective.training and all(r.seq_aux_alpha == 0.01 for r in routers(model).values())
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())


def test_no_target_gives_no_verdict(trained):
    _, objective, _, check, (tokens, _, _), _ = trained()
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    assert router_language_gradients(objective, tokens, None, nothing) == {}


# ------------------------------------------------------------------------------------------------------ planted: the rest


def test_the_first_loss_stands_near_the_uniform_one(small):
    check = HealthCheck(small(vocab_size=4096))
    uniform = math.log(4096)
    assert check.first_loss(uniform) == []
    only(check.first_loss(0.02), "first loss 0.020", "sees its targets")
    only(check.first_loss(uniform * 1.3), "initializer_range")
    only(check.first_loss(float("nan")), "overflows")
    only(check.first_loss(uniform, vocab=256), "ln V = 5.545")


def test_large_initial_weights_are_told(trained):
    _, _, _, _, _, losses = trained(initializer_range=3.0)
    main = float(losses.sums["loss"] / losses.sums["tokens"])
    plain = HealthCheck(trained(initializer_range=0.1)[0].config)
    only(plain.first_loss(main), "weights start too large")


def test_an_idle_expert_is_told_once_a_spell(small):
    check = HealthCheck(small())
    loads = {"layers.1": torch.tensor([3, 0, 2, 0]), "mtp.0": torch.tensor([1, 1])}
    for _ in range(99):
        check.observe(loads)
    assert check.idle() == []
    check.observe(loads)
    only(check.idle(), "layers.1: experts 1, 3 had no token for 100 steps", "bias_update_speed")
    check.observe(loads)
    assert check.idle() == []
    check.observe({"layers.1": torch.tensor([3, 1, 2, 0])})  # 1 comes back, and goes again
    assert check.idle() == []
    assert check.idle_steps["layers.1"].tolist() == [0, 0, 0, 102]
    for _ in range(100):
        check.observe({"layers.1": torch.tensor([3, 0, 2, 0])})
    only(check.idle(), "layers.1: experts 1 had no token")
    assert HealthCheck(small()).idle() == []


def test_counters_travel_through_a_checkpoint(small):
    first, second = HealthCheck(small()), HealthCheck(small())
    for _ in range(60):
        first.observe({"layers.1": torch.tensor([1, 0])})
    second.idle_steps = {k: v.clone() for k, v in first.idle_steps.items()}
    for _ in range(40):
        second.observe({"layers.1": torch.tensor([1, 0])})
    only(second.idle(), "experts 1 ")


def test_mtp_fed_its_own_target(small):
    """The ratio of a copy: planted as numbers, and shown to arise from a model that embeds the token it predicts."""
    check = HealthCheck(small())
    assert check.mtp_ratio(0.02, 3.0, step=99) == []
    only(check.mtp_ratio(0.02, 3.0, step=100), "mtp: loss is 0.01", "sees the token it predicts")
    assert check.mtp_ratio(0.02, 3.0, step=110) == []  # told once
    for _ in range(20):
        assert check.mtp_ratio(3.3, 3.0, step=200) == []  # the mean recovers
    for _ in range(19):
        check.mtp_ratio(6.0, 3.0, step=400)
    assert check.ratios.maxlen == 20 and len(check.ratios) == 20
    assert check._ratio_told


def test_mtp_that_hardly_learns(small):
    check = HealthCheck(small())
    for _ in range(100):
        check.observe({})
    only(check.mtp_ratio(5.0, 3.0), "loss is 1.67", "hardly learns")
    assert check.mtp_ratio(float("nan"), 3.0) == [] and check.mtp_ratio(3.0, 0.0) == []


def test_a_model_that_embeds_its_target_is_caught(small):
    """Two hundred steps on random tokens, where nothing can be predicted unless it is given away."""
    config = small(num_hidden_layers=1, n_routed_experts=0, initializer_range=None)
    model = Transformer(config).train()
    honest = model.mtp[0].forward
    ahead = {}

    def cheat(hidden, embedded, *args, **options):  # position i should see t_{i+1}, and is given t_{i+2}
        return honest(hidden, model.embed(ahead["tokens"][:, 2 : 2 + hidden.shape[1]]), *args, **options)

    model.mtp[0].forward = cheat
    objective, check = Pretraining(model), HealthCheck(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    told = []
    for step in range(1, 121):
        ahead["tokens"] = torch.randint(config.vocab_size, (4, 17))
        out = objective(ahead["tokens"], None, None, 64.0, mtp_weight=1.0)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        s = {k: float(v) for k, v in out.sums.items()}
        if step % 5 == 0:
            told += check.mtp_ratio(s["mtp"] / s["mtp_tokens"], s["loss"] / s["tokens"], step)
    only(told, "sees the token it predicts")


# ------------------------------------------------------------------------------------------------------ held-out load


@pytest.mark.parametrize("tokens, k, experts", [(640, 2, 64), (4096, 8, 256), (2000, 3, 8), (300, 1, 2), (5000, 6, 64)])
def test_the_sampling_floor_is_what_a_simulation_finds(tokens, k, experts):
    """Every token takes k different experts at random."""
    found, repeats = [], min(1500, max(60, 4_000_000 // (tokens * experts)))
    for _ in range(repeats):
        chosen = torch.rand(tokens, experts).topk(k, -1).indices
        counts = torch.bincount(chosen.flatten(), minlength=experts).double()
        found.append((counts.max() / counts.mean() - 1).item())
    mean = sum(found) / repeats
    error = (sum((x - mean) ** 2 for x in found) / (repeats - 1) / repeats) ** 0.5
    assert abs(diagnostics.maxvio_floor(tokens, k, experts) - mean) < 0.03 * mean + 4 * error


@pytest.mark.parametrize("case", [(100, 1, 1), (100, 4, 4), (0, 2, 8)])
def test_where_nothing_can_be_uneven_the_floor_is_zero(case):
    assert diagnostics.maxvio_floor(*case) == 0


def test_watched_holds_the_latest_routing_of_every_layer_and_lets_go(small):
    model = Transformer(small())
    with diagnostics.watched(model) as seen:
        out = model(torch.randint(0, 37, (2, 9)))
        assert seen.keys() == out.routings.keys()
        assert all(torch.equal(seen[name].experts, out.routings[name].experts) for name in seen)
        first = seen["layers.1"]
        model(torch.randint(0, 37, (1, 4)))
        assert seen["layers.1"] is not first
    assert not any(module._forward_hooks for module in model.modules())


def test_the_batch_wise_loss_is_no_language_gradient(small):
    """A router whose gates are constant learns from the balance loss alone, and that must not hide it."""
    torch.manual_seed(1)
    model = Transformer(small(balance="aux", aux_alpha=5.0, seq_aux_alpha=0.0))
    tokens = torch.randint(0, 37, (2, 17))
    with_loss = diagnostics.router_language_gradients(Pretraining(model, "aux"), tokens)
    alphas = [moe.router.batch_aux_alpha for _, moe in diagnostics._moe_layers(model).values()]
    assert alphas and set(alphas) == {5.0}
    for _, moe in diagnostics._moe_layers(model).values():
        moe.router.batch_aux_alpha = 0.0
    assert diagnostics.router_language_gradients(Pretraining(model, "aux"), tokens) == pytest.approx(
        with_loss, rel=1e-6
    )
