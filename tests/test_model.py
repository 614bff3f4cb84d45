"""The whole model: what it is made of, what may influence what, how big it is, and that it learns and compiles."""

import pytest
import torch

import moe
from moe.config import PRESETS
from moe.objectives import Pretraining

F64 = torch.float64


def tokens_of(batch=2, time=10):
    return torch.randint(0, 37, (batch, time))


# ------------------------------------------------------------------------------------------------------ what it is


def test_logits_are_embedding_blocks_norm_and_head(small, agree):
    model = moe.Transformer(small()).double()
    tokens = tokens_of()
    x = model.embed.weight[tokens]
    for block in model.layers:
        x = x + block.attn(block.attn_norm(x))
        h = block.ffn_norm(x)
        x = x + (block.ffn(h)[0] if hasattr(block.ffn, "router") else block.ffn(h))
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.norm.weight
    out = model(tokens)
    agree(out.logits, x @ model.head.weight.t())
    assert set(out.routings) == {"layers.1", "layers.2", "mtp.0"}
    assert out.routings["layers.1"].experts.shape == (2, 10, 3) and out.routings["mtp.0"].experts.shape == (2, 9, 3)


def test_every_parameter_has_a_gradient_that_is_not_zero(small):
    model = moe.Transformer(small(num_nextn_predict_layers=2, seq_aux_alpha=0.0))
    Pretraining(model)(tokens_of(4, 20), None, None, 1.0, mtp_weight=0.3).loss.backward()
    learning = {
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all() and p.grad.any()
    }
    assert learning == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("k", [2, 3])
def test_the_language_loss_alone_trains_every_router(small, k):
    """Three public projects trained routers that only rounding noise reached; so not `> 0`, but against the experts."""
    model = moe.Transformer(small(num_experts_per_tok=k, seq_aux_alpha=0.0))
    Pretraining(model)(tokens_of(4, 20), None, None, 1.0, mtp_weight=0.3).loss.backward()
    layers = [m for m in model.modules() if isinstance(m, moe.MoE)]
    assert len(layers) == 3
    for layer in layers:
        assert layer.router.weight.grad.norm() > 1e-4 * layer.experts.w2.grad.norm()


def test_tied_embeddings_share_one_weight_and_add_both_gradients(small, agree):
    tied = moe.Transformer(small(tie_word_embeddings=True)).double()
    apart = moe.Transformer(small()).double()
    assert tied.head.weight is tied.embed.weight
    apart.load_state_dict({**tied.state_dict(), "head.weight": tied.embed.weight.detach().clone()})
    tokens = tokens_of()
    for model in (tied, apart):
        Pretraining(model)(tokens, None, None, 1.0, mtp_weight=0.3).loss.backward()
    agree(tied.embed.weight.grad, apart.embed.weight.grad + apart.head.weight.grad)
    assert apart.num_parameters() - tied.num_parameters() == 37 * 24


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_have_the_std_asked_for_and_norms_are_one(tied):
    model = moe.Transformer(moe.ModelConfig.preset("tiny", num_hidden_layers=2, tie_word_embeddings=tied, init="paper"))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert p.eq(1).all(), name
        else:
            assert p.std().item() == pytest.approx(0.006, rel=0.06), name
            assert abs(p.mean().item()) < 0.006 * 5 / p.numel() ** 0.5, name
    assert all(b.eq(0).all() for n, b in model.named_buffers() if n.endswith("router.bias"))


def test_scaled_initialisation_follows_the_width():
    assert moe.ModelConfig.preset("v3-671b").init_std == 0.006
    assert moe.ModelConfig.preset("tiny", hidden_size=448).init_std == pytest.approx(0.006 * 4)
    assert moe.ModelConfig.preset("tiny", initializer_range=0.02).init_std == 0.02


