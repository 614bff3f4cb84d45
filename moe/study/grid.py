"""A study's YAML -> its runs, each resolved and checked before the first one starts.

    study:  name, question, recipe, seeds, baseline, metrics, claims ...     StudyConfig, Metric, Claim
    arms:   {bias: {model.balance: bias}, ...}        named arms; or instead
    vary:   {model.balance: [bias, aux], ...}         the full grid of these values, an arm each
    model:, data:, train: ...                         what all runs share: sections of the recipe

A cell is one arm with one seed; `train.seed` sets initialisation and data order and is the same in every arm. Its folder
carries the hash of its resolved configuration, so that a study with more arms finds the runs it already has.
Not here: starting them (sweep.py), judging them (statistics.py, report.py).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe.config import PretrainConfig, Section, UserError, fingerprint, knob, nearest, resolve
from moe.config.load import leaf_types, merge, nest, parse_value, read_yaml
from moe.config.recipes import FinetuneConfig, GrpoRecipe, Recipe
from moe.model import Transformer
from moe.objectives import Pretraining
from moe.objectives.reinforcement import check_loss
from moe.train.finetune import make_task
from moe.train.optim import learning_rate
from moe.train.pretrained import model_values

SCHEMAS = {"pretrain": PretrainConfig, "sft": FinetuneConfig, "grpo": GrpoRecipe}  # recipes that end in a summary.json


@dataclass
class StudyConfig(Section):
    section = "study"

    name: str = knob("study", "names the folder and the report")
    question: str = knob("", "what is asked, in a sentence or two: the report begins with it")
    recipe: str = knob("pretrain", "what each run is: a file of recipes/", choices=list(SCHEMAS))
    seeds: Any = knob([0, 1, 2], "values of train.seed, or their number; every arm runs with each")
    baseline: str | None = knob(None, "arm that the others are compared with; null: the first")
    metrics: Any = knob([], "what is compared: [{name: val/loss, better: lower, margin: 0.01}, ...]")
    claims: Any = knob([], "expected beforehand: [{metric: val/loss, arm: bias, expect: no_worse}, ...]")
    limits: Any = knob([], "what this study cannot tell, for the report: a list of sentences")
    level: float = knob(0.95, "confidence of the intervals, over all arms of a metric together", gt=0, lt=1)
    folder: str | None = knob(None, "study folder; the same command goes on in it; null: runs/study-<name>")
    parallel: int = knob(1, "runs at a time", ge=1)
    threads: int = knob(1, "CPU threads of each run, unless train.threads says otherwise", ge=1)
    report_only: bool = knob(False, "write the report from what is finished; start nothing")
    dry_run: bool = knob(False, "print the runs with parameters and expected time, then stop (--dry-run)")


@dataclass
class Metric(Section):
    """A figure of summary.json, or of metrics.jsonl: then its mean over the last tenth of the steps."""

    section = "study.metrics"

    name: str = knob("val/loss", "key in summary.json or metrics.jsonl")
    label: str = knob("", "its name in the report")
    better: str = knob("lower", "which way is better", choices=["lower", "higher"])
    scale: str = knob("difference", "arms differ by an amount, or by a factor", choices=["difference", "ratio"])
    margin: float | None = knob(None, "what still counts as no difference: an amount, or a factor from 1 on", ge=0)
    spread: str = knob("own", "see moe/study/statistics.py", choices=["own", "pooled"])
    compare: bool = knob(True, "false: shown for each arm, not compared")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale == "ratio" and self.margin is not None and self.margin < 1:
            raise UserError(
                f"study.metrics: margin={self.margin} of {self.name} is a factor; write 1.1 for ten per cent"
            )

    def working(self, value: float) -> float:
        """The scale on which differences are taken."""
        if self.scale == "difference":
            return value
        if value <= 0:
            raise UserError(f"study.metrics: {self.name}={value} has no ratio; write scale: difference")
        return math.log(value)

    def distance(self, amount: float | None) -> float:
        """A margin or a claim's `by` on the working scale; None is none."""
        return 0.0 if amount is None else math.log(amount) if self.scale == "ratio" else amount


