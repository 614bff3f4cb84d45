"""`python -m moe.kernels.native` says whether there are native kernels, and which level answers; with `build`, and
arguments as build.py takes them, it compiles them. For installations without a Makefile, too."""

import sys

from moe.kernels.native import build, library

if sys.argv[1:2] == ["build"]:
    sys.exit(build.main(sys.argv[2:]))
why = library.status()
print(
    f"{why}; until then the PyTorch path answers" if why else f"the native kernels are ready, level {library.level()}"
)