def test_a_seed_gives_the_same_weights(small):
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(moe.Transformer(small()).state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


# ------------------------------------------------------------------------------------------- what influences what


def test_changing_a_token_changes_nothing_before_it(small):
    model = moe.Transformer(small()).double()
    tokens = tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 37
    before, after = model(tokens), model(changed)
    difference = (before.logits - after.logits).abs().amax(-1)[0]
    assert difference[:7].lt(1e-12).all() and difference[7:].gt(1e-9).all()


def test_packed_documents_are_the_documents_alone(small, agree):
    model = moe.Transformer(small()).double()
    tokens = tokens_of(1, 12)
    segments = torch.tensor([[4] * 5 + [5] + [9] * 6])
    packed = model(tokens, segments)
    for start, end in ((0, 5), (5, 6), (6, 12)):
        alone = model(tokens[:, start:end])
        agree(packed.logits[:, start:end], alone.logits)
        agree(packed.mtp_logits[0][:, start : end - 1], alone.mtp_logits[0])
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 37
    difference = (packed.logits - model(changed, segments).logits).abs().amax(-1)[0]
    assert difference[5:].lt(1e-12).all() and difference[2:5].gt(1e-9).all()


def test_rows_of_a_batch_do_not_meet(small, agree):
    model = moe.Transformer(small()).double()
    tokens = tokens_of(4, 7)
    agree(model(tokens).logits[2:3], model(tokens[2:3]).logits)


def test_padding_on_the_right_changes_no_real_position(small, agree):
    model = moe.Transformer(small()).double()
    tokens = tokens_of(2, 8)
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    padded = model(tokens, mask=mask)
    agree(padded.logits[1:, :5], model(tokens[1:, :5]).logits)
    agree(padded.mtp_logits[0][1:, :4], model(tokens[1:, :5]).mtp_logits[0])


def test_recorded_choices_replay_the_whole_model(small, agree):
    model = moe.Transformer(small()).double()
    tokens = tokens_of()
    first = model(tokens)
    for module in model.modules():
        if isinstance(module, moe.Router):
            module.bias.normal_(0, 5)
    assert (model(tokens).logits - first.logits).abs().max() > 1e-6
    again = model(tokens, routings={name: r.experts for name, r in first.routings.items()})
    agree(again.logits, first.logits)
    agree(again.mtp_logits[0], first.mtp_logits[0])


def test_a_cache_continues_the_prompt(small, agree):
    model = moe.Transformer(small()).double().eval()
    tokens = tokens_of(2, 9)
    full = model(tokens).logits
    cache = moe.LatentCache.for_model(model.config, 2, 9, dtype=F64)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        agree(model(tokens[:, start:end], cache=cache).logits, full[:, start:end])
        cache.advance(end - start)


# ------------------------------------------------------------------------------------------------------ how big


CENSUS = {  # parameters of the main model, and those one token meets (the head, not the embedding table)
    "v3-671b": (671_026_404_352, 36_625_603_584),
    "v2-236b": (235_741_434_880, 20_851_512_320),
    "v2-lite-16b": (15_706_484_224, 2_451_435_008),
}


def by_formula(c):
    """Independent of the modules: counts from the shapes in the papers."""
    d, h = c["hidden_size"], c["num_attention_heads"]
    nope, rope, v, rank, q = (
        c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank")
    )
    query = d * q + q + q * h * (nope + rope) if q else d * h * (nope + rope)
    attention = query + d * (rank + rope) + rank + rank * h * (nope + v) + h * v * d
    expert = 3 * d * c["moe_intermediate_size"]
    layers, dense = c["num_hidden_layers"], c["first_k_dense_replace"]

    def total(routed):
        ffn = expert * (routed + c["n_shared_experts"]) + d * c["n_routed_experts"]
        blocks = layers * (attention + 2 * d) + dense * 3 * d * c["intermediate_size"] + (layers - dense) * ffn
        return blocks + d + c["vocab_size"] * d

    return total(c["n_routed_experts"]) + c["vocab_size"] * d, total(c["num_experts_per_tok"])


@pytest.mark.parametrize("name", CENSUS)
def test_parameter_census_of_the_published_models(name):
    with torch.device("meta"):
        model = moe.Transformer(moe.ModelConfig.preset(name))
    counts = model.num_parameters(), model.num_parameters(active=True)
    assert counts == CENSUS[name] == by_formula(PRESETS[name])


def test_router_biases_of_v3_are_14848_buffers_on_top():
    with torch.device("meta"):
        model = moe.Transformer(moe.ModelConfig.preset("v3-671b"))
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("bias") and not n.startswith("mtp"))
    assert biases == 58 * 256 and model.num_parameters() + biases == 671_026_419_200
    mtp = sum(p.numel() for n, p in model.named_parameters() if "mtp" in n)
    assert model.num_parameters(mtp=True) - model.num_parameters() == mtp
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"embed", "layers", "norm", "head", "mtp"}


