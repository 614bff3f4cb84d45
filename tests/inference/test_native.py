"""Generation by native steps: token for token the full forward's, the PyTorch path where the model is not the stock one."""

import pytest
import torch
from torch import nn

import moe
from moe.config import UserError
from moe.inference import native
from moe.kernels.native import library
from moe.layers.cache import LatentCache
from moe.layers.precision import use_fp8
from moe.layers.router import Router
from tests.inference.test_decoding import PROMPTS, SHAPES

pytestmark = pytest.mark.skipif(library.status() != "", reason=library.status())


@pytest.fixture(autouse=True)
def by_native_kernels(ops_path):
    ops_path("native")


@pytest.fixture
def model(small):
    """Ready to decode: in evaluation mode."""
    return moe.Transformer(small(initializer_range=0.4)).eval()


def cache_of(model, batch=1):
    return LatentCache.for_model(model.config, batch, 24, dtype=model.embed.weight.dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_the_full_forward(small, monkeypatch, shape):
    model = moe.Transformer(small(initializer_range=0.4, num_nextn_predict_layers=0, **SHAPES[shape])).eval()
    passes, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda *a, **k: passes.append(a) or encode(*a, **k))
    out = moe.generate(model, PROMPTS, 9)
    assert len(passes) == 1  # prefill; the steps were native
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs):
        with torch.no_grad():
            logp = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logp.argmax(-1).tolist() == tokens
        assert logprobs == pytest.approx(logp.amax(-1).tolist(), abs=3e-5)


def test_bf16_scores_are_those_of_a_full_forward_with_the_recorded_choices(small):
    model = moe.Transformer(small()).bfloat16().eval()
    out = moe.generate(model, PROMPTS, 9, keep_routings=True)
    for i, (prompt, tokens, logprobs) in enumerate(zip(PROMPTS, out.tokens, out.logprobs)):
        text = torch.tensor([prompt + tokens])
        choices = {name: chosen[i : i + 1, : text.shape[1]] for name, chosen in out.routings.items()}
        with torch.no_grad():
            logp = model(text, routings=choices).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        assert logprobs == pytest.approx(logp.gather(1, text[0, len(prompt) :, None])[:, 0].tolist(), abs=0.1)


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9)])
def test_streams_ends_and_recorded_choices_are_those_of_the_pytorch_path(model, ops_path, temperature, top_p):
    free = moe.generate(model, PROMPTS, 10, temperature, seed=3, top_p=top_p)
    eos = free.tokens[2][4]

    def run(path):
        ops_path(path)
        seen = []
        out = moe.generate(
            model,
            PROMPTS,
            10,
            temperature,
            3,
            top_p=top_p,
            eos=eos,
            stream=lambda *x: seen.append(x),
            keep_routings=True,
        )
        return seen, out

    (seen, mine), (expected, theirs) = run("native"), run("torch")
    assert seen == expected and mine.tokens == theirs.tokens
    assert len({len(tokens) for tokens in mine.tokens}) > 1  # sequences ended at different times
    for a, b in zip(mine.logprobs, theirs.logprobs):
        assert a == pytest.approx(b, abs=3e-5)
    for name, chosen in theirs.routings.items():
        assert mine.routings[name].dtype == torch.int16 and torch.equal(mine.routings[name], chosen)


def test_drafts_of_several_tokens_give_the_logits_of_single_steps(model):
    """T > 1: each of the new tokens sees those before it; the caller may take them back."""
    with torch.inference_mode():
        cache = cache_of(model, 2)
        model.encode(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache=cache)
        cache.advance(3)
        step = native.stepper(model, cache)
        together = step([7, 8, 9, 10, 11, 12]).logits.view(2, 3, -1).clone()
        cache.advance(3)
        cache.truncate(torch.tensor([4, 4]))  # two drafts rejected
        for t in (1, 2):
            logits = step([7 + t, 10 + t]).logits
            cache.advance(1)
            torch.testing.assert_close(logits, together[:, t], rtol=1e-4, atol=1e-4)


