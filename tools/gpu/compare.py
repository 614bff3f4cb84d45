"""The table: this project's kernels against their peers and the floor, for three sizes and three kinds of routing.

Times are medians by CUDA events; the calls take turns on several sets of random inputs that together exceed L2 several
times. Where a call is short enough for its start to count (under 1 ms), it is timed as a CUDA graph too, which every row
of ours must allow: a graph cannot hold a call that waits for the device. Errors are against float64, on a sample of rows,
tokens and experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import ROUTINGS, Exact, Part, Problem, error
from correctness import CHAIN, TOLERANCE
from floors import GROUPS, SIZES, TINY, Shape, row
from machine import Clock, Machine, first_line, graphed, peak_bytes, seconds
from peers import PEERS, PRODUCTS, Lazy, Peer, why_not

ROWS = ("forward+backward", "layer", "forward", "up_swiglu", "down", "bwd_act", "dx", "dw2", "dw13", "combine", "route")
"""The most telling first, should time run out."""
SHORT = 1e-3
"""Seconds below which a call is timed as a graph."""


def run(machine: Machine, clock: Clock, tiny: bool, sizes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"cells": [], "failures": [], "absent": {}}
    here = []
    for peer in PEERS:
        if why := why_not(peer):
            found["absent"][peer.name] = why
        else:
            here.append(peer)
    shapes = {"tiny": TINY} if tiny else {name: SIZES[name] for name in sizes}
    for kind in ROUTINGS[1:2] if tiny else ROUTINGS:
        for name, s in shapes.items():
            if clock.has(3, f"table at {name}, {kind}"):
                try:
                    one(found, machine, clock, name, s, kind, here)
                except torch.OutOfMemoryError:
                    clock.cut.append(f"table at {name}, {kind}: does not fit into memory")
            if machine.is_gpu:
                torch.cuda.empty_cache()
    return found


def one(
    found: dict[str, Any], machine: Machine, clock: Clock, size: str, s: Shape, kind: str, here: list[Peer]
) -> None:
    """All rows and peers of one size and routing."""
    problems = [Problem(s, torch.bfloat16, machine.device, kind, seed) for seed in range(copies(machine, s))]
    exact = Exact(problems[0], most_tokens=16, most_experts=3)
    for name in ROWS:
        parts = [] if name in ("route", "layer") else exact.of(name)
        floor, work = row(name, s, machine.card, problems[0].alive)
        for peer in here:
            if name not in peer.rows or not clock.has(peer.patience, f"{peer.name} {name} at {size}, {kind}"):
                continue
            cell: dict[str, Any] = {"size": size, "routing": kind, "row": name, "peer": peer.name, "floor": floor}
            try:
                measure(cell, machine, peer, problems, parts)
                cell |= {"TFLOP/s": work.flops / cell["best"] / 1e12, "GB/s": work.bytes / cell["best"] / 1e9}
            except torch.OutOfMemoryError:
                cell["note"] = "does not fit into memory"
                clock.cut.append(f"{peer.name} {name} at {size}, {kind}: {cell['note']}")
            except Exception as raised:
                cell["note"] = first_line(raised)
                if peer.name == "ours":
                    found["failures"].append(f"{name} at {size}, {kind}: {cell['note']}")
            found["cells"].append(cell)
            judge(found, cell)
    sums(found["cells"], size, kind, s, machine)


def copies(machine: Machine, s: Shape) -> int:
    """Sets of inputs, so that the smallest row's exceed three times L2."""
    if not machine.is_gpu:
        return 1
    l2 = getattr(torch.cuda.get_device_properties(machine.device), "L2_cache_size", 50 << 20)
    least = 2 * (s.rows * s.hidden + s.experts * s.hidden * s.width)
    return min(8, max(1, math.ceil(3 * l2 / least)))


def measure(cell: dict[str, Any], machine: Machine, peer: Peer, problems: list[Problem], parts: list[Part]) -> None:
    calls = [peer.rows[cell["row"]](p) for p in problems]
    if peer.exact and parts:
        got = [t.rows[t.place] if isinstance(t, Lazy) else t for t in calls[0]()]
        errors = [error(t.detach(), part) for t, part in zip(got, parts)]
        cell["error"], cell["worst"] = (max(column) for column in zip(*errors))
        del got
    cell["peak"] = peak_bytes(calls[0], machine.device)
    cell["seconds"] = cell["best"] = seconds(calls, machine.device, 0.1)
    if machine.is_gpu and peer.captured and cell["seconds"] < SHORT:
        cell["graph"] = graphed(calls, machine.device, 0.06)
        cell["best"] = min(cell["graph"], cell["seconds"])
    cell["over floor"] = cell["best"] / cell["floor"]


def judge(found: dict[str, Any], cell: dict[str, Any]) -> None:
    """Ours must be right here too, and at this size it is another tile than before."""
    if cell["peer"] != "ours" or "error" not in cell:
        return
    limit = TOLERANCE["bf16"] * (CHAIN if cell["row"] in GROUPS else 1)
    if not (cell["error"] <= limit and cell["worst"] <= 2 * limit):
        found["failures"].append(
            f"{cell['row']} at {cell['size']}, {cell['routing']}: off by {cell['error']:.2g} overall, {cell['worst']:.2g} at most"
        )


def sums(cells: list[dict[str, Any]], size: str, kind: str, s: Shape, machine: Machine) -> None:
    """What has no whole layer of its own has the sum of its products: the loop, and the bound."""
    here = [c for c in cells if (c["size"], c["routing"]) == (size, kind)]
    for name, parts in (("forward", PRODUCTS[:2]), ("forward+backward", PRODUCTS)):
        floor = next(c["floor"] for c in here if c["row"] == name) if any(c["row"] == name for c in here) else None
        for peer in ("loop", "bmm"):
            times = [c["best"] for c in here if c["peer"] == peer and c["row"] in parts and "best" in c]
            if floor and len(times) == len(parts):
                total = sum(times)
                cells.append(
                    {"size": size, "routing": kind, "row": name, "peer": peer, "floor": floor, "seconds": total, "best": total,
                     "over floor": total / floor, "note": "sum of its products"}
                )  # fmt: skip
