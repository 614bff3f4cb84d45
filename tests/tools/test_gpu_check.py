"""The check for GPUs without one: its floors, its oracle, that it notices what is wrong, and a whole tiny run."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe.analysis import planner
from moe.config import ModelConfig
from moe.kernels import reference

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.py"
PARTS = "machine floors cases calls correctness repeats attention peers compare steps goals report warm".split()


@pytest.fixture
def tool(monkeypatch):
    """Every file of tools/gpu by name, as the script sees them; other tests do not."""
    monkeypatch.syspath_prepend(str(SCRIPT.with_name("gpu")))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in PARTS})
    for name in PARTS:
        sys.modules.pop(name, None)


# -------------------------------------------------------------------------------------------------------------- floors

H200 = (4.3e12, 790e12, "")
TABLE = {  # microseconds by hand, with fp32 weight gradients and a combine that adds to a tensor
    "router": (4, 12, 44), "route": (2.5, 5, 10), "up_swiglu": (16, 174, 1392), "down": (21.5, 109, 696),
    "combine": (19.5, 78, 312), "bwd_act": (15.6, 117, 696), "dw2": (11.7, 87, 696), "dx": (27.3, 174, 1392),
    "combine_dx": (17.6, 70, 281), "dw13": (21.5, 174, 1392),
}  # fmt: skip


def test_floors_of_kernels_are_those_worked_out_by_hand(tool):
    f = tool.floors
    card = f.Card(*H200)
    for size, column, total in (("S", 0, 157), ("M", 1, 1000), ("L", 2, 6909)):
        found = {name: 1e6 * card.seconds(w) for name, w in f.kernels(f.SIZES[size], gradient=4, base=True).items()}
        assert found == pytest.approx({name: row[column] for name, row in TABLE.items()}, rel=0.04)
        assert sum(found.values()) == pytest.approx(total, rel=0.005)
    small, large = f.kernels(f.SIZES["S"]), f.kernels(f.SIZES["L"])
    assert {name for name, w in small.items() if card.bound(w) == "tensor cores"} == set()
    assert {n for n, w in large.items() if card.bound(w) == "memory"} == {"route", "combine", "combine_dx"}


def test_a_row_of_the_table_is_its_kernels_together(tool):
    f = tool.floors
    s, card = f.SIZES["M"], f.Card(*H200)
    seconds, work = f.row("layer", s, card)
    parts = f.kernels(s)
    assert seconds == pytest.approx(sum(map(card.seconds, parts.values())))
    assert work.flops == 18 * s.rows * s.width * s.hidden + 2 * s.tokens * s.width * s.experts
    # weights of experts that nobody chose are not read, their gradients are written all the same
    half = f.kernels(s, live=128)
    weights = s.experts * s.width * s.hidden
    assert parts["down"].bytes - half["down"].bytes == weights
    assert parts["dx"].bytes - half["dx"].bytes == 2 * weights
    assert half["dw2"] == parts["dw2"]


def test_cards_are_known_by_their_longest_name(tool):
    known = tool.floors.known_card
    assert known("NVIDIA H200").bandwidth == pytest.approx(4.3e12, rel=0.01)
    assert known("NVIDIA H200").rate == pytest.approx(790e12, rel=0.01)
    assert known("NVIDIA H100 80GB HBM3").bandwidth > known("NVIDIA H100 PCIe").bandwidth
    assert known("NVIDIA A100-SXM4-80GB").bandwidth > known("NVIDIA A100-SXM4-40GB").bandwidth
    assert known("Tesla T4") is None


@pytest.mark.parametrize("changes", [{}, {"mtp_rows": 0.25}, {"num_nextn_predict_layers": 0, "q_lora_rank": None}])
def test_a_steps_products_are_the_planners_flops(tool, changes):
    c = ModelConfig.preset("small", **changes)
    work = tool.floors.step(c, rows=8, seq_len=256, passes=2)
    flops = sum(t.count * t.work.flops for parts in work.values() for t in parts)
    assert flops == pytest.approx(planner.flops(c, 256).training * 8 * 256)


def test_a_step_moves_masters_moments_and_sums(tool):
    c = ModelConfig.preset("small")
    count = planner.parameters(c).total + planner.parameters(c).mtp
    card = tool.floors.Card(1e12, 1e15, "")
    for passes in (1, 4):
        found = tool.floors.step_seconds(tool.floors.step(c, 8, 256, passes), card)
        assert found["optimizer"] == pytest.approx(30 * count / 1e12)
        assert found["gradient sums"] == pytest.approx((10 * passes - 4) * count / 1e12)


# ------------------------------------------------------------------------------------------------------ cases and oracle

SHAPE = (9, 12, 5, 6, 2)


def test_routings_are_what_they_are_called(tool):
    s = tool.floors.Shape(400, 4, 4, 16, 3)

    def counts(kind):
        return tool.cases.Problem(s, torch.float32, "cpu", kind, seed=torch.seed() % 2**31).counts

    assert all(40 < c < 110 for c in counts("uniform"))
    zipf = counts("zipf")
    assert zipf[0] > 2 * zipf[5] > 2 * zipf[15] / 2 and sum(zipf) == s.rows
    assert counts("half-empty")[1::2] == [0] * 8
    assert counts("hot")[1] == 400
    assert counts("crowd") == [0] * 13 + [400] * 3
    assert sum(counts("nobody")) < 0.75 * s.rows
    ids = tool.cases.Problem(s, torch.float32, "cpu", "zipf").ids
    assert all(len(set(row)) == 3 for row in ids.tolist())


@pytest.mark.parametrize("kind", ["zipf", "nobody", "crowd"])
def test_the_oracle_agrees_with_the_reference(tool, agree, kind):
    p = tool.cases.Problem(tool.floors.Shape(*SHAPE), torch.float64, "cpu", kind, seed=torch.seed() % 2**31)
    p.x, p.dy = p.x.nan_to_num(1.0), p.dy.nan_to_num(1.0)  # the reference multiplies everything by zero
    given = [t.double().requires_grad_() for t in (p.x, p.w13, p.w2, p.gates)]
    y = reference.experts(*given[:3], p.ids, given[3])
    right = [y, *torch.autograd.grad(y, given, p.dy)]
    right[4] = right[4].flatten()
    for part, whole in zip(tool.cases.Exact(p).of("forward+backward"), right, strict=True):
        agree(part.value, whole[part.where], 1e-10, part.name)
    some = tool.cases.Exact(p, most_tokens=3, most_experts=2)
    assert len(some.tokens) == 3 and len(some.experts) == 2
    for part, whole in zip(some.of("forward+backward"), right, strict=True):
        agree(part.value, whole[part.where], 1e-10, f"some of {part.name}")


def broken(call, what):
    """The call with a fault in its first result."""

    def run(p):
        first, *rest = (t.clone() for t in call(p))
        if what == "one number":
            first.view(-1)[-1] += first.abs().max()
        elif what == "an unwritten row":
            first[-1] = torch.nan
        elif what == "two rows swapped":
            first[[0, 1]] = first[[1, 0]]
        else:
            first *= 1.02
        return first, *rest

    return run


@pytest.mark.parametrize("what", ["one number", "an unwritten row", "two rows swapped", "all a little"])
@pytest.mark.parametrize("row", ["down", "dw2"])
def test_a_wrong_kernel_is_noticed(tool, row, what):
    c = tool.correctness
    p = tool.cases.Problem(tool.floors.Shape(40, 24, 16, 8, 2), torch.bfloat16, "cpu", "uniform", 1)
    parts = tool.cases.Exact(p).of(row)
    right = (torch.empty_like(parts[0].value).index_copy_(0, parts[0].where, parts[0].value).bfloat16(),)
    found = c.Found()
    found.compare("right", row, "bf16", right, parts, c.TOLERANCE["bf16"])
    assert not found.failures and found.to_dict()["checks"] == 1
    found.compare("wrong", row, "bf16", broken(lambda _: right, what)(p), parts, c.TOLERANCE["bf16"])
    assert len(found.failures) == 1 and found.failures[0].startswith(f"wrong, bf16: {row} off by")


def test_one_problem_goes_through_every_kernel_and_a_fault_in_one_fails(tool, monkeypatch):
    c = tool.correctness
    p = tool.cases.Problem(tool.floors.Shape(5, 16, 16, 4, 2), torch.float32, "cpu", "nobody")
    monkeypatch.setitem(c.OURS, "combine", broken(c.OURS["combine"], "one number"))
    monkeypatch.setitem(c.OURS, "dx", lambda p: 1 / 0)
    found = c.Found()
    c.one(found, "case", p, "fp32")
    assert len(found.failures) == 2
    assert "case, fp32: combine off by" in found.failures[0] and "dx: ZeroDivisionError" in found.failures[1]
    assert {check.what.split()[0] for check in found.checks} >= {
        "up_swiglu",
        "down",
        "bwd_act",
        "dw2",
        "dw13",
        "chain",
        "sorted",
    }


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_the_routing_oracle_agrees_with_the_reference(tool, scoring):
    logits, bias = torch.randn(50, 16).double(), 0.1 * torch.randn(16).double()
    s = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    right = reference.route(s, bias, 3, 4, 2, 2 if scoring == "sigmoid" else 1)
    ids, sure = tool.correctness._best(logits, bias, 3, 4, 2, scoring)
    assert ids.tolist() == right and sure.all()
    logits[:, 1:] = logits[:, :1]  # ties everywhere: nobody is sure
    assert not tool.correctness._best(logits, 0 * bias, 3, 1, 1, scoring)[1].any()


def test_attentions_oracle_keeps_documents_apart(tool):
    q, k, v, _ = (t.double() for t in tool.attention.made(torch.device("cpu"), 2, 7, 2, (6, 4)))
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, -1], [5, 5, 5, 5, 5, 5, 5]])
    for packed in (None, ids):
        right = reference.attention(q, k, v, 6**-0.5, packed)
        torch.testing.assert_close(tool.attention.exact(q, k, v, packed), right)


def test_other_bits_are_counted(tool, monkeypatch):
    p = tool.cases.Problem(tool.floors.TINY, torch.bfloat16, "cpu")
    turn = iter([0.0, 0.0, 1e-3, 0.0])
    monkeypatch.setitem(tool.repeats.OURS, "forward+backward", lambda p: (p.x + next(turn), p.gates))
    assert tool.repeats.repeat(p, 3, tool.machine.Clock(1)) == (3, 1)


def test_peers_compute_the_same_rows(tool):
    """Those that come with torch; what an upper bound computes is of the right size."""
    p = tool.cases.Problem(tool.floors.Shape(24, 32, 16, 8, 2), torch.bfloat16, "cpu", "zipf")
    exact = tool.cases.Exact(p)
    compared = 0
    for peer in tool.peers.PEERS[1:4]:
        assert not tool.peers.why_not(peer)
        for row, make in peer.rows.items():
            got = make(p)()
            for tensor, part in zip(got, exact.of(row) if row != "route" and peer.exact else []):
                off, _ = tool.cases.error(tensor, part)
                assert off < 1.5e-2, (peer.name, row, part.name)
                compared += 1
    assert compared > 20
    assert tool.peers.why_not(tool.peers.Peer("x", "no_such_package", {})).startswith("ModuleNotFoundError")


# ------------------------------------------------------------------------------------------- what is made of the figures


def figures(ours=100e-6, floor=60e-6):
    """What a GPU's run might have found."""
    cells = [
        {"size": size, "routing": kind, "row": row, "peer": peer, "floor": floor, "seconds": t, "best": t, "over floor": t / floor,
         "TFLOP/s": 1.0, "GB/s": 2.0, "peak": 3e6, "error": 2e-3}
        for size in "SML" for kind in ("uniform", "zipf") for row in ("layer", "forward+backward")
        for peer, t in (("ours", ours), ("grouped_mm", 150e-6), ("bmm", 50e-6))
    ]  # fmt: skip
    step = {
        "note": "", "compiled": False, "passes": 1, "tokens": 65536, "floor": 0.03, "optimizer": 0.01, "floors": {"head": 0.01},
        "attention": "sdpa", "loss": 9.0, "MFU against": "989 TFLOP/s", "peak memory": 4e9, "experts": 256,
    }  # fmt: skip
    steps = [
        step | {"name": name, "experts": e, "seconds": t, "tokens/s": 65536 / t, "over floor": t / 0.03, "MFU": 0.35}
        for name, e, t in (("small", 256, 0.05), ("speedrun", 256, 0.25), ("small, 64 experts", 64, 0.04),
                           ("small, 1024 experts", 1024, 0.05))
    ]  # fmt: skip
    return {
        "name": "NVIDIA H200", "date": "2026-01-31", "interpreter": False, "minutes": 7.0, "cut": ["liger"],
        "facts": {"torch": "2.11"}, "card": {"bandwidth": 4.3e12, "rate": 790e12, "source": "data sheet"},
        "compare": {"cells": cells, "failures": [], "absent": {"sonic": "no module"}}, "steps": {"steps": steps, "layers": []},
    }  # fmt: skip