@dataclass
class Claim(Section):
    section = "study.claims"

    metric: str = knob("val/loss", "one of study.metrics")
    arm: str = knob("", "the arm that is said to differ, or not, from the baseline")
    expect: str = knob("no_worse", "see moe/study/statistics.py", choices=["no_worse", "better", "equivalent"])
    by: float | None = knob(None, "better by at least this amount, or on the scale ratio by this factor", gt=0)
    text: str = knob("", "the claim in words, and whose it is")


@dataclass
class StudySchema(Recipe):
    study: StudyConfig = field(default_factory=StudyConfig)

    def __post_init__(self) -> None:
        """Sections check themselves."""


class Cell(NamedTuple):
    arm: str
    seed: int
    config: Any
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"


class Study(NamedTuple):
    settings: StudyConfig
    folder: Path
    arms: dict[str, dict[str, Any]]
    """What each arm changes: dotted key -> value. The first is the baseline."""
    shared: dict[str, Any]
    """What all runs say besides the defaults."""
    metrics: list[Metric]
    claims: list[Claim]
    cells: list[Cell]

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))


def load_study(argv: list[str]) -> Study:
    """`config=FILE`, then dotted values for the study or for all runs -> a Study. Raises UserError, naming all bad cells."""
    raw = _gather(argv)
    settings = resolve(StudySchema, {"study": raw.pop("study", {})}).study
    arms, seeds = _arms(raw.pop("arms", None), raw.pop("vary", None)), _seeds(settings.seeds)
    first = settings.baseline if settings.baseline is not None else next(iter(arms))
    if first not in arms:
        raise UserError(f"study.baseline={first!r} is not one of the arms {list(arms)}{nearest(first, arms)}")
    arms = {first: arms[first]} | arms
    folder = Path(settings.folder or f"runs/study-{settings.name}")
    metrics = _entries(Metric, settings.metrics or [{"name": "val/loss"}])
    names = [m.name for m in metrics]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"study.metrics: {name} stands twice; leave one out")
    claims = _entries(Claim, settings.claims)
    for claim in claims:
        for what, value, known in (
            ("metric", claim.metric, [m.name for m in metrics if m.compare]),
            ("arm", claim.arm, [*arms][1:]),
        ):
            if value not in known:
                raise UserError(f"study.claims: {what}={value!r} is not one of {known}{nearest(value, known)}")
    return Study(settings, folder, arms, raw, metrics, claims, _cells(settings, arms, seeds, raw, folder))


def _gather(argv: list[str]) -> dict[str, Any]:
    """The YAML with its parents, and over it the command line; plain values."""
    files, pairs = [], []
    for arg in argv:
        key, eq, value = {"--dry-run": "study.dry_run=true"}.get(arg, arg.removeprefix("--")).partition("=")
        if not eq or not key:
            raise UserError(f"{arg!r} is not key=value; write for example study.parallel=2, or --help")
        if key == "config":
            files.append(value)
        else:
            pairs.append((key, value))
    if len(files) != 1:
        raise UserError("name one study: config=recipes/ablations/balance.yaml")
    raw: dict[str, Any] = {}
    for layer in read_yaml(files[0]):
        merge(raw, layer)
    recipe = str((raw.get("study") or {}).get("recipe", "pretrain"))
    types = leaf_types(StudySchema) | leaf_types(SCHEMAS.get(recipe, PretrainConfig))
    for key, value in pairs:
        merge(raw, nest(key, parse_value(key, value, types)))
    return raw


