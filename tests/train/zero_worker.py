"""What test_engine.py has two ranks do, and one process for comparison: `torchrun zero_worker.py FOLDER`.

It writes figures and states into FOLDER; the test judges them.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.analysis.diagnostics import router_language_gradients
from moe.config import ModelConfig, OptimConfig, TrainConfig, UserError
from moe.layers.router import ROUTERS, Router
from moe.model import Transformer
from moe.objectives import Pretraining, count_targets
from moe.parallel import session
from moe.train.engine import build

ROWS, MICRO, TIME, VOCAB = 8, 2, 12, 37
OPTIM = OptimConfig(lr=0.01, eps=1e-3, grad_clip=0.3)  # a large eps: Adam's sign would blow rounding up
BF16, AGAIN = {"precision": "bf16"}, {"activation_checkpointing": True}
RUNS = [
    *((f"stage{stage}", stage, {}) for stage in range(4)),
    *((f"bf16-{stage}", stage, BF16) for stage in (1, 2, 3)),
    ("again-3", 3, AGAIN),
]
RESUMES = [  # the state after step 3 of one run, in an engine of another stage; `one` is the single process
    ("stage3-3", "3to1", 1, {}),
    ("stage1-3", "1to2", 2, {}),
    ("one-3", "1rank-to3", 3, {}),
    ("stage2-3", "2to0", 0, {}),
    ("bf16-1-3", "bf16-1to3", 3, BF16),
    ("bf16-3-3", "bf16-3to1", 1, BF16),
]
PROBE = torch.arange(24).view(2, 12)


class Planted(Router):
    """Even tokens go to experts 1-3, odd ones to 4-6; 0 and 7 get none. Only while `on`."""

    on = False

    def forward(self, x, mask=None, token_ids=None, replay=None, keep_scores=False):
        if self.on and replay is None:
            replay = torch.arange(1, 4) + 3 * (token_ids % 2).unsqueeze(-1)
        return super().forward(x, mask, token_ids, replay, keep_scores)


ROUTERS["planted"] = Planted.from_config


def objective(seed):
    """Odd sizes, so that ranks do not divide them."""
    torch.manual_seed(seed)
    config = ModelConfig(
        name="zero-test", vocab_size=VOCAB, hidden_size=25, num_hidden_layers=2, first_k_dense_replace=1,
        intermediate_size=20, num_attention_heads=2, q_lora_rank=11, kv_lora_rank=13, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=5, max_position_embeddings=64, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=3, moe_intermediate_size=7, n_group=4, topk_group=2, num_nextn_predict_layers=1,
        seq_aux_alpha=0.01, initializer_range=0.2, router="planted",
    )  # fmt: skip
    return Pretraining(Transformer(config))


def engine(seed, ranks, stage, **changes):
    return build(objective(seed), OPTIM, TrainConfig(zero_stage=stage, **changes), ranks)


def rows(seed, step):
    """[ROWS, TIME + 1] of the global batch; in step 3 the first half has even tokens only, the second odd ones."""
    tokens = torch.randint(0, VOCAB - 1, (ROWS, TIME + 1), generator=torch.Generator().manual_seed(seed * 100 + step))
    if step == 3:
        tokens = tokens // 2 * 2 + (torch.arange(ROWS) >= ROWS // 2).long().unsqueeze(1)
    return tokens


def step(e, seed, number, poison=False, health=False):
    """One whole step over this rank's rows; -> its figures. Step 2 leaves MTP out, step 3 starves experts and ranks."""
    Planted.on = number == 3
    batch, share = rows(seed, number), ROWS // e.ranks.world
    divisor, loss = float(count_targets(batch)), torch.zeros((), dtype=torch.float64)
    for first in range(e.ranks.rank * share, (e.ranks.rank + 1) * share, MICRO):
        bad = poison and first == ROWS - MICRO  # the last micro-batch of the last rank
        out = e.forward_backward(
            batch[first : first + MICRO], None, None, math.nan if bad else divisor, first, ROWS,
            0.0 if number == 2 else 0.3,
        )  # fmt: skip
        loss += out.loss.detach().double()
    norm = e.reduce()
    e.ranks.all_reduce([loss])
    found = {"loss": float(loss), "norm": float(norm)}
    if health:  # as the trainer does, between reduce and step
        found["gradients"] = {n: float(g.double().norm()) for n, g in e.gradients().items()}
        with e.gathered():
            found["language"] = router_language_gradients(e.objective, batch[:1])
    return found | {"applied": e.step(OPTIM.lr, norm)}


