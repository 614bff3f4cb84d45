"""ZeRO by DeepSpeed behind the methods of `Engine`: each rank keeps its part of masters, moments, gradients, weights.

    stage   spread over ranks                        reduced
    1       fp32 masters and moments                 in `reduce`, once a step
    2       and gradients                            after each micro-batch
    3       and weights, fetched module by module    after each micro-batch; an MoE layer is fetched whole

DeepSpeed runs the backward pass, the reduction and AdamW over flat partitions; norm, clipping and the decision about a
step that is not finite are ours, so that they equal the plain engine's. It averages over ranks where we sum: the loss
is multiplied by their number first. Sums are in fp32, under bf16 too. Source: ZeRO, arXiv 1910.02054.

Public names relied on: initialize, set_z3_leaf_modules, GatheredParameters, safe_get_full_*, safe_set_*, and of the
engine set_gradient_accumulation_boundary, allreduce_gradients, backward, step, was_step_applied. Private ones, hence
the narrow range of versions:

    averaged_gradients, finalize_gradient_accumulation_boundary                      gradients, stages 1 and 2
    fp32_groups_gradient_flat_partition                                              the same, stage 1 under bf16
    averaged_gradients, grad_partitions_flat_buffer, ds_tensor                       gradients and weights, stage 3
    FLATS, _lazy_init_hp_params_optimizer_state                                      where masters and moments live
    ops.__compatible_ops__                                                           so that no compiler is called

Not here: offloading, expert parallelism, DeepSpeed's own checkpoints (pickles, and bound to one number of ranks),
torch.compile.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import OptimConfig, TrainConfig, UserError
from moe.layers.moe import MoE
from moe.train.engine import Engine, by_parameter
from moe.train.optim import adamw

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
MOMENTS = ("exp_avg", "exp_avg_sq")
FLATS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
BUCKET = 50_000_000  # elements of one message; DeepSpeed's own 500 million would be 2 GB of buffer


class Zero(Engine):
    """Engine for more than one rank and train.zero_stage 1, 2 or 3.

    Every method is called by all ranks together, `forward_backward` equally often: stages 2 and 3 talk in each.
    """

    def _build(self, optim: OptimConfig, train: TrainConfig) -> None:
        self.stage = train.zero_stage
        if train.compile:
            raise UserError(f"train.compile=true does not work with train.zero_stage={self.stage}; set one of them off")
        deepspeed = _deepspeed(self.stage, self.ranks.device)
        deepspeed.utils.set_z3_leaf_modules(self.objective, [MoE], raise_if_not_found=False)
        exact = {n: p.detach().cpu().clone() for n, p in self.named.items()} if self.mixed else {}
        optimizer = adamw(list(self.named.values()), optim)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory
            self.ds = deepspeed.initialize(model=self.objective, optimizer=optimizer, config=self._config())[0]
        self.ds.set_gradient_accumulation_boundary(False)
        self.zero = self.ds.optimizer
        self.optimizer = self.zero.optimizer  # ours, now over flat partitions
        self.flats: list[Tensor] = next(getattr(self.zero, name) for name in FLATS if hasattr(self.zero, name))
        for name, value in exact.items():  # it has rounded its masters with the working copy
            self._put(self.named[name], value)
        self._make_moments()
        self.checked = False

    def _config(self) -> dict[str, Any]:
        elements = sum(p.numel() for p in self.named.values())
        return {
            "train_micro_batch_size_per_gpu": 1,  # feeds its own sample counter only
            "gradient_accumulation_steps": 1,  # its divisor of the loss
            "gradient_clipping": 0.0,  # `step` clips
            "steps_per_print": 1 << 40,
            "bf16": {"enabled": self.mixed},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": min(BUCKET, elements),
                "stage3_prefetch_bucket_size": min(BUCKET, elements),
                "stage3_param_persistence_threshold": 0,  # one kind of parameter: none stays whole
            },
        }

    def forward_backward(self, *batch: Any) -> Any:
        losses = self.ds(*batch)
        self.ds.backward(losses.loss * self.ranks.world)
        return losses

    def gradients(self) -> dict[str, Tensor | None]:
        return {n.removeprefix("model."): _full_gradient(p) for n, p in self.named.items()}

    @torch.no_grad()
    def reduce(self) -> Tensor:
        self.ds.set_gradient_accumulation_boundary(True)
        if self.stage == 1:
            self.ds.allreduce_gradients()
        elif self.stage == 2:
            self.zero.finalize_gradient_accumulation_boundary()
        squares = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._shards())).double()) ** 2
        self.ranks.all_reduce([squares])  # NaN and infinity of any rank reach all
        return squares.sqrt()

    def _shards(self) -> list[Tensor]:
        """This rank's part of the summed gradients; no element is on two ranks."""
        if hasattr(self.zero, "fp32_groups_gradient_flat_partition"):
            return list(self.zero.fp32_groups_gradient_flat_partition)
        return [g for group in self.zero.averaged_gradients.values() for g in group]

    def _update(self, scale: float) -> None:
        graded = [] if self.checked else [n for n, p in self.named.items() if bool(_full_gradient(p).any())]
        if scale != 1.0:
            torch._foreach_mul_(self._shards(), scale)
        self.ds.step()
        assert self.ds.was_step_applied(), "DeepSpeed skipped a step whose norm is finite"
        if not self.checked:
            self._check_first_step(graded)

    def _drop_gradients(self) -> None:
        self.ds.set_gradient_accumulation_boundary(False)
        self.zero.zero_grad()
        if self.stage == 3:  # or a parameter that the next step does not use would keep this step's gradient
            self.zero.grad_partitions_flat_buffer.zero_()
        elif hasattr(self.zero, "averaged_gradients"):  # stage 2 under bf16 adds to what it finds
            self.zero.averaged_gradients.clear()

    def _check_first_step(self, graded: list[str]) -> None:
        """Every parameter with a gradient has moved: AdamW has taken it up, and the forward pass sees the new master."""
        for name in graded:
            p = self.named[name]
            with self._whole([p]):
                seen = torch.equal(p, self._get(p).to(p.dtype))
            if not seen or not bool(self._get(p, MOMENTS[0]).any()):
                raise RuntimeError(
                    f"train.zero_stage={self.stage}: {name} has a gradient, but the first step did not move it; this "
                    "DeepSpeed does not see every parameter, so use train.zero_stage=0"
                )
        self.checked = True

    # -------------------------------------------------------------------------------------------------------- weights

    def _whole(self, parameters: list[nn.Parameter], write: bool = False) -> Any:
        """Context in which these have their full shape; `write`: rank 0's change is everybody's afterwards."""
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        if self.stage < 3:
            yield self.objective.model
            return
        kept = [(m, hooks, getattr(m, hooks)) for m in self.objective.modules() for hooks in HOOKS]
        try:
            for module, hooks, _ in kept:  # they would release the weights after use, and reduce gradients
                setattr(module, hooks, OrderedDict())
            with self._whole(list(self.named.values())):
                yield self.objective.model
        finally:
            for module, hooks, before in kept:
                setattr(module, hooks, before)

    # ---------------------------------------------------------------------------------------------------------- state

    def _get(self, p: nn.Parameter, key: str | None = None) -> Tensor:
        """Whole fp32 master of p, or one of its moments."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)

    def _put(self, p: Any, value: Tensor, key: str | None = None) -> None:
        """Inverse of `_get`, from the whole value on every rank."""
        from deepspeed import utils

        where = "full"
        if self.stage == 3:  # safe_set_full_* cannot pad: sizes that ranks do not divide fail there
            size, where = p.ds_tensor.numel(), "local"
            value = F.pad(value.flatten(), (0, size * self.ranks.world - value.numel()))
            value = value[size * self.ranks.rank : size * (self.ranks.rank + 1)]
        if key is None:
            getattr(utils, f"safe_set_{where}_fp32_param")(p, value)
        else:
            getattr(utils, f"safe_set_{where}_optimizer_state")(p, value, key)

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        step = self.optimizer.state[self.flats[0]]["step"]

        def keep(name: str, value: Tensor) -> None:
            if self.ranks.first:
                tensors[name] = value.cpu()

        weights: dict[nn.Parameter, Tensor] = {}
        for name, p in self.named.items():
            master = self._get(p)
            if self.ranks.first:
                weights[p] = master.to(p.dtype)
            if self.mixed:
                keep(f"optim/{name}/master", master)
            if step > 0:
                keep(f"optim/{name}/step", step.clone())
                for key in MOMENTS:
                    keep(f"optim/{name}/{key}", self._get(p, key))
        if self.ranks.first:
            for name, value in self.objective.model.state_dict(keep_vars=True).items():
                keep(f"model/{name}", weights[value] if isinstance(value, nn.Parameter) else value)
        return tensors

    @torch.no_grad()
    def load(self, model: dict[str, Tensor], optim: dict[str, Tensor]) -> None:
        saved = by_parameter(self.named, optim)
        steps = {float(own.get("step", 0.0)) for own in saved.values()}
        if len(steps) > 1:
            raise UserError(
                f"this checkpoint's parameters took different numbers of steps ({sorted(steps)}), which "
                f"train.zero_stage={self.stage} cannot hold; resume it with train.zero_stage=0"
            )
        with self._whole(list(self.named.values()), write=True):
            self.objective.model.load_state_dict(model)
        for flat in self.flats:
            self.optimizer.state[flat]["step"].fill_(min(steps))
        for name, own in saved.items():
            p = self.named[name]
            master = own["master"] if self.mixed else model[name.removeprefix("model.")]
            self._put(p, master)
            for key in MOMENTS:
                self._put(p, own.get(key, torch.zeros_like(master)), key)

    def _make_moments(self) -> None:
        """AdamW's state as before its first step. Left to itself DeepSpeed links the first group's alone."""
        for flat in self.flats:
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()


def _full_gradient(p: nn.Parameter) -> Tensor:
    """Between `reduce` and `step`, by all ranks: the whole summed gradient of p, fp32."""
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(p)


def _deepspeed(stage: int, device: torch.device) -> Any:
    """DeepSpeed, made quiet, without its compiled message passing for CPUs, or a UserError."""
    need = f"train.zero_stage={stage} needs deepspeed 0.19.8 or a later 0.19"
    mend = "pip install 'deepspeed>=0.19.8,<0.20', or set train.zero_stage=0"
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # names it still uses
    try:
        import deepspeed
    except ImportError:
        raise UserError(f"{need}, and none is installed; {mend}") from None
    found = tuple(int(n) for n in re.findall(r"\d+", deepspeed.__version__)[:3])
    if not (0, 19, 8) <= found < (0, 20):
        raise UserError(f"{need}, and {deepspeed.__version__} is installed; {mend}")
    deepspeed.utils.logger.setLevel("ERROR")
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    if "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    return deepspeed
