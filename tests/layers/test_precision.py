"""FP8 reaches what V3 quantises and nothing else, changes no name, and trains like any precision of the engine."""

import pytest
import torch
from torch import nn

from moe.config import OptimConfig, TrainConfig, UserError, load
from moe.config.recipes import PretrainConfig
from moe.kernels import fp8
from moe.layers import precision
from moe.layers.basics import RMSNorm, SwiGLU
from moe.layers.block import Block
from moe.layers.experts import Experts
from moe.layers.router import Router
from moe.model import Transformer
from moe.objectives import Pretraining, count_targets
from moe.parallel import Ranks
from moe.train.engine import Engine
from tests import fp8_reference as by_hand

ONE = Ranks(0, 1, torch.device("cpu"))
LINEAR = {"attn": {"q_a", "q_b", "kv_a", "kv_b", "o"}, "ffn": {"w13", "w2"}, "ffn.shared": {"w13", "w2"}}


def names(block, dense):
    parts = {"attn": LINEAR["attn"], **({"ffn": LINEAR["ffn"]} if dense else {"ffn.shared": LINEAR["ffn.shared"]})}
    found = {f"{block}.{part}.{name}" for part, own in parts.items() for name in own}
    return found if dense else found | {f"{block}.ffn.experts"}


# ------------------------------------------------------------------------------------------------------- what is touched


def test_every_linear_inside_the_blocks_and_the_experts_quantise_and_nothing_else(small):
    model = Transformer(small())
    kinds = {name: type(m) for name, m in model.named_modules()}
    changed = precision.use_fp8(model)
    expected = (
        names("layers.0", True) | names("layers.1", False) | names("layers.2", False) | names("mtp.0.block", False)
    )
    assert set(changed) == expected and len(changed) == len(expected)
    for name, module in model.named_modules():
        if name in expected:
            assert type(module) is (precision.FP8Experts if name.endswith("experts") else precision.FP8Linear), name
        else:
            assert type(module) is kinds[name], name
    left = {
        "embed": nn.Embedding,
        "head": nn.Linear,
        "norm": RMSNorm,
        "mtp.0.proj": nn.Linear,
        "layers.1.ffn.router": Router,
    }
    assert all(type(model.get_submodule(name)) is kind for name, kind in left.items())


def test_the_quantisers_see_these_weights_twice_a_pass_and_no_others(small, monkeypatch):
    """By what a pass really calls: weights of embedding, head, router, norms and MTP's projection reach no quantiser."""
    model, seen, quantise = Transformer(small()).train(), [], fp8.quantise_blocks
    monkeypatch.setattr(fp8, "quantise_blocks", lambda w, *rest: (seen.append(w.data_ptr()), quantise(w, *rest))[1])
    changed = precision.use_fp8(model)
    out = model(torch.randint(0, 37, (2, 9)))
    (out.logits.sum() + out.mtp_logits[0].sum()).backward()
    expected = [p.data_ptr() for name in changed for p in model.get_submodule(name).parameters()]
    assert sorted(seen) == sorted(expected * 2)


@pytest.mark.parametrize(
    "scales, output, experts, others",
    [("v3", (True, False), (True, False), (False, False)), ("float", *[(False, False)] * 3), ("power_of_two", *[(True, True)] * 3)],
)  # fmt: skip
def test_scales_are_powers_of_two_where_the_choice_says(small, scales, output, experts, others):
    model = Transformer(small())
    for name in precision.use_fp8(model, scales):
        expected = output if name.endswith("attn.o") else experts if name.endswith("experts") else others
        assert tuple(model.get_submodule(name).scales) == expected, name


def test_another_choice_replaces_the_first(small):
    model = Transformer(small())
    assert precision.use_fp8(model, "float") == precision.use_fp8(model, "power_of_two")
    assert model.layers[0].attn.o.scales.others


def test_names_state_and_weights_stay(small):
    model = Transformer(small())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = {n: id(p) for n, p in model.named_parameters()}
    precision.use_fp8(model)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    Transformer(small()).load_state_dict(after)


def test_a_linear_of_another_class_or_inside_a_router_is_not_taken(small):
    class Own(nn.Linear):
        pass

    model = Transformer(small())
    model.layers[0].attn.o.__class__ = Own
    model.layers[1].ffn.router.extra = nn.Linear(3, 3)
    changed = precision.use_fp8(model)
    assert "layers.0.attn.o" not in changed and not any("router" in name for name in changed)


def test_parts_compute_quantised_products(agree):
    part = SwiGLU(20, 9).double()
    x = torch.randn(4, 20, dtype=torch.float64)
    for linear in (part.w13, part.w2):
        linear.__class__ = precision.FP8Linear
    gate, up = (by_hand.rows(x) @ by_hand.blocks(part.w13.weight.detach()).t()).chunk(2, -1)
    h = nn.functional.silu(gate) * up
    agree(part(x), by_hand.rows(h) @ by_hand.blocks(part.w2.weight.detach()).t())
    biased = nn.Linear(5, 3).double()
    biased.__class__ = precision.FP8Linear
    exact = by_hand.rows(x[:, :5]) @ by_hand.blocks(biased.weight.detach()).t() + biased.bias
    agree(biased(x[:, :5].view(2, 2, 5)).view(4, 3), exact)


