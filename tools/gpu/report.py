"""One JSON with every figure, one markdown page to read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from goals import Goal

VERDICTS = {"goal": "reached", "least": "short of the goal", "missed": "**missed**", "not measured": "not measured"}


def write(folder: Path, name: str, found: dict[str, Any], goals: list[Goal]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    found = found | {"goals": [g._asdict() | {"verdict": g.verdict} for g in goals]}
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps(clean(found), indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(found, goals), encoding="utf-8")
    return paths


def clean(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(found: dict[str, Any], goals: list[Goal]) -> str:
    failures = failures_of(found)
    lines = [f"# Kernels on {found['name']}, {found['date']}", ""]
    if found["interpreter"]:
        lines += [
            "**Triton's interpreter on a CPU: every time below is meaningless.** It shows that the check runs.",
            "",
        ]
    lines += [
        f"{'Everything is right.' if not failures else f'{len(failures)} failure(s):'}",
        *(f"- {f}" for f in failures),
        "",
    ]
    lines += ["## Goals", "", "| what | measured | at least | goal | |", "|---|---|---|---|---|"]
    for g in goals:
        sign = ">=" if g.higher else "<="
        verdict = "-" if found["interpreter"] else VERDICTS[g.verdict]
        lines.append(
            f"| {g.what} | {number(g.value)} | {sign} {number(g.least)} | {sign} {number(g.goal)} | {verdict} |"
        )
    judged = [] if found["interpreter"] else [g for g in goals if g.value is not None]
    short = ", ".join(g.what for g in missed(found, goals)) or "none"
    lines += ["", f"Missed goals: {short}, of {len(judged)} that were measured." if judged else "No goal was measured.", ""]
    for title, make in SECTIONS.items():
        lines += make(found) and [f"## {title}", "", *make(found), ""]
    lines += ["## Cut", "", *([f"- {what}" for what in found["cut"]] or ["Nothing."]), ""]
    return "\n".join(lines)


def failures_of(found: dict[str, Any]) -> list[str]:
    return [f for part in found.values() if isinstance(part, dict) for f in part.get("failures", [])]


def missed(found: dict[str, Any], goals: list[Goal]) -> list[Goal]:
    """Measured, and short of the goal; the interpreter's times count for nothing."""
    return [] if found["interpreter"] else [g for g in goals if g.verdict in ("least", "missed")]


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def time_of(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


# ------------------------------------------------------------------------------------------------------------ sections


def machine(found: dict[str, Any]) -> list[str]:
    card = found["card"]
    lines = [
        "| | |",
        "|---|---|",
        *(f"| {k} | {number(v) if isinstance(v, float) else v} |" for k, v in found["facts"].items() if v),
    ]
    return [
        *lines,
        f"| floors assume | {card['bandwidth'] / 1e12:.2f} TB/s, {card['rate'] / 1e12:.0f} TFLOP/s: {card['source']} |",
        f"| minutes | {found['minutes']:.1f} |",
    ]


def safety(found: dict[str, Any]) -> list[str]:
    part = found.get("repeats") or {}
    lines = [
        f"- {r['times']:,} times forward and backward at size {r['size']}: {r['differing'] or 'none'} with other bits than the first"
        for r in part.get("repeats", [])
    ]
    return lines + [f"- compute-sanitizer {s['tool']}: {s['result']}" for s in part.get("sanitizer", [])]


def correctness(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name in ("correctness", "attention"):
        part = found.get(name) or {}
        if not (rows := part.get("table", [])):
            continue
        exact = sum(r["checks"] for r in rows if not r["mode"])
        lines += [f"{name}: {part['checks']} checks against float64, {exact} of them exact.", ""]
        modes = [m for m in ("bf16", "fp16", "fp32", "tf32") if any(r["mode"] == m for r in rows)]
        cells: dict[str, dict[str, str]] = {}
        for r in rows:
            if r["mode"]:
                cells.setdefault(r["what"], {})[r["mode"]] = (
                    f"{r['error']:.1e}, {r['worst']:.1e} of {r['tolerance']:.1e}"
                )
        lines += [
            f"| error over all, largest single, of what is allowed | {' | '.join(modes)} |",
            "|---" * (len(modes) + 1) + "|",
        ]
        lines += [f"| {what} | {' | '.join(by.get(m, '-') for m in modes)} |" for what, by in cells.items()]
        lines += ["", *(f"- skipped: {why}" for why in part.get("skipped", []))]
        if times := part.get("times"):
            lines += [
                "",
                "| attention, forward + backward | widths | time | over floor | TFLOP/s |",
                "|---|---|---|---|---|",
            ]
            lines += [
                f"| {t['what']} | {t['widths'][0]}, {t['widths'][1]} | {time_of(t['seconds'])} | {t['seconds'] / t['floor']:.2f} | "
                f"{t['TFLOP/s']:.0f} |"
                for t in times
            ]
    return lines


def table(found: dict[str, Any]) -> list[str]:
    part = found.get("compare") or {}
    lines = [f"- {name} takes no part: {why}" for name, why in part.get("absent", {}).items()]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for c in part.get("cells", []):
        groups.setdefault((c["size"], c["routing"]), []).append(c)
    for (size, routing), cells in groups.items():
        lines += ["", f"### {size}, {routing}", ""]
        lines += [
            "| row | who | time | as a graph | over floor | TFLOP/s | GB/s | peak MB | error | |",
            "|---" * 10 + "|",
        ]
        order = list(dict.fromkeys(c["row"] for c in cells))
        for c in sorted(cells, key=lambda c: order.index(c["row"])):
            lines.append(cell(c))
        floors = {c["row"]: c["floor"] for c in cells}
        lines += ["", "Floors: " + ", ".join(f"{row} {time_of(floor)}" for row, floor in floors.items()) + "."]
    return lines


def cell(c: dict[str, Any]) -> str:
    def at(key: str, scale: float = 1.0, form: str = ".3g") -> str:
        value = c.get(key)
        return "-" if value is None else format(value / scale, form)

    words = [
        c["row"], c["peer"], time_of(c.get("seconds")), time_of(c.get("graph")), at("over floor"), at("TFLOP/s"), at("GB/s"),
        at("peak", 1e6, ",.0f"), at("error", form=".1e"), c.get("note", ""),
    ]  # fmt: skip
    return f"| {' | '.join(words)} |"


def end_to_end(found: dict[str, Any]) -> list[str]:
    part = found.get("steps") or {}
    lines: list[str] = []
    if part.get("layers"):
        lines += ["`moe.MoE` in training mode, forward and backward, router and a shared expert included:", ""]
        lines += ["| size | time | as a graph | over its floor |", "|---|---|---|---|"]
        lines += [
            f"| {x['size']} | {time_of(x['seconds'])} | {time_of(x.get('graph'))} | {x['over floor']:.2f} |"
            for x in part["layers"]
        ]
        lines += [""]
    if not part.get("steps"):
        return lines
    lines += [
        "| training step | tokens | passes | time | tokens/s | floor | over floor | MFU | optimizer | peak GB |",
        "|---" * 10 + "|",
    ]
    for s in part["steps"]:
        lines.append(
            f"| {s['name']}{', train.compile' if s['compiled'] else ''} | {s['tokens']:,} | {s['passes']} | {time_of(s['seconds'])} | "
            f"{s['tokens/s']:,.0f} | {time_of(s['floor'])} | {s['over floor']:.2f} | {share(s.get('MFU'))} | "
            f"{time_of(s['optimizer'])} | {number(s['peak memory'] / 1e9 if 'peak memory' in s else None)} |"
        )
    names = list(dict.fromkeys(name for s in part["steps"] for name in s["floors"]))
    lines += [
        "",
        "Their floors, part by part:",
        "",
        f"| training step | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for s in part["steps"]:
        lines.append(f"| {s['name']} | {' | '.join(time_of(s['floors'].get(n)) for n in names)} |")
    lines += ["", *(f"- {s['name']}: {s['note']}" for s in part["steps"] if s["note"] and not s["compiled"])]
    lines += [f"- {s['name']}: attention by {s['attention']}" for s in part["steps"][:2]]
    if against := part["steps"][0].get("MFU against"):
        from moe.analysis.planner import FORMULA

        lines += [f"- MFU against {against}; {FORMULA}"]
    return lines


SECTIONS = {
    "Machine": machine, "Safety": safety, "Correctness": correctness, "Against peers": table, "End to end": end_to_end,
}  # fmt: skip
