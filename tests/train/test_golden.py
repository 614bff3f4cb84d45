"""A refactor may not move the loss: the first steps of `tiny` on fixed tokens, fp32, one thread.

MOE_UPDATE_GOLDEN=1 writes tests/golden/tiny.txt anew; a commit that does so says why in LOG.md.
"""

import os
from pathlib import Path

import pytest
import torch

from moe import ModelConfig, Transformer
from moe.config import OptimConfig, TrainConfig, value_at
from moe.objectives import Pretraining, count_targets
from moe.parallel import Ranks
from moe.train.engine import Engine

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny.txt"
STEPS = 6


def curve():
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(1234)
    config = ModelConfig.preset("tiny")
    objective = Pretraining(Transformer(config))
    engine = Engine(objective, OptimConfig(lr=3e-3), TrainConfig(), Ranks(0, 1, torch.device("cpu")))
    lines = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = (config.vocab_size ** torch.rand(4, 129, generator=generator) - 1).long()
        segments = (torch.arange(129) // 50).expand(4, 129)
        out = engine.forward_backward(tokens, segments, None, float(count_targets(tokens, segments)), 0, 4, 0.3)
        norm = float(engine.reduce())
        engine.step(3e-3, norm)
        for name, state in out.balance.items():
            router = objective.model.get_submodule(f"{name}.block.ffn.router" if "mtp" in name else f"{name}.ffn.router")
            speed = value_at(config.bias_update_speed, 0.0)
            router.bias.copy_(objective.balancer.update(state, router.bias, speed))
        main = out.sums["loss"] / out.sums["tokens"]
        ahead = out.sums["mtp"] / out.sums["mtp_tokens"]
        busiest = max(int(state["counts"].max()) for state in out.balance.values())
        lines.append([float(main), float(ahead), float(out.sums["balance"]), norm, float(busiest)])
    return lines


def test_the_first_steps_of_tiny_are_where_they_were():
    """Tolerances hold what another CPU's matrix products may differ by after a few steps of Adam."""
    found = curve()
    if os.environ.get("MOE_UPDATE_GOLDEN"):
        GOLDEN.write_text("".join(" ".join(f"{x:.7g}" for x in line) + "\n" for line in found))
    wanted = [[float(x) for x in line.split()] for line in GOLDEN.read_text().splitlines()]
    assert len(wanted) == STEPS
    for step, (a, b) in enumerate(zip(found, wanted)):
        assert a[:2] == pytest.approx(b[:2], rel=1e-4 if step < 2 else 3e-3), step
        assert a[2:4] == pytest.approx(b[2:4], rel=2e-3 if step < 2 else 5e-2), step
        assert a[4] == pytest.approx(b[4], rel=0.02 if step < 2 else 0.1), step