def test_goals_are_judged_from_the_figures(tool):
    judged = {g.what: (g.value, g.verdict) for g in tool.goals.judge(figures())}
    value, verdict = judged.pop("layer forward + backward over its floor, S")
    assert value == pytest.approx(1.667, abs=1e-3) and verdict == "least"
    assert judged.pop("layer forward + backward over its floor, L")[1] == "missed"
    assert judged.pop("training step of small over its floor")[1] == "least"
    assert judged.pop("MFU of small") == (0.35, "least")
    assert judged.pop("speedrun shape, tokens/s on one GPU")[1] == "least"
    assert judged.pop("step of 1,024 experts over that of 64") == (pytest.approx(1.25), "least")
    assert judged.pop("times faster than F.grouped_mm, forward + backward, S") == (pytest.approx(1.5), "goal")
    peers = [what for what in judged if what.startswith("time over the fastest peer's")]
    assert len(peers) == 1 and judged[peers[0]] == (pytest.approx(100 / 150), "goal"), "the upper bound is no peer"
    assert all(g.verdict == "not measured" for g in tool.goals.judge({}))


def test_the_report_names_failures_cuts_and_missed_goals(tool, tmp_path):
    found = figures()
    found["compare"]["failures"] = ["dx at S, zipf: off by 0.5"]
    found["compare"]["cells"][0]["error"] = math.nan
    paths = tool.report.write(tmp_path / "new", "h200", found, tool.goals.judge(found))
    text = paths[1].read_text()
    for words in ("1 failure(s)", "- dx at S, zipf: off by 0.5", "**missed**", "- liger", "sonic takes no part: no module",
                  "| layer | ours | 100.0 us |", "### L, zipf", "35.0%", "MFU against 989 TFLOP/s"):  # fmt: skip
        assert words in text, words
    read = json.loads(paths[0].read_text())
    assert read["compare"]["cells"][0]["error"] is None and read["goals"][0]["verdict"] == "least"
    missed = tool.report.missed(found, tool.goals.judge(found))
    assert {g.verdict for g in missed} == {"least", "missed"}
    assert tool.report.missed(found | {"interpreter": True}, tool.goals.judge(found)) == []