def test_weights_that_change_are_seen_by_the_next_step(model):
    cache = cache_of(model)
    with torch.inference_mode():
        model.encode(torch.tensor([[1, 2, 3]]), cache=cache)
    cache.advance(3)
    step = native.stepper(model, cache)
    before = step([4]).logits.clone()
    with torch.no_grad():
        model.layers[1].ffn.experts.w2.mul_(1.5)
        model.layers[2].attn.kv_b.weight.mul_(1.5)
        after = step([4]).logits
        hidden, _ = model.encode(torch.tensor([[4]]), cache=cache)
        torch.testing.assert_close(after, model.head(hidden)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-2)


class Odd(Router):
    pass


class Own(moe.Transformer):
    pass


def replaced(model, **parts):
    for name, part in parts.items():
        setattr(model.layers[1].ffn, name, part)


def transposed(p):
    p.data = p.data.t().contiguous().t()


VARIANTS = {
    "layers.1.ffn.router is a Odd": lambda m: replaced(m, router=Odd(24, 8, 3)),
    "layers.0.attn.q_a is a FP8Linear": use_fp8,
    "layers.2 has hooks": lambda m: m.layers[2].register_forward_hook(lambda *a: None),
    "layers.0.attn has hooks": lambda m: m.layers[0].attn.register_forward_pre_hook(lambda *a: None),
    "head has hooks": lambda m: setattr(m.head, "forward", m.head.forward),
    "head.bias is": lambda m: setattr(m, "head", nn.Linear(24, 37)),
    "layers.0.attn.o.weight is": lambda m: transposed(m.layers[0].attn.o.weight),
    "layers.1.ffn.experts.w13 is torch.float64": lambda m: m.layers[1].ffn.experts.double(),
    "layers differ": lambda m: replaced(m, router=Router(24, 8, 2)),
    "in another order": lambda m: setattr(m, "layers", nn.ModuleList([*m.layers][::-1])),
    "norm.weight is torch.float32 on cpu, (0,)": lambda m: setattr(m.norm, "weight", nn.Parameter(torch.empty(0))),
    "the model is a Own": lambda m: setattr(m, "__class__", Own),
    "norms differ": lambda m: setattr(m.norm, "eps", 1e-3),
    "training mode": lambda m: m.train(),
}


@pytest.mark.parametrize("why", VARIANTS)
def test_what_is_not_the_stock_model_is_named_and_decoded_by_pytorch(model, why):
    assert native.why_not(model, cache_of(model)) == ""
    VARIANTS[why](model)
    assert why in native.why_not(model, cache_of(model))
    assert native.stepper(model, cache_of(model)) is None


def test_other_paths_dtypes_and_caches_are_named(model, ops_path):
    assert "float16" in native.why_not(model, LatentCache.for_model(model.config, 1, 4, dtype=torch.float16))
    with torch.autocast("cpu", torch.bfloat16):
        assert native.why_not(model, cache_of(model)) == "autocast is on"
    ops_path("torch")
    assert native.why_not(model, cache_of(model)) == "the path is torch"
    ops_path("auto")
    model.double()
    assert native.why_not(model, cache_of(model)) == "the path is torch"


def test_a_variant_generates_what_the_pytorch_path_generates(model, ops_path, monkeypatch):
    model.layers[1].ffn.router.__class__ = Odd
    monkeypatch.setattr(native, "Stepper", None)  # nobody makes one
    tokens = moe.generate(model, PROMPTS, 6).tokens
    ops_path("torch")
    assert tokens == moe.generate(model, PROMPTS, 6).tokens


def test_what_is_not_a_number_is_told_by_its_prompt(model):
    steps = []

    def spoil(i, token):
        steps.append(token)
        if len(steps) == 3:
            model.norm.weight.data[3] = float("nan")

    with pytest.raises(UserError, match="prompt 0: the model's logits are not finite at token 3"):
        moe.generate(model, [[1, 2]], 6, stream=spoil)
