"""Models by the folder they lie in: a run folder, a Hugging Face folder, and folders that are neither."""

import dataclasses
import warnings

import pytest
import torch
import yaml

from moe.config import UserError
from moe.data.tokenizer import Tokenizer
from moe.interop.hf import to_hf
from moe.model import Transformer
from moe.train import checkpoint
from moe.train.pretrained import load_model, model_values, start_from

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 330)


@pytest.fixture
def model(small):
    return Transformer(small(vocab_size=340)).eval()


@pytest.fixture
def run(model, tokenizer, tmp_path):
    """A run folder as the trainer leaves it."""
    folder = tmp_path / "run"
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
    checkpoint.save(folder / "checkpoints", 3, tensors, {}, keep=1)
    values = {"model": {"preset": None, **dataclasses.asdict(model.config)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def exported(model, tokenizer, tmp_path):
    to_hf(model, tmp_path / "export", tokenizer=tokenizer)
    return tmp_path / "export"


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_a_folder_gives_its_model_without_mtp_and_its_tokenizer(kind, model, tokenizer, request, agree):
    found = load_model(request.getfixturevalue(kind))
    tokens = torch.randint(0, 340, (2, 9))
    with torch.no_grad():
        agree(found.model(tokens).logits, model(tokens).logits, 1e-6)
    assert len(found.model.mtp) == 0 and not found.model.training
    assert found.tokenizer.fingerprint == tokenizer.fingerprint


def test_a_run_without_its_own_tokenizer_takes_that_of_its_export(run, model, tokenizer):
    (run / "tokenizer.json").unlink()
    to_hf(model, run / "export", tokenizer=tokenizer)
    assert load_model(run).tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_a_new_model_starts_from_weights_and_router_biases(kind, model, request):
    for router in (m for n, m in model.named_modules() if n.endswith("router")):
        router.bias.normal_()
    folder = request.getfixturevalue(kind)  # made after the biases moved
    other = Transformer(model.config)
    start_from(other, folder)
    for (name, mine), theirs in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_mtp_may_be_dropped_or_fresh_at_the_start(run, small, model):
    without = Transformer(dataclasses.replace(model.config, num_nextn_predict_layers=0))
    start_from(without, run)
    more = Transformer(dataclasses.replace(model.config, num_nextn_predict_layers=2))
    fresh = {k: v.clone() for k, v in more.mtp[1].state_dict().items()}
    start_from(more, run)
    assert torch.equal(more.mtp[0].norm.weight, model.mtp[0].norm.weight)
    assert all(torch.equal(v, fresh[k]) for k, v in more.mtp[1].state_dict().items())


def test_another_architecture_is_named_by_its_knob(run, small):
    with pytest.raises(UserError, match=r"model\.n_routed_experts=16, but the model in .* has 8"):
        start_from(Transformer(small(vocab_size=340, n_routed_experts=16)), run)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda f: (f / "config.yaml").unlink(), "neither config.yaml"),
        (lambda f: (f / "config.yaml").write_text("model: 3"), "config.yaml is damaged"),
        (lambda f: (f / "config.yaml").write_text("model: {hidden_sizes: 3}"), "config.yaml is damaged"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "checkpoints/step-00000003").rename(f / "gone"), "no checkpoint yet"),
        (lambda f: (f / "checkpoints/step-00000003/model.safetensors").write_bytes(b"x"), "none of the 1 checkpoints"),
    ],
)
def test_a_damaged_folder_costs_one_line(run, harm, message):
    harm(run)
    with warnings.catch_warnings():  # a damaged checkpoint is also told on its own
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=message):
            load_model(run)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist; name the folder of a finished run"):
        model_values(tmp_path / "nowhere")
