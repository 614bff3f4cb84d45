"""The few plots: loss against tokens and time, load of every expert, imbalance over steps, any figure over seeds.
Input: records, output: SVG.

    records   list of dicts, the lines of a metrics.jsonl (train/log.py reads them); a missing or null figure is a gap
    history   {layer: counts [E]}: tokens that each expert of a layer received

The same input gives the same bytes (fixed ids, no date), so a figure can stand under version control; text is drawn as
paths, so it looks the same everywhere. Colours are Okabe and Ito's, told apart by colour-blind readers. A path ending
in .png gives a PNG. matplotlib is loaded when a plot is drawn, without any display.
Not here: where the numbers come from (analysis/diagnostics.py), tables and HTML (study/report.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1))]  # more runs than colours: the next round is dashed
GREY = "#6b6b6b"
STYLE = {
    "svg.hashsalt": "moe",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 120,
}


def loss_curves(runs: dict[str, list[dict]], path: str | Path, anchors: dict[str, float] | None = None) -> Path:
    """Bits per byte against tokens and against seconds: validation with points, training as a thin line.

    `anchors` are drawn as dashed lines with their names: {"unigram": 4.6, "bigram": 3.5}.
    """
    spent = max((x for records in runs.values() for x in _series(records, "perf/seconds", "step")[0]), default=0)
    unit, seconds = next(u for u in (("h", 3600), ("min", 60), ("s", 1)) if spent >= 2 * u[1] or u[1] == 1)
    with _figure(path, 10.5, 4.2 + 0.22 * -(-len(runs) // 3), columns=2, sharey=True) as axes:
        for number, (name, records) in enumerate(runs.items()):
            line = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}
            for axis, key, scale in zip(axes, ("train/tokens", "perf/seconds"), (1, seconds), strict=True):
                x, y = _series(records, key, "train/bpb", scale)
                axis.plot(x, y, **line, linewidth=0.8, alpha=0.4)
                x, y = _series(records, key, "val/bpb", scale)
                label = f"{name} (val {y[-1]:.3f})" if y else name
                axis.plot(x, y, **line, linewidth=1.6, marker="o", markersize=3.5, label=label)
        _frame_losses(axes, [y for axis in axes for line in axis.lines for y in line.get_ydata()], anchors or {})
        axes[0].set(xlabel="training tokens", ylabel="bits per byte", title="by tokens")
        axes[1].set(xlabel=f"training time ({unit})", title="by wall clock")
        axes[0].xaxis.set_major_formatter(lambda value, _: _count(value))
        if runs:
            axes[0].figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return Path(path)


def expert_heat(history: dict[str, Sequence[float]], path: str | Path) -> Path:
    """One row a layer, one column an expert: its share of the tokens, 1 being the uniform share."""
    import numpy
    from matplotlib.colors import TwoSlopeNorm

    if not history:
        raise ValueError("expert_heat needs the counts of at least one layer")
    rows = [_relative(counts) for counts in history.values()]
    load = numpy.full((len(rows), max(map(len, rows))), numpy.nan)  # layers may differ in their number of experts
    for row, values in zip(load, rows, strict=True):
        row[: len(values)] = values
    peaks = numpy.nanmax(load, axis=1)
    worst = int(peaks.argmax())
    with _figure(path, 10.5, 1.7 + 0.32 * len(rows)) as (axis,):
        norm = TwoSlopeNorm(1.0, 0.0, 4.0)
        image = axis.imshow(load, aspect="auto", interpolation="nearest", cmap="PuOr_r", norm=norm)
        axis.set_yticks(range(len(rows)), list(history))
        title = f"load of every expert; worst MaxVio {peaks[worst] - 1:.2f} ({list(history)[worst]})"
        axis.set(xlabel="expert", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.hlines([i + 0.5 for i in range(len(rows) - 1)], -0.5, load.shape[1] - 0.5, color="white", linewidth=1.5)
        bar = axis.figure.colorbar(image, ax=axis, extend="max", pad=0.015, fraction=0.04, aspect=12)
        bar.set_ticks([0, 0.5, 1, 2, 4], labels=["0", "½", "1", "2", "4"])
        bar.set_label("share / uniform")
        bar.outline.set_visible(False)
    return Path(path)


def maxvio_curves(records: list[dict[str, Any]], path: str | Path) -> Path:
    """MaxVio of every layer over steps, lower layers darker; the mean over layers in black."""
    import matplotlib

    prefix = "moe/maxvio/"
    layers = list(dict.fromkeys(key for record in records for key in record if key.startswith(prefix)))
    with _figure(path, 7.5, 4.0) as (axis,):
        shades = matplotlib.colormaps["viridis"]
        for number, key in enumerate(layers):
            colour = shades(0.82 * number / max(1, len(layers) - 1))
            axis.plot(*_series(records, "step", key), color=colour, linewidth=1.1, label=key.removeprefix(prefix))
        axis.plot(*_series(records, "step", "moe/maxvio"), color="black", linewidth=1.8, label="mean")
        axis.set(xlabel="step", ylabel="MaxVio", title="fullest expert over the uniform share, minus 1")
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.figure.legend(loc="outside right center", ncols=-(-(len(layers) + 1) // 16))
    return Path(path)


def accuracy_curves(runs: dict[str, list[dict]], path: str | Path) -> Path:
    """Held-out accuracies against training time: greedy, pass@1, pass@k, a band of one standard error around each."""
    with _figure(path, 7.5, 4.0) as (axis,):
        for number, (name, records) in enumerate(runs.items()):
            keys = dict.fromkeys(k for r in records for k in r if k.startswith("val/") and f"{k}_se" in r)
            for shade, key in enumerate(keys):
                x, y = _series(records, "perf/seconds", key)
                _, e = _series(records, "perf/seconds", f"{key}_se")
                colour = COLOURS[(number + shade) % len(COLOURS)]
                label = f"{name} {key.removeprefix('val/')}"
                axis.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
                low, high = zip(*((a - b, a + b) for a, b in zip(y, e, strict=True))) if y else ((), ())
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(xlabel="training time (s)", ylabel="share of problems solved", title="held-out accuracy", ylim=(0, 1))
        axis.legend(loc="lower right")
    return Path(path)


def seed_bands(
    arms: dict[str, list[list[dict[str, Any]]]],
    key: str,
    path: str | Path,
    title: str,
    log: bool = False,
    levels: dict[str, float] | None = None,
) -> Path:
    """Figure `key` against tokens (steps, where none are counted), for each arm the mean over its runs and a band from
    the lowest to the highest of them.

    Many steps are averaged in 60 equal parts first. `levels` are drawn as dashed lines with their names.
    """
    counted = any("train/tokens" in record for runs in arms.values() for records in runs for record in records)
    across = "train/tokens" if counted else "step"
    with _figure(path, 5.4, 3.9) as (axis,):
        for number, (name, runs) in enumerate(arms.items()):
            curves = [_binned(*_series(records, across, key), 60) for records in runs]
            points = min((len(y) for _, y in curves), default=0)
            if not points:
                continue
            x, columns = curves[0][0][:points], list(zip(*(y[:points] for _, y in curves)))
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
            few = "o" if points <= 20 else None
            mean = [sum(column) / len(column) for column in columns]
            axis.plot(x, mean, color=colour, linestyle=dash, linewidth=1.6, marker=few, markersize=3.5, label=name)
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        for name, value in (levels or {}).items():
            axis.axhline(value, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            axis.annotate(f"{name} {value:.2g}", (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2),
                          textcoords="offset points", ha="right", fontsize=9, color=GREY)  # fmt: skip
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axis.set(xlabel="training tokens" if counted else "step", title=title)
        axis.xaxis.set_major_formatter(lambda value, _: _count(value))
        axis.figure.legend(*axis.get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return Path(path)


# ------------------------------------------------------------------------------------------------------------- drawing


@contextmanager
def _figure(path: str | Path, width: float, height: float, columns: int = 1, **kwargs: Any) -> Iterator[Any]:
    """Axes to draw on; the figure is written when the block ends. No pyplot, hence no window and no global state."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the bytes
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield list(figure.subplots(1, columns, squeeze=False, **kwargs)[0])
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def _frame_losses(axes: list[Any], seen: list[float], anchors: dict[str, float]) -> None:
    """Limits that hold curves and anchors, and the anchors with their names above their lines at the right edge."""
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    if anchors:  # far above a unigram model there is only divergence: it may leave the picture
        low, high = min(low, *anchors.values()), max(min(high, 1.5 * max(anchors.values())), *anchors.values())
    margin = 0.06 * (high - low or 1.0)
    low, high = low - margin, high + margin
    axes[0].set_ylim(low, high)
    text = 0.06 * (high - low)  # height of a line of text
    marks = sorted(anchors.items(), key=lambda item: item[1])
    free = low
    for number, (name, value) in enumerate(marks):
        for axis in axes:
            axis.axhline(value, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        crowded = number + 1 < len(marks) and marks[number + 1][1] - value < text
        below = crowded and value - text >= free
        at = value if below else max(value, free)
        free = at if below else at + text
        axes[1].annotate(
            f"{name} {value:.2f}", (1, at), xycoords=("axes fraction", "data"), xytext=(-2, -2 if below else 2),
            textcoords="offset points", ha="right", va="top" if below else "bottom", fontsize=9, color=GREY,
        )  # fmt: skip


def _series(records: list[dict[str, Any]], x: str, y: str, scale: float = 1) -> tuple[list[float], list[float]]:
    pairs = [(r[x] / scale, r[y]) for r in records if r.get(x) is not None and r.get(y) is not None]
    pairs = [pair for pair in pairs if math.isfinite(pair[1])]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _binned(x: list[float], y: list[float], parts: int) -> tuple[list[float], list[float]]:
    """Means over `parts` runs of neighbours of (nearly) equal length; fewer points stay as they are."""
    if len(x) <= 2 * parts:
        return x, y
    edges = [len(x) * i // parts for i in range(parts + 1)]
    cuts = list(zip(edges, edges[1:]))
    return [sum(x[a:b]) / (b - a) for a, b in cuts], [sum(y[a:b]) / (b - a) for a, b in cuts]


def _relative(counts: Sequence[float]) -> list[float]:
    values = [float(c) for c in counts]
    mean = sum(values) / len(values)
    return [v / mean if mean else 1.0 for v in values]


def _count(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
