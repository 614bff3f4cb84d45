"""The plots are well-formed, say what they show, survive gaps, and are the same bytes every time."""

import math
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from moe.analysis import chart  # noqa: E402


def records(seed, steps=40):
    dice = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        bpb = 2 + 3 * math.exp(-step / 10) + dice.gauss(0, 0.05)
        row = {"step": step, "train/tokens": step * 4096, "perf/seconds": step * 7.5, "train/bpb": bpb}
        row |= {"moe/maxvio": 1.0, "moe/maxvio/layers.1": dice.random(), "moe/maxvio/mtp.0": dice.random()}
        rows.append(row | ({"val/bpb": bpb + 0.1} if step % 10 == 0 else {}))
    return rows


def draw_losses(path):
    return chart.loss_curves({"moe": records(0), "dense": records(1)}, path, {"unigram": 4.62, "bigram": 3.5})


def draw_heat(path):
    dice = random.Random(2)
    return chart.expert_heat({name: [dice.random() for _ in range(64)] for name in ("layers.1", "mtp.0")}, path)


def draw_maxvio(path):
    return chart.maxvio_curves(records(0), path)


def draw_bands(path):
    arms = {"bias": [records(0), records(1)], "none": [records(2), records(3, steps=400)], "gone": [[], records(4)]}
    return chart.seed_bands(arms, "train/bpb", path, "loss of the arms", log=True, levels={"floor": 2.0})


DRAW = [draw_losses, draw_heat, draw_maxvio, draw_bands]


def text_of(path):
    """matplotlib writes each text as a comment beside its outlines."""
    content = path.read_text(encoding="utf-8")
    assert ElementTree.fromstring(content).tag.endswith("svg")
    return content


@pytest.mark.parametrize("draw", DRAW)
def test_the_same_records_give_the_same_bytes_and_no_date(tmp_path, draw):
    first, second = draw(tmp_path / "a.svg").read_bytes(), draw(tmp_path / "deep" / "b.svg").read_bytes()
    assert first == second
    assert b"dc:date" not in first and len(first) < 300_000


@pytest.mark.parametrize("draw", DRAW)
def test_figures_are_self_contained(tmp_path, draw):
    content = text_of(draw(tmp_path / "a.svg"))
    assert "<script" not in content and "font-family" not in content
    for reference in content.split('href="')[1:]:
        assert reference.startswith(("#", "data:image/png;base64,"))


def test_a_users_matplotlib_settings_neither_leak_in_nor_out(tmp_path):
    import matplotlib

    want = draw_losses(tmp_path / "a.svg").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": None}):
        assert draw_losses(tmp_path / "b.svg").read_bytes() == want
        assert matplotlib.rcParams["font.size"] == 30


def test_loss_curves_name_runs_axes_and_anchors(tmp_path):
    content = text_of(draw_losses(tmp_path / "a.svg"))
    final = [r["val/bpb"] for r in records(0) if "val/bpb" in r][-1]
    texts = [f"moe (val {final:.3f})", "dense (val ", "bits per byte", "training tokens", "training time (min)"]
    for text in [*texts, "unigram 4.62", "bigram 3.50"]:
        assert text in content, text


@pytest.mark.parametrize("seconds, unit", [(0.1, "s"), (10, "min"), (1000, "h")])
def test_time_is_shown_in_a_readable_unit(tmp_path, seconds, unit):
    rows = [{"step": s, "train/tokens": s, "perf/seconds": s * seconds, "val/bpb": 2.0} for s in range(1, 40)]
    assert f"training time ({unit})" in text_of(chart.loss_curves({"a": rows}, tmp_path / "a.svg"))


