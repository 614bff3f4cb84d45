"""Prove the kernels on a GPU, and measure them: safety, correctness, a table against peers, whole training steps.

    python tools/gpu_check.py                                  everything, in under eight minutes; report in docs/gpu/
    python tools/gpu_check.py --only compare,steps --sizes S,M --minutes 5 --out /somewhere
    TRITON_INTERPRET=1 python tools/gpu_check.py --tiny        the same from start to finish without a GPU; times mean nothing

Needs torch, triton and numpy, nothing else; the checkout need not be installed. Exit code 0: right and every goal
reached; 1: something is wrong; 2: no GPU, or arguments that do not fit; 3: right, but a goal of speed is missed.

The parts live in tools/gpu/, in their order; docs/gpu/README.md tells how to read the report.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[0] = __file__
    runpy.run_path(str(Path(__file__).with_name("gpu")), run_name="__main__")
