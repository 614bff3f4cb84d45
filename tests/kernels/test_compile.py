"""The compile proof: its eyes on planted faults, its rules one by one, and the production kernels on every card.

Compilation happens in processes of its own, as tests here run under Triton's interpreter.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from moe.kernels import ahead, configs, launch
from moe.kernels.configs import Config, Row

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "compile_kernels.py"

PLANTED = """
import torch, triton, triton.language as tl
from moe.kernels import ahead
from moe.kernels.launch import launch, recording

@triton.jit(do_not_specialize=["m"])
def _product(x, w, y, m, k, stride, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    row, column, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for done in tl.range(0, k, K):
        a = tl.load(x + row[:, None] * stride + done + depth[None, :], mask=(row < m)[:, None], other=0.0)
        b = tl.load(w + column[None, :] * stride + done + depth[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(y + row[:, None] * N + column[None, :], acc.to(y.dtype.element_ty), mask=(row < m)[:, None])

@triton.jit
def _total(x, y, N: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.arange(0, N)), 0))

def on(arch, stride=256, m=100, **options):
    bf16 = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with recording(arch) as found:
        launch(_product, (1,), bf16(64, 256), bf16(64, 256), bf16(64, 64), m, 256, stride, N=64, M=64, K=64, **options)
    return found

def say(name, made):
    print(name, made.kernel, made.arch, made.registers <= 64, made.stack > 0, made.count("LDL", "STL") > 0, made.shared > 0,
          made.count(made.tensor_word) > 0, made.count("LDG", of=("U16",)) > 0, made.count("RED", "REDG", "ATOMG") > 0)

if __name__ == "__main__":
    for arch in (80, 90, 100, 120):
        say("clean", ahead.compile_for(on(arch), arch)[0])
    spilt, = ahead.compile_for(on(80, maxnreg=32), 80)
    misaligned, = ahead.compile_for(on(90, stride=257), 90)
    say("spilt", spilt)
    say("misaligned", misaligned)
    with recording(90) as found:
        launch(_total, (1,), torch.empty(64, device="meta"), torch.empty(1, device="meta"), N=64)
    say("atomic", ahead.compile_for(found, 90)[0])
    broken = on(90)[0]
    print("broken", type(ahead.compile_for([broken._replace(args=broken.args[:-1])], 90)[0]).__name__)
    keys = [ahead.key(on(90, m=m, **o)[0], 90) for m, o in ((100, {}), (99, {}), (1, {}), (100, {"num_warps": 8}))]
    print("keys", [keys.index(key) for key in keys])
"""


def run(*command, **env):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


def test_planted_faults_are_seen_in_the_machine_code(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    done = run(tmp_path / "planted.py", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    head = ("kernel", "arch", "few registers", "stack", "local", "shared", "tensor", "narrow", "atomic")
    seen = {tuple(line.split()[:3:2]): dict(zip(head, line.split()[1:])) for line in done.stdout.splitlines()[:-2]}
    for arch in ("80", "90", "100", "120"):
        found = seen["clean", arch]
        assert found["tensor"] == found["shared"] == "True", found
        assert found["stack"] == found["local"] == found["narrow"] == found["atomic"] == "False", found
    assert (spilt := seen["spilt", "80"])["stack"] == spilt["local"] == spilt["few registers"] == "True"
    assert seen["misaligned", "90"]["narrow"] == "True"
    assert seen["atomic", "90"]["atomic"] == "True" and seen["atomic", "90"]["tensor"] == "False"
    assert done.stdout.splitlines()[-2] != "broken Compiled"
    assert done.stdout.splitlines()[-1] == "keys [0, 0, 0, 3]"  # m is not specialised, options are


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import compile_kernels

    return compile_kernels


def binary(arch=90, words=(), constants={}, **changes):  # noqa: B006
    counts = Counter({"HGMMA.64x64x16.F32.BF16": 4, "LDGSTS.E.BYPASS.LTC128B.128": 8, "FFMA": 9, **dict(words)})
    made = ahead.Compiled(
        "_gmm",
        arch,
        "",
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, **constants},
        4,
        3,
        128,
        0,
        48 * 1024,
        0,
        [],
        counts,
    )
    return made._replace(**changes)


def judged(tool, made, dtype="bfloat16", ctas=2):
    config = Config(64, 64, 64, 4, 3, ctas)
    case = tool.Case(None, made.arch, dtype, Row("gmm", 90, "half", None, None, config), "here")
    return case.faults(made)


def test_a_clean_binary_has_no_fault(tool):
    assert judged(tool, binary()) == []


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"words": {"LDL.64": 3, "STL": 1}}, "4 accesses to local memory"),
        ({"words": {"RED.E.ADD.F32.FTZ.RN": 1}}, "1 atomics"),
        ({"words": {"ATOMG.E.ADD": 2}}, "2 atomics"),
        ({"words": {"ATOMS.ADD.F32": 1}}, "1 atomics"),
        ({"shared": 228 * 1024}, "bytes of shared memory"),
        ({"tensor_columns": 513}, "columns of tensor memory"),
        ({"registers": 168, "ctas": 4}, "3 programs a multiprocessor, the row says 4"),
        ({"shared": 120 * 1024}, "1 programs a multiprocessor, the row says 2"),
        ({"warnings": ["ptxas warning : (C7510) wgmma.mma_async instructions are serialized"]}, "C7510"),
        ({"words": {"HGMMA.64x64x16.F32.BF16": 0}}, "no HGMMA"),
        ({"words": {"HMMA.16816.F32.BF16": 2}}, "2 HMMA beside HGMMA"),
        ({"words": {"LDG.E.U16": 7}}, "7 narrow loads"),
        ({"words": {"LDGSTS.E": 12}}, "12 narrow loads"),
        ({"words": {"LDGSTS.E.BYPASS.LTC128B.128": 7}}, "16-byte loads move 14336 bytes, a step has 16384"),
        ({"arch": 100}, r"no UTC\*MMA"),
        ({"arch": 120}, "no HMMA"),
        ({"dtype": "float32", "words": {"FFMA": 0}}, "no FFMA"),
        ({"dtype": "tf32", "words": {"HGMMA.64x64x16.F32.BF16": 0}}, "no HGMMA"),
    ],
)
def test_each_rule_names_its_fault_alone(tool, changes, told):
    asked = {name: changes.pop(name) for name in ("dtype", "ctas") if name in changes}
    found = judged(tool, binary(**changes), **asked)
    assert any(re.search(told, fault) for fault in found), found
    assert len(found) == 1 + ("228" in told or changes.get("shared", 0) > 200 * 1024 or "columns" in told), found


def test_what_only_looks_like_a_fault_is_none(tool):
    words = {
        "REDUX.SUM": 5,
        "UTCATOMSWS.FIND_AND_SET.ALIGN": 1,
        "ATOMS.ADD": 1,
        "LDG.E.128": 4,
        "LDG.E": 3,
        "LDGDEPBAR": 6,
    }
    assert judged(tool, binary(words=words)) == []
    assert judged(tool, binary(words={"LDGSTS.E": 60}), dtype="tf32") == []  # Hopper's TF32 takes one layout only


def test_programs_a_multiprocessor_are_bound_by_each_resource():
    for changes, programs in (
        (dict(registers=32, shared=0), 16),  # 64 warps
        (dict(registers=32, shared=0, arch=86), 12),  # 48 warps
        (dict(registers=255, shared=0), 2),
        (dict(registers=129, shared=0), 3),  # registers are dealt out in eights
        (dict(registers=32, shared=75 * 1024), 3),
        (dict(registers=32, shared=99 * 1024, arch=120), 1),
        (dict(registers=32, shared=0, warps=1), 32),
        (dict(registers=32, shared=0, warps=1, arch=86), 16),
        (dict(registers=32, shared=0, tensor_columns=256, arch=100), 2),
    ):
        assert binary(**changes).ctas == programs, changes


def test_a_recording_holds_what_would_be_launched_and_nests():
    from moe.kernels.gmm import gmm

    def call():
        rows, w = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((640, 64), (8, 32, 64)))
        return gmm(rows, w, torch.empty(8, dtype=torch.int32, device="meta"), transpose=True)

    with launch.recording(90) as outer:
        call()
        with launch.recording(120) as inner:
            assert call().shape == (640, 32) and launch.device_of(torch.empty(0)) == (120, launch.SMS[120])
        assert launch.device_of(torch.empty(0)).arch == 90
    assert [found.kernel.__name__ for found in (*outer, *inner)] == ["_gmm", "_gmm"]
    assert outer[0].options["BLOCK_N"] == 32 and outer[0].args[0].is_meta


def test_a_row_that_no_launch_takes_is_a_fault(tool):
    table = configs.table()
    rows = [row for listed in table.rows.values() for row in listed]
    cases = [tool.Case(None, 90, "", row, "") for row in rows]
    assert tool.unreached(cases, ahead.LIMITS) == []
    missing = [row for row in rows if row.family == 100][3]
    found = tool.unreached([case for case in cases if case.row != missing], (90, 103))
    assert len(found) == 1 and str(missing) in found[0]
    assert tool.unreached([case for case in cases if case.row.family == 90], (90,)) == []


@pytest.mark.slow
def test_every_kernel_and_row_compiles_clean_for_every_card():
    done = run(TOOL, "--quick", "--jobs", os.cpu_count() or 1)
    print(done.stdout, done.stderr)  # one line a fault
    assert done.returncode == 0
    summary = done.stdout.splitlines()[-1]
    assert ", ".join(f"sm_{arch}" for arch in ahead.LIMITS) in summary and ": 0 faults" in summary