def test_passes_are_as_few_as_memory_allows(tool):
    plan = tool.steps.plans(False)[0]
    whole = tool.steps.needed(plan, 1)
    assert tool.steps.passes(plan, 2 * whole) == 1 and tool.steps.passes(plan, None) == 1
    assert tool.steps.passes(plan, 0.8 * whole) == 2
    speedrun = tool.steps.speedrun()
    assert planner.parameters(speedrun).total == pytest.approx(2.83e9, rel=0.01)


def test_a_step_that_does_not_fit_is_cut_finer(tool, monkeypatch):
    seen = []

    def training(machine, plan, compiled, more):
        seen.append(more)
        if more < limit:
            raise torch.OutOfMemoryError("no room")
        return {"passes": more, "loss": math.nan}

    monkeypatch.setattr(tool.steps, "training", training)
    found, clock = {"steps": [], "failures": []}, tool.machine.Clock(1)
    for limit in (4, 8):
        plan = tool.steps.plans(True)[0]
        tool.steps.attempt(found, clock, "steps", "step", lambda: tool.steps.trained(None, plan, False))
    assert seen == [1, 2, 4] * 2 and [s["passes"] for s in found["steps"]] == [4]
    assert clock.cut == ["step: does not fit into memory"] and found["failures"] == ["step: the loss is nan"]