def test_tiny_keeps_the_routing_of_v3_whole():
    tiny, v3 = moe.ModelConfig.preset("tiny"), moe.ModelConfig.preset("v3-671b")
    for key in ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "scoring_func",
                "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers", "seq_aux_alpha"):  # fmt: skip
        assert getattr(tiny, key) == getattr(v3, key), key
    assert tiny.first_k_dense_replace == 1


# --------------------------------------------------------------------------------------------- learns, casts, compiles


def test_one_batch_is_learnt_by_heart(small):
    torch.manual_seed(0)
    model = moe.Transformer(small(hidden_size=32, seq_aux_alpha=0.0, initializer_range=0.08))
    objective, tokens = Pretraining(model), tokens_of(2, 13)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        out = objective(tokens, None, None, 24.0, mtp_weight=0.3)
        if step == 0:
            assert (out.sums["loss"] / 24).item() == pytest.approx(3.61, abs=0.6)  # ln 37
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        moe.update_balance(model, model(tokens).routings)
    assert out.sums["loss"] / 24 < 0.05 and out.sums["mtp"] / 22 < 0.05


def test_half_precision_model_is_finite_and_near(small, agree):
    model = moe.Transformer(small())
    tokens = tokens_of()
    exact = model(tokens)
    model.to(torch.bfloat16)
    out = model(tokens, routings={name: r.experts for name, r in exact.routings.items()})
    assert out.logits.dtype == torch.bfloat16
    agree(out.logits, exact.logits, 0.1)
    loss = Pretraining(model)(tokens, None, None, 18.0, mtp_weight=0.3).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.bfloat16 for p in model.parameters())


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_model_is_one_graph(small, fresh_compiler):
    explanation = torch._dynamo.explain(moe.Transformer(small()))(tokens_of())
    assert explanation.graph_break_count == 0, explanation.break_reasons


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_loss_and_gradients_equal_eager(small, agree, fresh_compiler, packed):
    model = moe.Transformer(small(num_hidden_layers=2)).double()
    objective, tokens = Pretraining(model), tokens_of()
    segments = torch.sort(torch.randint(0, 3, (2, 10)), -1).values if packed else None
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    results = []
    for call in (objective, compiled):
        model.zero_grad()
        out = call(tokens, segments, None, 18.0, mtp_weight=0.3)
        out.loss.backward()
        results.append((out, [p.grad.clone() for p in model.parameters()]))
    (eager, gradients), (same, compiled_gradients) = results
    agree(same.loss, eager.loss)
    for (name, _), a, e in zip(model.named_parameters(), compiled_gradients, gradients):
        agree(a, e, what=name)
    for name, state in eager.balance.items():
        assert torch.equal(state["counts"], same.balance[name]["counts"])


def test_reference_ops_give_the_same_model(small, agree, ops_path):
    model = moe.Transformer(small()).double()
    objective, tokens = Pretraining(model), tokens_of(1, 7)
    results = []
    for path in ("torch", "reference"):
        ops_path(path)
        model.zero_grad()
        out = objective(tokens, None, None, 6.0, mtp_weight=0.3)
        out.loss.backward()
        results.append((out.loss, [p.grad.clone() for p in model.parameters()]))
    agree(results[0][0], results[1][0])
    for (name, _), a, e in zip(model.named_parameters(), results[0][1], results[1][1]):
        agree(a, e, what=name)