@pytest.mark.parametrize(
    "runs",
    [
        {},
        {"nothing": []},
        {"one point": [{"step": 1, "train/tokens": 5, "perf/seconds": 1.0, "val/bpb": 3.0}]},
        {"gaps": [{"step": 1, "train/tokens": 5, "train/bpb": None}, {"step": 2, "train/bpb": 1.0}]},
        {"nan": [{"step": 1, "train/tokens": 5, "perf/seconds": 1.0, "train/bpb": float("nan"), "val/bpb": 1.0}]},
        {f"run {i}": records(i, 10) for i in range(23)},  # more than there are colours and dashes
        {"<&$_^ünïcode>": records(0, 10)},
    ],
    ids=lambda runs: next(iter(runs), "no run"),
)
def test_loss_curves_survive_gaps_and_many_runs(tmp_path, runs):
    text_of(chart.loss_curves(runs, tmp_path / "a.svg"))
    text_of(chart.loss_curves(runs, tmp_path / "b.svg", {"unigram": 4.0, "bigram": 3.99, "trigram": 3.98}))


def test_heat_map_names_layers_and_the_worst_overload(tmp_path):
    counts = {"layers.1": [1, 1, 1, 1], "layers.2": [5, 1, 1, 1], "mtp.0": [0, 0, 0, 0]}
    content = text_of(chart.expert_heat(counts, tmp_path / "a.svg"))
    for text in ["worst MaxVio 1.50 (layers.2)", "layers.1", "mtp.0", "share / uniform"]:
        assert text in content, text


def test_heat_map_takes_tensors_and_layers_of_different_sizes(tmp_path):
    import torch

    counts = {"layers.1": torch.tensor([4, 0, 2]), "layers.2": torch.rand(256), "layers.3": [1]}
    text_of(chart.expert_heat(counts, tmp_path / "a.svg"))
    with pytest.raises(ValueError, match="at least one layer"):
        chart.expert_heat({}, tmp_path / "b.svg")


def test_maxvio_curves_name_every_layer_and_survive_none(tmp_path):
    content = text_of(draw_maxvio(tmp_path / "a.svg"))
    assert "layers.1" in content and "mtp.0" in content and "mean" in content
    text_of(chart.maxvio_curves([], tmp_path / "b.svg"))


def test_png_on_request(tmp_path):
    assert draw_heat(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_no_display_no_pyplot_and_no_matplotlib_before_the_first_plot(tmp_path):
    script = (
        "import sys; from moe.analysis import chart; assert 'matplotlib' not in sys.modules;"
        "chart.maxvio_curves([], sys.argv[1]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.svg"], cwd=Path(__file__).parents[2], check=True)


def test_seed_bands_name_arms_with_figures_and_levels(tmp_path):
    content = text_of(draw_bands(tmp_path / "a.svg"))
    for text in ("bias", "none", "floor 2", "loss of the arms", "training tokens"):
        assert f"<!-- {text} -->" in content, text
    assert "<!-- gone -->" not in content  # one of its runs has no figure yet


def test_seed_bands_run_from_the_lowest_to_the_highest_seed(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, low, high, **_: drawn.append((x, low, high)))
    runs = [[{"train/tokens": s, "k": v * s} for s in range(1, 5)] for v in (3, 1, 2)]
    chart.seed_bands({"a": runs}, "k", tmp_path / "a.svg", "t")
    assert drawn == [([1, 2, 3, 4], [1, 2, 3, 4], [3, 6, 9, 12])]


def test_many_steps_are_averaged_in_parts_that_lose_none():
    x, y = chart._binned(list(range(1000)), [float(v) for v in range(1000)], 60)
    assert len(x) == 60 and x == y and abs(sum(y) / 60 - 499.5) < 1
    assert chart._binned([1, 2], [3.0, 4.0], 60) == ([1, 2], [3.0, 4.0])


def test_seed_bands_without_tokens_run_over_steps(tmp_path):
    runs = [[{"step": s, "reward": s / 9} for s in range(1, 9)]] * 2
    assert "<!-- step -->" in text_of(chart.seed_bands({"a": runs}, "reward", tmp_path / "a.svg", "t"))
