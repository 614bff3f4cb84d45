"""Run a study: arms times seeds, each an ordinary recipe in its own process and folder, then the report.

    python recipes/ablate.py config=recipes/ablations/balance.yaml --dry-run
    python recipes/ablate.py config=recipes/ablations/balance.yaml                           # again: goes on
    python recipes/ablate.py config=recipes/ablations/balance.yaml study.report_only=true
    python recipes/ablate.py --help

Further `key=value` arguments are for the study (`study.parallel=2`) or for all its runs (`train.steps=200`).
"""

import sys
from pathlib import Path

from moe.config import UserError, describe
from moe.study import sweep
from moe.study.grid import StudySchema, load_study
from moe.study.progress import dry_run
from moe.study.report import write_report
from moe.train.log import entry


def main() -> None:
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        return print(describe(StudySchema) + "\n\nEvery knob of study.recipe may follow; it holds for all runs.")
    study = load_study(argv)
    if study.settings.dry_run:
        return dry_run(study)
    failed = [] if study.settings.report_only else sweep.run(study, Path(__file__).parent)
    report = write_report(study, argv)
    print(
        f"\n{report.read_text(encoding='utf-8').partition('## Curves')[0].strip()}\n\nreport      {report}, report.html"
    )
    if failed:
        names = ", ".join(cell.name for cell in failed)
        raise UserError(f"{len(failed)} of {len(study.cells)} runs failed twice ({names}); the report has the others")


if __name__ == "__main__":
    entry(main)
