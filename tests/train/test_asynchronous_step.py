"""A training step on the Triton path queues its work and reads nothing back, so that a GPU never stands still."""

import pytest
import torch

from moe import Transformer
from moe.config import ModelConfig, OptimConfig, TrainConfig
from moe.layers.router import Router
from moe.objectives import Pretraining
from moe.ops import paths
from moe.parallel import Ranks
from moe.train.engine import Engine
from tests.asynchronous import Asynchronous

CONFIG = ModelConfig.preset(
    "tiny", vocab_size=32, hidden_size=16, num_hidden_layers=2, intermediate_size=24, moe_intermediate_size=8,
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, num_attention_heads=2, q_lora_rank=8,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
)  # fmt: skip


@pytest.fixture
def engine(monkeypatch, ops_path):
    ops_path("triton")
    monkeypatch.setattr(paths, "_selected", "auto")  # the engine selects for the whole process
    monkeypatch.setattr(paths, "_verdicts", {("cpu", None, torch.float32): ""})
    ranks = Ranks(0, 1, torch.device("cpu"))
    return Engine(Pretraining(Transformer(CONFIG)), OptimConfig(), TrainConfig(ops="triton"), ranks)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_reads_nothing_back(engine, packed):
    """All of it but the norm: `Engine.step` reads that one number, to skip a step that is not finite."""
    tokens = torch.randint(32, (2, 9))
    segments = torch.arange(9).expand(2, -1) // 4 if packed else None
    before = [p.clone() for p in engine.parameters]
    with Asynchronous():
        for _ in range(2):
            losses = engine.forward_backward(tokens, segments, None, 32.0, 0, 2, 0.3)
        norm = engine.reduce()
        engine._update(0.5)
    assert losses.loss.isfinite() and norm > 0
    assert all((a != b).any() for a, b in zip(before, engine.parameters))


def test_a_layer_that_waits_is_noticed(engine, monkeypatch):
    choose = Router.choose
    monkeypatch.setattr(Router, "choose", lambda self, s, bias: choose(self, s, bias) + 0 * int(s.argmax()))
    monkeypatch.setattr(paths, "path_for", lambda x: "torch")
    with pytest.raises(AssertionError, match="waits for the device"), Asynchronous():
        engine.forward_backward(torch.randint(32, (2, 9)), None, None, 16.0)


def test_what_refuses_waiting_refuses_it():
    for wait in (
        lambda t: int(t.sum()),
        lambda t: t[t > 0],
        lambda t: torch.bincount(t.long()),
        lambda t: t.nonzero(),
    ):
        with pytest.raises(AssertionError, match="wait"), Asynchronous():
            wait(torch.ones(3))