def _arms(named: Any, grid: Any) -> dict[str, dict[str, Any]]:
    if (named is None) == (grid is None):
        raise UserError("a study has either arms: {name: {dotted.key: value}} or vary: {dotted.key: [values]}")
    if named is not None:
        if not isinstance(named, dict) or not named or any(not isinstance(v or {}, dict) for v in named.values()):
            raise UserError("arms: must hold one mapping a name, such as bias: {model.balance: bias}")
        return {str(name): dict(changes or {}) for name, changes in named.items()}
    if not isinstance(grid, dict) or not grid or any(not isinstance(v, list) or not v for v in grid.values()):
        raise UserError("vary: must hold a list of values for each dotted key, such as model.aux_alpha: [0.001, 0.01]")
    arms = {}
    for values in itertools.product(*grid.values()):
        changes = dict(zip(grid, values))
        arms[" ".join(f"{key.split('.')[-1]}={json.dumps(v).strip(chr(34))}" for key, v in changes.items())] = changes
    return arms


def _seeds(seeds: Any) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    if not isinstance(chosen, list) or not chosen or any(not isinstance(s, int) or s < 0 for s in chosen):
        raise UserError(f"study.seeds={seeds} must be a number of seeds, or a list such as [0, 1, 2]")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"study.seeds={seeds} names a seed twice; leave one out")
    return chosen


def _entries(kind: type, raw: Any) -> list:
    names = [f.name for f in fields(kind)]
    key = kind.section  # type: ignore[attr-defined]
    if not isinstance(raw, list) or any(not isinstance(entry, dict) for entry in raw):
        raise UserError(f"{key} must be a list of mappings with the keys {names}")
    for entry in raw:
        for name in entry:
            if name not in names:
                raise UserError(f"{key}: {name} is not a key{nearest(name, names)}; there are {names}")
    return [kind(**entry) for entry in raw]


def _cells(
    settings: StudyConfig, arms: dict[str, dict], seeds: list[int], shared: dict[str, Any], folder: Path
) -> list[Cell]:
    """Seeds in the outer loop: a study that is stopped early has whole comparisons."""
    cells: list[Cell] = []
    wrong: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for seed, (arm, changes) in itertools.product(seeds, arms.items()):
        for key in ("train.seed", "run.dir"):
            if key in changes:
                raise UserError(f"arms: {arm} sets {key}, which the study sets for each run; use study.seeds or study.folder")
        values: dict[str, Any] = {"train": {"threads": settings.threads}}
        for layer in (shared, *(nest(str(key), value) for key, value in changes.items()), {"train": {"seed": seed}}):
            merge(values, json.loads(json.dumps(layer)))
        try:
            config = resolve(SCHEMAS[settings.recipe], values, model_values)
            _check(config)
        except UserError as error:
            wrong.setdefault(str(error), []).append(f"{arm} seed {seed}")
            continue
        cell = Cell(arm, seed, config, _folder(folder, f"{arm}-seed{seed}", fingerprint(config)))
        twin = seen.setdefault(fingerprint(config), cell.name)
        if twin != cell.name:
            wrong.setdefault(f"the same run as {twin}; leave one arm out", []).append(cell.name)
        cells.append(cell)
    if wrong:
        count, total = sum(map(len, wrong.values())), len(arms) * len(seeds)
        told = "; ".join(f"[{', '.join(names)}] {message}" for message, names in wrong.items())
        raise UserError(f"{count} of {total} runs cannot be made, none was started: {told}")
    return cells


def _check(config: Any) -> None:
    """What the sections cannot see: entries of tables. Takes no memory, as nothing is allocated on `meta`."""
    learning_rate(config.optim, 1, config.train.steps)
    with torch.device("meta"):
        Pretraining(Transformer(config.model), config.model.balance)
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but no CUDA device is visible; use train.device=cpu or auto")
    path = getattr(getattr(config, "data", None), "path", None)
    if path and not Path(path).exists():
        raise UserError(f"data.path={path} does not exist; name a file or a folder")
    if hasattr(config, "task") and not path:
        make_task(config)
    if hasattr(config, "grpo"):
        check_loss(config.grpo, config.grpo.max_new_tokens or 1)


def _folder(study: Path, name: str, hashed: str) -> Path:
    """Where this configuration has run already, under whatever arm's name, or where it is going to."""
    found = sorted(study.glob(f"*-{hashed}")) if study.is_dir() else []
    return found[0] if found else study / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', name)}-{hashed}"
