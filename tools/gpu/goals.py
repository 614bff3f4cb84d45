"""What is to be reached on a GPU, and what was: a line each, from the figures of the other parts.

`least` is what a row must reach, `goal` what it should; a row that reaches the least and not the goal is short of its
goal. Ratios are judged with uniform routing, against peers with every kind.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Goal(NamedTuple):
    what: str
    value: float | None
    """None: not measured."""
    least: float
    goal: float
    higher: bool
    """Whether more is better."""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        sign = 1 if self.higher else -1
        if sign * self.value >= sign * self.goal:
            return "goal"
        return "least" if sign * self.value >= sign * self.least else "missed"


OVER_FLOOR = {"S": (2.0, 1.6), "M": (1.6, 1.35), "L": (1.5, 1.3)}
TOKENS = 200e3, 300e3
PEER = 1.15
"""At most so many times the fastest peer's time."""


def judge(found: dict[str, Any]) -> list[Goal]:
    cells = found.get("compare", {}).get("cells", [])
    steps = found.get("steps", {}).get("steps", [])
    goals = []
    for size, (least, goal) in OVER_FLOOR.items():
        ratio = next(
            (
                c["over floor"]
                for c in measured(cells, "ours", "layer")
                if (c["size"], c["routing"]) == (size, "uniform")
            ),
            None,
        )
        goals.append(Goal(f"layer forward + backward over its floor, {size}", ratio, least, goal, False))
    small = [s for s in steps if s["name"] == "small"]
    goals.append(Goal("training step of small over its floor", least_of(small, "over floor"), 2.0, 1.5, False))
    goals.append(Goal("MFU of small", most_of(small, "MFU"), 0.30, 0.38, True))
    fast = [s for s in steps if s["name"] == "speedrun"]
    goals.append(Goal("speedrun shape, tokens/s on one GPU", most_of(fast, "tokens/s"), *TOKENS, True))
    goals.append(Goal("step of 1,024 experts over that of 64", growth(steps), 1.3, 1.15, False))
    return goals + against_peers(cells)


def measured(cells: list[dict[str, Any]], peer: str, row: str | None = None) -> list[dict[str, Any]]:
    return [c for c in cells if c["peer"] == peer and "best" in c and row in (None, c["row"])]


def least_of(steps: list[dict[str, Any]], key: str) -> float | None:
    return min((s[key] for s in steps if key in s), default=None)


def most_of(steps: list[dict[str, Any]], key: str) -> float | None:
    return max((s[key] for s in steps if key in s), default=None)


def growth(steps: list[dict[str, Any]]) -> float | None:
    """Of the uncompiled step."""
    took = {
        s["experts"]: s["seconds"] for s in steps if not s["compiled"] and s["name"] == f"small, {s['experts']} experts"
    }
    return took[1024] / took[64] if {64, 1024} <= took.keys() else None


def against_peers(cells: list[dict[str, Any]]) -> list[Goal]:
    """How ours stands to F.grouped_mm at S and L, and to the fastest peer in every cell. An upper bound is no peer, nor a sum."""
    time = {
        (c["size"], c["routing"], c["row"], c["peer"]): c["best"]
        for c in cells
        if "best" in c and c["peer"] != "bmm" and "note" not in c
    }
    goals = []
    for size, least in (("S", 1.3), ("L", 1.0)):
        ratios = [
            time[size, kind, row, "grouped_mm"] / own
            for (s, kind, row, peer), own in time.items()
            if (s, row, peer) == (size, "forward+backward", "ours") and (size, kind, row, "grouped_mm") in time
        ]
        goals.append(
            Goal(
                f"times faster than F.grouped_mm, forward + backward, {size}",
                min(ratios, default=None),
                least,
                least,
                True,
            )
        )
    worst: tuple[float, str] | None = None
    for (size, kind, row, peer), own in time.items():
        others = [t for (s, k, r, other), t in time.items() if (s, k, r) == (size, kind, row) and other != "ours"]
        if peer == "ours" and others and (worst is None or own / min(others) > worst[0]):
            worst = own / min(others), f"{row} at {size}, {kind}"
    what = "time over the fastest peer's, worst cell" + (f": {worst[1]}" if worst else "")
    return [*goals, Goal(what, worst[0] if worst else None, PEER, PEER, False)]