def test_a_clock_tells_what_it_cuts(tool):
    clock = tool.machine.Clock(1)
    clock.until(0.5)
    assert clock.has(20, "short") and not clock.has(40, "long") and clock.cut == ["long"]


def test_what_is_compiled_in_advance_are_the_launches_of_every_part(tool):
    from moe.kernels import launch

    found = tool.warm.launches(90)
    names = {item.kernel.__name__ for item in found}
    assert names >= {"_route", "_place", "_up_swiglu", "_gmm", "_combine", "_bwd_act", "_dw", "_zero_tail"}
    assert all(isinstance(item, launch.Launch) for item in found)


# ------------------------------------------------------------------------------------------------------------ as a command

BARE = """
import importlib.abc, runpy, sys
class Bare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {"omegaconf", "yaml", "safetensors", "tokenizers", "transformers", "deepspeed", "wandb", "rich"}:
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Bare())
sys.path = [p for p in sys.path if p not in ("", sys.argv[1])]
script, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


def command(*words, interpret, folder):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH", "MOE_OPS")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **({"TRITON_INTERPRET": "1"} if interpret else {}),
    }
    line = [sys.executable, "-c", BARE, str(ROOT), str(SCRIPT), *words]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)


def test_a_tiny_run_with_torch_and_triton_alone(tmp_path):
    done = command("--tiny", "--only", "steps,attention,compare", "--out", "here", interpret=True, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (page,), (figures,) = tmp_path.glob("here/interpreter-*.md"), tmp_path.glob("here/interpreter-*.json")
    assert "every time below is meaningless" in page.read_text() and "Everything is right." in page.read_text()
    found = json.loads(figures.read_text())
    rows = {(c["row"], c["peer"]) for c in found["compare"]["cells"]}
    assert {
        ("forward+backward", "ours"),
        ("layer", "ours"),
        ("route", "grouped_mm"),
        ("dw13", "bmm"),
        ("dx", "loop"),
    } <= rows
    assert all(c["error"] < 1e-2 for c in found["compare"]["cells"] if c["peer"] == "ours" and "error" in c)
    assert [s["experts"] for s in found["steps"]["steps"]] == [8, 16] and found["steps"]["layers"][0]["size"] == "tiny"
    assert found["attention"]["checks"] == 8 and len(found["attention"]["skipped"]) == 3
    assert found["cut"] == [] and "repeats" not in found


@pytest.mark.parametrize(
    "words, said",
    [
        (["--tiny"], "gpu_check: no GPU here; TRITON_INTERPRET=1 python tools/gpu_check.py --tiny runs it without one"),
        (["--only", "speed"], "gpu_check: --only speed: know repeats, correctness, compare, steps, attention"),
    ],
)
def test_what_cannot_run_is_one_line(tmp_path, words, said):
    done = command(*words, "--out", "here", interpret=False, folder=tmp_path)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (2, said, "")
    assert not (tmp_path / "here").exists()
