"""What a study found, read from its run folders: REPORT.md, report.html, results.csv and the figures.

Verdicts on the claims, mean and spread of each arm over seeds, paired differences to the baseline, curves, cost, what
varied, every run, what the study cannot tell, and how to repeat it. Only finished runs count; the others are named.
The same run folders give the same bytes. Not here: the statistics (statistics.py), how a figure reads (words.py), Markdown and HTML (page.py).
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import statistics as basic
from pathlib import Path
from typing import Any, NamedTuple

from moe.analysis import chart, planner
from moe.analysis.diagnostics import maxvio_floor
from moe.files import replace
from moe.study import words
from moe.study.grid import Cell, Metric, Study
from moe.study.page import Block, Code, Figure, Heading, Items, Table, Text, markdown, page
from moe.study.progress import duration, last_record
from moe.study.statistics import Difference, Values, compare, reading
from moe.train.log import read_metrics
from moe.train.run_folder import finished

CURVES = {"train/loss": "training loss, nats a token", "moe/maxvio": "MaxVio of training batches, mean over layers"}


class Result(NamedTuple):
    """A finished run."""

    cell: Cell
    summary: dict[str, Any]
    records: list[dict[str, Any]]

    def value(self, name: str) -> float | None:
        """A figure of summary.json, else of metrics.jsonl: the last of `val/`, where it is a mean over much text; of
        others, which are one batch's, the mean over the last tenth of the steps. None: nowhere."""
        if self.summary.get(name) is not None:
            return float(self.summary[name])
        seen = [r[name] for r in self.records if r.get(name) is not None]
        tail = 1 if name.startswith("val/") else max(1, len(seen) // 10)
        return basic.fmean(seen[-tail:]) if seen else None


def write_report(study: Study, argv: list[str]) -> Path:
    """-> REPORT.md, beside it report.html, results.csv and the figures. argv: the command line, to be repeated."""
    results = [
        Result(cell, done, read_metrics(cell.folder / "metrics.jsonl"))
        for cell in study.cells
        if (done := finished(cell.config, cell.folder)) is not None
    ]
    study.folder.mkdir(parents=True, exist_ok=True)
    figures = {m.name: _by_arm(study, results, m.name) for m in study.metrics}
    found = {m.name: _differences(study, m, figures[m.name]) for m in study.metrics if m.compare}
    title = f"Study {study.settings.name}"
    blocks: list[Block] = [Text(study.settings.question)] if study.settings.question else []
    blocks += _missing(study, results) + _verdicts(study, found) + _table(study, figures) + _compared(study, found)
    blocks += _curves(study, results) + _cost(study, results) + _settings(study) + _runs(study, results)
    blocks += _limits(study) + _provenance(results, argv)
    replace(study.folder / "results.csv", _csv(study, results))
    replace(study.folder / "report.html", page(title, blocks))
    replace(study.folder / "REPORT.md", markdown(title, blocks))
    return study.folder / "REPORT.md"


# ------------------------------------------------------------------------------------------------------------- figures


def _by_arm(study: Study, results: list[Result], name: str) -> dict[str, Values]:
    values: dict[str, Values] = {arm: {} for arm in study.arms}
    for result in results:
        value = result.value(name)
        if value is not None:
            values[result.cell.arm][result.cell.seed] = value
    return values


def _differences(study: Study, metric: Metric, figures: dict[str, Values]) -> dict[str, Difference]:
    working = {arm: {seed: metric.working(v) for seed, v in values.items()} for arm, values in figures.items()}
    baseline = working.pop(study.baseline)
    return compare(baseline, working, metric.spread, study.settings.level)


def _missing(study: Study, results: list[Result]) -> list[Block]:
    there = {r.cell.folder for r in results}
    left = []
    for cell in study.cells:
        if cell.folder not in there:
            note = cell.folder / "failed"
            said = note.read_text(encoding="utf-8").strip() if note.exists() else ""
            at = f"at step {last_record(cell.folder).get('step', 0)} of {cell.config.train.steps}"
            left.append(f"{cell.name}: {'failed, ' + said if said else 'not finished, ' + at}")
    head = f"**{len(left)} of {len(study.cells)} runs are not in this report:**"
    return [Text(head), Items(left)] if left else []


def _verdicts(study: Study, found: dict[str, dict[str, Difference]]) -> list[Block]:
    if not study.claims:
        return []
    metrics = {m.name: m for m in study.metrics}
    items = [
        words.claim(claim, study.baseline, metrics[claim.metric], found[claim.metric].get(claim.arm))
        for claim in study.claims
    ]
    return [Heading("Verdicts"), Items(items)]


def _table(study: Study, figures: dict[str, dict[str, Values]]) -> list[Block]:
    rows = []
    for arm in study.arms:
        cells = [words.spread(list(figures[m.name][arm].values())) for m in study.metrics]
        seeds = max((len(figures[m.name][arm]) for m in study.metrics), default=0)
        rows.append([f"`{arm}`" + (" (baseline)" if arm == study.baseline else ""), str(seeds), *cells])
    header = ["arm", "seeds", *(m.label or m.name for m in study.metrics)]
    return [Heading("Results"), Text("Mean ± standard deviation over seeds."), Table(header, rows)]


def _compared(study: Study, found: dict[str, dict[str, Difference]]) -> list[Block]:
    rows = []
    for metric in study.metrics:
        margin = words.amount(metric, metric.margin) if metric.margin is not None else "none"
        for arm, d in found.get(metric.name, {}).items():
            word = reading(d, metric.distance(metric.margin), metric.better == "lower")
            rows.append([metric.label or metric.name, f"`{arm}`", words.estimate(metric, d), words.interval(metric, d), margin,
                         metric.spread, words.half(metric, d), word])  # fmt: skip
    if not rows:
        return []
    how = (
        f"Seed by seed against `{study.baseline}`; {study.settings.level:.0%} intervals that hold for all arms of a metric at "
        "once (Dunnett). Spread: `own`, of each arm's differences alone; `pooled`, one for all arms."
    )
    header = ["metric", "arm", "difference", "interval", "margin", "spread", "smallest visible effect", "reading"]
    return [Heading("Differences to the baseline"), Text(how), Table(header, rows)]


def _curves(study: Study, results: list[Result]) -> list[Block]:
    titles = CURVES | {m.name: m.label or m.name for m in study.metrics if m.compare and m.name not in CURVES}
    blocks: list[Block] = []
    for key, title in titles.items():
        arms = {arm: [r.records for r in results if r.cell.arm == arm] for arm in study.arms}
        arms = {arm: runs for arm, runs in arms.items() if any(_points(records, key) > 2 for records in runs)}
        if not arms:
            continue
        levels, c = {}, study.cells[0].config
        if key == "moe/maxvio" and len({cell.config.model.n_routed_experts for cell in study.cells}) == 1:
            floor = maxvio_floor(c.train.batch_tokens, c.model.num_experts_per_tok, c.model.n_routed_experts)
            levels = {"sampling floor": floor}
        file = study.folder / f"{key.replace('/', '-')}.svg"
        chart.seed_bands(arms, key, file, title, log="maxvio" in key, levels=levels)
        blocks.append(Figure(file, title))
    how = (
        "Mean over seeds, band from the lowest to the highest of them. Held-out figures: the last point is on all rows."
    )
    return [Heading("Curves"), Text(how), *blocks] if blocks else []


def _points(records: list[dict[str, Any]], key: str) -> int:
    return sum(record.get(key) is not None for record in records)


# ---------------------------------------------------------------------------------------------- cost, settings, origin


def _cost(study: Study, results: list[Result]) -> list[Block]:
    rows = []
    for arm in study.arms:
        runs = [r for r in results if r.cell.arm == arm]
        size = planner.parameters(next(cell.config.model for cell in study.cells if cell.arm == arm))
        seconds = [r.records[-1]["perf/seconds"] for r in runs if r.records and "perf/seconds" in r.records[-1]]
        speed = [
            r.records[-1]["train/tokens"] / s for r, s in zip(runs, seconds) if s and "train/tokens" in r.records[-1]
        ]
        rows.append([
            f"`{arm}`", planner.si(size.total), planner.si(size.active),
            f"{basic.fmean(speed):,.0f}" if speed else "?", duration(basic.fmean(seconds)) if seconds else "?",
        ])  # fmt: skip
    header = ["arm", "parameters", "active", "tokens/s", "training time of a run"]
    return [Heading("Cost"), Table(header, rows)]


def _settings(study: Study) -> list[Block]:
    changes = {
        arm: "; ".join(f"`{k}={json.dumps(v)}`" for k, v in change.items()) for arm, change in study.arms.items()
    }
    return [
        Heading("What varied"),
        Table(["arm", "changes"], [[f"`{arm}`", said or "nothing"] for arm, said in changes.items()]),
        Text("What all runs share, besides the recipe's defaults:"),
        Code("\n".join(f"{section}: {json.dumps(values)}" for section, values in study.shared.items())),
    ]


def _runs(study: Study, results: list[Result]) -> list[Block]:
    names = [m.name for m in study.metrics]
    rows = [
        [f"`{r.cell.folder.name}`", *(words.number(v) if (v := r.value(name)) is not None else "" for name in names)]
        for r in results
    ]
    return [Heading("Every run"), Table(["folder", *(m.label or m.name for m in study.metrics)], rows)]


def _limits(study: Study) -> list[Block]:
    seeds = words.seeds(len({cell.seed for cell in study.cells}))
    own = any(m.spread == "own" and m.compare for m in study.metrics)
    pooled = any(m.spread == "pooled" and m.compare for m in study.metrics)
    items = [
        *study.settings.limits,
        f"Effects smaller than those named above: the noise is measured with {seeds} alone.",
        "Other sizes, texts and longer training: everything here is one setting, the same for all arms.",
        "Metrics are judged one by one: the correction covers the arms of a metric, not all metrics together.",
    ]
    if own:
        items.append("`own` intervals rest on the scatter of an arm's own differences: safe, and wide with few seeds.")
    if pooled:
        items.append("`pooled` intervals assume that all arms scatter alike; compare the standard deviations above.")
    return [Heading("What this cannot tell"), Items(items)]


def _provenance(results: list[Result], argv: list[str]) -> list[Block]:
    environments = [json.loads((r.cell.folder / "env.json").read_text(encoding="utf-8")) for r in results]
    given = [a for a in argv if "report_only" not in a]

    def all_of(*keys: str) -> str:
        return ", ".join(
            sorted({" ".join(str(e[k]) for k in keys if e.get(k) not in (None, [])) for e in environments})
        )

    seconds = sum(r.records[-1].get("perf/seconds", 0.0) for r in results if r.records)
    dirty = (
        " (with uncommitted changes: git.diff in the run folders)"
        if any(e.get("git_dirty") for e in environments)
        else ""
    )
    rows = [
        ["command", f"`{shlex.join(['python', 'recipes/ablate.py', *given])}`"],
        ["commit", f"{all_of('git_commit') or 'unknown'}{dirty}"],
        [
            "machine",
            f"{all_of('processor', 'cpu_capability', 'gpus')}; {all_of('cpu_count')} CPUs; {all_of('platform')}",
        ],
        ["software", f"Python {all_of('python')}, torch {all_of('torch')}"],
        ["threads of a run", all_of("threads")],
        ["training time, all runs", f"{duration(seconds)} ({len(results)} runs; validation, start and end apart)"],
    ]
    return [Heading("Where it comes from"), Table(["", ""], rows)]


def _csv(study: Study, results: list[Result]) -> str:
    """One line a finished run: arm, seed, figures in full; no time, so the same runs give the same bytes."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["arm", "seed", *(m.name for m in study.metrics)])
    for r in results:
        values = [r.value(m.name) for m in study.metrics]
        table.writerow([r.cell.arm, r.cell.seed, *("" if v is None else repr(v) for v in values)])
    return out.getvalue()