def logits(e):
    """On every rank, and rank 0 alone once more: inside `gathered` ranks need not keep step."""
    e.objective.eval()
    with torch.no_grad(), e.gathered() as model:
        found = model(PROBE).logits
        if e.ranks.first:
            assert torch.equal(model(PROBE).logits, found)
    e.objective.train()
    return found


def save(folder, name, tensors, figures):
    if tensors:
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(figures))


def halves(tensors):
    return [{k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)} for p in ("model/", "optim/")]


def train(folder, name, seed, e):
    """Steps 1-3, a poisoned one, step 4: states before (NAME-0), after 3 (-3), after the poison (-nan), at the end."""
    save(folder, f"{name}-0", e.state(), [])
    began = time.perf_counter()
    figures = [step(e, seed, 1, health=True), *(step(e, seed, n) for n in (2, 3))]
    save(folder, f"{name}-3", e.state(), figures)
    unsound = step(e, seed, 4, poison=True)
    save(folder, f"{name}-nan", e.state(), unsound)
    seen = logits(e)
    if e.ranks.first:
        save(folder, f"{name}-logits", {"logits": seen}, [])
    figures.append(step(e, seed, 4))
    save(folder, name, e.state(), figures)
    return time.perf_counter() - began


def resume(folder, source, name, seed, e):
    """Step 4 from the state after 3 of another run, on weights and moments that have nothing to do with it."""
    step(e, seed + 1, 1)
    e.load(*halves(load_file(folder / f"{source}.safetensors")))
    save(folder, f"{name}-loaded", e.state(), [])
    figures = step(e, seed, 4)
    save(folder, name, e.state(), figures)


def blind(ranks, seed, stage):
    """-> what the engine says when vectors' gradients never reach AdamW."""
    e = engine(seed, ranks, stage)
    update = e.optimizer.step

    def without_vectors():
        for group in e.optimizer.param_groups:
            for p in group["params"]:
                if group["weight_decay"] == 0:
                    p.grad.zero_()
        update()

    e.optimizer.step = without_vectors
    with pytest.raises(RuntimeError) as blind:
        step(e, seed, 1)
    return str(blind.value)


def uneven(ranks, seed, stage):
    """-> what the engine says to a state whose parameters took different numbers of steps."""
    e = engine(seed, ranks, stage)
    steps = {f"{name}/step": torch.tensor(float(i % 2 + 3)) for i, name in enumerate(e.named)}
    with pytest.raises(UserError) as refused:
        e.load({}, steps)
    return str(refused.value)


def main():
    folder, seed, seconds = Path(sys.argv[1]), int(sys.argv[2]), {}
    with session(TrainConfig(device="cpu", threads=1)) as ranks:
        for name, stage, changes in RUNS:
            began = time.perf_counter()
            e = engine(seed, ranks, stage, **changes)
            seconds[name] = [time.perf_counter() - began, train(folder, name, seed, e)]
        for source, name, stage, changes in RESUMES:
            resume(folder, source, name, seed, engine(seed + 1, ranks, stage, **changes))
        rest = {
            "blind": [blind(ranks, seed, stage) for stage in (1, 2, 3)],
            "uneven": uneven(ranks, seed, 2),
            "seconds": seconds,
        }
        if ranks.first:
            (folder / "rest.json").write_text(json.dumps(rest))
        ranks.barrier()  # nobody hangs up while another still writes


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as moe.train.log.entry does, and for its reason