def test_experts_keep_their_shapes_and_recomputation():
    x, ids, gates = torch.randn(2, 3, 8), torch.randint(0, 4, (2, 3, 2)), torch.rand(2, 3, 2)
    plain = Experts(8, 6, 4)
    before = plain(x, ids, gates)
    plain.__class__ = precision.FP8Experts
    plain.recompute_z = True
    after = plain(x, ids, gates)
    assert after.shape == before.shape and 0 < (after - before).norm() < 0.1 * before.norm()
    after.sum().backward()
    assert plain.w13.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------- training


def objective(small, **changes):
    torch.manual_seed(3)
    return Pretraining(Transformer(small(**changes)))


def engine(small, **train):
    return Engine(objective(small), OptimConfig(lr=0.01), TrainConfig(steps=9, **train), ONE)


def step(e, number):
    batch = torch.randint(0, 36, (4, 13), generator=torch.Generator().manual_seed(number))
    loss = e.forward_backward(batch, None, None, float(count_targets(batch)), 0, 4, 0.3).loss
    assert e.step(0.01, e.reduce())
    return float(loss.detach())


def test_training_steps_follow_bf16_without_being_it(small):
    found = {}
    for p in ("bf16", "fp8"):
        e = engine(small, precision=p)
        found[p] = [step(e, n) for n in range(1, 4)]
        assert e.dtype == torch.bfloat16 and e.mixed and all(m.dtype == torch.float32 for m in e.masters)
    assert found["fp8"] != found["bf16"] and found["fp8"] == pytest.approx(found["bf16"], rel=0.05)


def test_choices_of_scales_give_their_own_numbers(small):
    losses = [step(engine(small, precision="fp8", fp8_scales=s), 1) for s in ("v3", "float", "power_of_two")]
    assert len(set(losses)) == 3


def test_an_fp8_run_resumes_exactly(small):
    e = engine(small, precision="fp8")
    step(e, 1), step(e, 2)
    kept = {k: v.clone() for k, v in e.state().items()}
    loss, after = step(e, 3), {k: v.clone() for k, v in e.state().items()}
    fresh = engine(small, precision="fp8")
    step(fresh, 7)
    fresh.load(*[{k.removeprefix(p): v for k, v in kept.items() if k.startswith(p)} for p in ("model/", "optim/")])
    assert step(fresh, 3) == loss and all(torch.equal(v, after[k]) for k, v in fresh.state().items())
    assert kept.keys() == engine(small, precision="bf16").state().keys() | kept.keys()


def test_recomputed_blocks_give_the_same_bits(small):
    plain, again = engine(small, precision="fp8"), engine(small, precision="fp8", activation_checkpointing=True)
    assert [step(plain, n) for n in (1, 2)] == [step(again, n) for n in (1, 2)]


def test_evaluation_quantises_like_training(small):
    model = Transformer(small()).eval()
    tokens = torch.randint(0, 37, (2, 9))
    with torch.no_grad():
        plain = model(tokens).logits
        precision.use_fp8(model)
        quantised, trained = model(tokens).logits, model.train()(tokens).logits
    assert torch.equal(quantised, trained) and not torch.equal(quantised, plain)


def test_a_block_compiles_into_one_graph(small):
    block = Block(small(), 1)
    precision.use_fp8(block)
    x = torch.randn(2, 5, 24)
    compiled = torch.compile(lambda x: block(x)[0], fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, lambda x: block(x)[0]):
        block.zero_grad(set_to_none=True)
        y = run(x)
        y.sum().backward()
        found.append([y.detach(), block.ffn.experts.w13.grad, block.attn.o.weight.grad])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train.precision=fp"], ["train.precision='fp'", "fp8"]),
        (["train.precision=fp8", "train.fp8_scales=pow2"], ["train.fp8_scales='pow2'", "power_of_two"]),
        (["train.precision=bf16", "train.fp8_scales=float"], ["train.fp8_scales=float", "train.precision=fp8"]),
        (["train.precision=fp8", "train.ops=triton"], ["train.ops=triton", "train.precision=fp8", "train.ops=auto"]),
        (["train.precision=fp8", "train.ops=native"], ["train.ops=native", "train.precision=fp8", "train.ops=auto"]),
    ],
)
def test_a_wrong_choice_is_told_in_one_line(arguments, words):
    with pytest.raises(UserError) as error:
        load(PretrainConfig, arguments)
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text, text


def test_unknown_scales_of_a_model_are_told(small):
    with pytest.raises(UserError, match="fp8_scales='powers'.*power_of_two"):
        precision.use_fp8(Transformer(small()), "powers")
