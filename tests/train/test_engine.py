"""ZeRO takes the steps of one plain process: stages 0-3 on two ranks, one launch, judged by what zero_worker wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from moe.config import TrainConfig, UserError
from moe.parallel import Ranks
from moe.train.engine import Engine, build

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import zero_worker as worker  # noqa: E402

ONE, TWO = Ranks(0, 1, torch.device("cpu")), Ranks(0, 2, torch.device("cpu"))
SEED = int.from_bytes(os.urandom(2), "little")
EXACT = [name for name, _, changes in worker.RUNS if changes != worker.BF16]
HALF = [name for name, _, changes in worker.RUNS if changes == worker.BF16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything both sides did, from one launch of two ranks that find no compiler."""
    found = tmp_path_factory.mktemp("zero")
    print(f"seed {SEED}")
    worker.train(found, "one", SEED, worker.engine(SEED, ONE, 3))
    worker.train(found, "bf16-one", SEED, worker.engine(SEED, ONE, 3, **worker.BF16))
    (found / "extensions").mkdir()
    environment = {
        **os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "CXX": "/nowhere",
        "PYTHONFAULTHANDLER": "1", "TORCH_EXTENSIONS_DIR": str(found / "extensions"),
    }  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(HERE / "zero_worker.py"), str(found), str(SEED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (found / "said").write_text(done.stdout + done.stderr)
    return found


def states(folder, name):
    return load_file(folder / f"{name}.safetensors")


def figures(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in expected.items()}
    for key in actual:
        a, e = actual[key].double(), expected[key].double()
        assert (a - e).abs().max() <= tolerance * max(e.abs().max(), 1e-6), key


def same(actual, expected):
    assert actual.keys() == expected.keys()
    different = [k for k in actual if not torch.equal(actual[k], expected[k])]
    assert not different, different


# ------------------------------------------------------------------------------------------------ two ranks against one


@pytest.mark.parametrize("name", EXACT)
def test_every_stage_takes_the_clipped_accumulated_steps_of_one_process(folder, name):
    """Step 2 leaves the MTP weights unused, step 3 has an idle expert and a rank that meets half of them."""
    for mine, plain in zip(figures(folder, name), figures(folder, "one"), strict=True):
        assert mine["applied"] and plain["norm"] > 2 * worker.OPTIM.grad_clip
        assert mine["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert mine["norm"] == pytest.approx(plain["norm"], rel=1e-5)
    for when in ("-3", ""):
        close(states(folder, name + when), states(folder, "one" + when), 1e-5)


@pytest.mark.parametrize("name", EXACT + HALF)
def test_every_stage_starts_from_the_same_bits(folder, name):
    """Under bf16 too: masters are the initial fp32 weights, not their roundings."""
    same(states(folder, f"{name}-0"), states(folder, "bf16-one-0" if name in HALF else "one-0"))


@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_the_sums_of_the_step_and_may_be_looked_at(folder, name):
    mine, plain = figures(folder, name)[0], figures(folder, "one")[0]
    assert mine["gradients"] == pytest.approx(plain["gradients"], rel=1e-5)
    assert mine["language"] == pytest.approx(plain["language"], rel=1e-5)
    assert sum(g**2 for g in mine["gradients"].values()) ** 0.5 == pytest.approx(mine["norm"], rel=1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_gathered_weights_answer_like_one_process(folder, name):
    close(states(folder, f"{name}-logits"), states(folder, "one-logits"), 1e-5)


@pytest.mark.parametrize("name", HALF)
def test_bf16_keeps_fp32_masters_and_sums(folder, name):
    """The first step differs by the order of fp32 sums alone; later ones by bf16 roundings that fall otherwise."""
    mine, plain = figures(folder, name), figures(folder, "bf16-one")
    assert mine[0]["norm"] == pytest.approx(plain[0]["norm"], rel=1e-5)
    for a, b in zip(mine, plain, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a["norm"] == pytest.approx(b["norm"], rel=2e-2)
    found = states(folder, name)
    close(found, states(folder, "bf16-one"), 5e-2)
    for key, value in found.items():
        if key.endswith("/master"):
            assert torch.equal(value.bfloat16(), found["model/" + key[len("optim/model.") : -len("/master")]])


# ------------------------------------------------------------------------------------------------------- unsound steps


@pytest.mark.parametrize("name", EXACT + HALF)
def test_nan_on_one_rank_changes_nothing_on_any(folder, name):
    assert figures(folder, f"{name}-nan")["applied"] is False
    same(states(folder, f"{name}-nan"), states(folder, f"{name}-3"))


# --------------------------------------------------------------------------------------------------------- other stages


@pytest.mark.parametrize("source, name", [r[:2] for r in worker.RESUMES])
def test_a_state_is_continued_at_any_other_stage(folder, source, name):
    whole = source.removesuffix("-3")
    loaded = states(folder, f"{name}-loaded")
    same(loaded, states(folder, source))
    loose = name.startswith("bf16")
    assert figures(folder, name)["loss"] == pytest.approx(
        figures(folder, whole)[3]["loss"], rel=2e-3 if loose else 1e-6
    )
    close(states(folder, name), states(folder, whole), 2e-2 if loose else 1e-5)


@pytest.mark.parametrize("source, changes", [("stage3-3", {}), ("bf16-2-3", worker.BF16)])
def test_one_process_continues_what_two_ranks_began(folder, source, changes):
    worker.resume(folder, source, "to-one", SEED, worker.engine(SEED + 1, ONE, 0, **changes))
    same(states(folder, "to-one-loaded"), states(folder, source))
    close(states(folder, "to-one"), states(folder, source.removesuffix("-3")), 2e-2 if changes else 1e-5)


def test_a_state_before_the_first_step_holds_no_moments_and_undoes_later_ones():
    fresh = worker.engine(SEED, ONE, 0)
    state = {k: v.clone() for k, v in fresh.state().items()}
    assert not any(k.startswith("optim/") for k in state)
    worker.step(fresh, SEED, 1)
    fresh.load(*worker.halves(state))
    same(fresh.state(), state)


# ------------------------------------------------------------------------------------------------------ around the engine


def test_nothing_is_compiled_and_nothing_is_said(folder):
    assert not list((folder / "extensions").iterdir())
    noise = [line for line in (folder / "said").read_text().splitlines() if line.strip()]
    assert not noise, noise[:5]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_parameter_that_the_first_step_left_behind_is_named(folder, stage):
    said = figures(folder, "rest")["blind"][stage - 1]
    assert f"train.zero_stage={stage}: model.layers.0.attn_norm.weight has a gradient" in said


def test_parameters_of_different_age_are_refused_in_one_line(folder):
    said = figures(folder, "rest")["uneven"]
    assert "[3.0, 4.0]" in said and "train.zero_stage=2" in said and "\n" not in said


def test_one_process_is_plain_whatever_the_stage():
    before = "deepspeed" in sys.modules
    assert type(worker.engine(SEED, ONE, 3)) is Engine
    assert ("deepspeed" in sys.modules) == before


def test_compiling_is_refused_in_one_line():
    with pytest.raises(UserError, match="train.compile=true does not work with train.zero_stage=2") as error:
        build(worker.objective(SEED), worker.OPTIM, TrainConfig(zero_stage=2, compile=True), TWO)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("installed", [None, "0.19.7", "0.20.0", "1.0"])
def test_another_deepspeed_is_refused_with_the_way_out(monkeypatch, installed):
    module = installed and SimpleNamespace(__version__=installed)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    with pytest.raises(
        UserError, match=rf"train.zero_stage=1 needs deepspeed.*{installed or 'none'} is installed.*pip"
    ):
        worker.engine(SEED, TWO, 1)
