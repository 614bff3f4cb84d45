"""The sequence: the machine, then each part within its share of the time, a report after each. See tools/gpu_check.py."""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
for folder in (str(ROOT), str(Path(__file__).parent)):
    if folder not in sys.path:
        sys.path.insert(0, folder)  # a checkout need not be installed

PARTS = {"repeats": 0.17, "correctness": 0.38, "compare": 0.62, "steps": 0.90, "attention": 0.97}
"""In their order, and the share of the whole time that is spent when each must be done."""
RIGHT, WRONG, UNFIT, MISSED = 0, 1, 2, 3


def main(argv: list[str]) -> int:
    args = arguments(argv)
    if isinstance(args, int):
        return args
    import torch

    if args.kernels:
        importlib.import_module("repeats").every_kernel()
        return RIGHT
    if args.warm:
        importlib.import_module("warm").compile_all(args.warm)
        return RIGHT
    has_gpu, interpreted = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
    if not (has_gpu or args.tiny and interpreted):
        print(
            "gpu_check: no GPU here; TRITON_INTERPRET=1 python tools/gpu_check.py --tiny runs it without one",
            file=sys.stderr,
        )
        return UNFIT
    if has_gpu and (interpreted or args.tiny):
        print("gpu_check: there is a GPU; run it without TRITON_INTERPRET and --tiny", file=sys.stderr)
        return UNFIT
    return check(args)


def check(args: argparse.Namespace) -> int:
    import torch
    import warm
    from goals import judge
    from machine import Clock, first_line, look, state
    from report import failures_of, missed, write

    torch.manual_seed(0)
    clock = Clock(args.minutes)
    machine = look()
    compiling = None
    if machine.is_gpu:
        major, minor = torch.cuda.get_device_capability(machine.device)
        compiling = warm.start(10 * major + minor)
    # a kernel that hangs must not hang whoever waits for the answer
    faulthandler.dump_traceback_later(60 * args.minutes + 60, exit=True)
    today = datetime.date.today().isoformat()
    name = f"{re.sub(r'[^a-z0-9]+', '-', machine.name.lower()).strip('-')}-{today}"
    found: dict[str, Any] = {
        "name": machine.name, "date": today, "interpreter": not machine.is_gpu, "facts": machine.facts,
        "card": machine.card._asdict(),
    }  # fmt: skip
    print(
        f"{machine.name}: floors of {machine.card.bandwidth / 1e12:.2f} TB/s and {machine.card.rate / 1e12:.0f} TFLOP/s"
    )
    for part in args.only:
        clock.until(PARTS[part])
        begun = clock.spent
        if part != "repeats" and compiling is not None:
            warm.wait(compiling, 45)
            compiling = None
        sizes = {"sizes": args.sizes} if part in ("compare", "steps") else {}
        try:
            found[part] = importlib.import_module(part).run(machine, clock, args.tiny, **sizes)
        except Exception as raised:  # the other parts still have something to say
            found[part] = {"failures": [f"{part}: {first_line(raised)}"]}
        found |= {"cut": clock.cut, "minutes": clock.spent / 60, "at the end": state()}
        goals = judge(found)
        paths = write(args.out, name, found, goals)
        print(f"{part}: {clock.spent - begun:.0f} s, {len(found[part].get('failures', []))} failure(s)", flush=True)
    faulthandler.cancel_dump_traceback_later()
    for line in [f"FAILURE {f}" for f in failures_of(found)] + [f"cut: {c}" for c in clock.cut]:
        print(line)
    for goal in missed(found, goals):
        print(f"missed goal: {goal.what}: {goal.value:.4g}, goal {goal.goal:g}")
    print(f"{clock.spent / 60:.1f} minutes; {', '.join(str(p) for p in paths)}")
    if failures_of(found):
        return WRONG
    return MISSED if missed(found, goals) else RIGHT


def arguments(argv: list[str]) -> argparse.Namespace | int:
    """The arguments, or the exit code of ones that do not fit."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas between: {', '.join(PARTS)}")
    parser.add_argument("--sizes", default="S,M,L", help="sizes of the table and the layer")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time for everything; what has none is cut, and told"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu", help="folder of the report")
    parser.add_argument("--tiny", action="store_true", help="a tiny size, under TRITON_INTERPRET=1 without a GPU")
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)  # what the sanitizer runs
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)  # what compiles in advance
    args = parser.parse_args(argv)
    for name, known in (("only", list(PARTS)), ("sizes", ["S", "M", "L"])):
        wanted = [word for word in getattr(args, name).split(",") if word]
        if not wanted or (unknown := [word for word in wanted if word not in known]):
            print(
                f"gpu_check: --{name} {','.join(unknown) if wanted else ''}: know {', '.join(known)}", file=sys.stderr
            )
            return UNFIT
        setattr(args, name, [word for word in known if word in wanted])
    if args.minutes <= 0:
        print(f"gpu_check: --minutes {args.minutes:g} must be more than 0", file=sys.stderr)
        return UNFIT
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
