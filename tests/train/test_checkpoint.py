"""A checkpoint comes back bit for bit, or an older one does, whatever happens to the disk or the process."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe.config import UserError
from moe.train import checkpoint
from moe.train.checkpoint import load_latest, rng_state, save, set_rng_state

ROOT = Path(__file__).parents[2]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
SHAPES = [(3, 5), (7,), (), (0,), (2, 0, 3), (1, 1)]
FILES = ["model.safetensors", "optim.safetensors", "rng.safetensors", "state.json", "manifest.json", "tokenizer.json"]


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)  # shown with a failure
    return torch.Generator().manual_seed(seed)


def some_tensors(rng, scale=1):
    def noise(*shape):
        return torch.randn(*shape, generator=rng)

    return {
        "model/layers.0.w": noise(9, scale * 4).bfloat16(),
        "model/bias": noise(5),
        "optim/layers.0.w/m": noise(3, 2),
        "rng/torch": torch.randint(0, 256, (33,), generator=rng, dtype=torch.uint8),
    }


def bits(tensor):
    return tensor.dtype, tensor.shape, bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).tolist())


def assert_same(want, have):
    assert want.keys() == have.keys()
    for name in want:
        assert bits(want[name]) == bits(have[name]), name


def save_steps(root, rng, *steps, keep=9):
    written = {}
    for step in steps:
        written[step] = some_tensors(rng)
        save(root, step, written[step], {"step": step}, keep, {"tokenizer.json": "{}"})
    return written


def no_warning(text):
    pytest.fail(f"unexpected warning: {text}")


def names(root):
    return sorted(path.name for path in root.iterdir())


# ---------------------------------------------------------------------------------------------------------- round trip


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, rng):
    tensors = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            raw = torch.randint(0, 256, (*shape, torch.empty(0, dtype=dtype).element_size()), generator=rng)
            raw = (raw % 2 if dtype is torch.bool else raw).to(torch.uint8)  # NaN patterns and denormals included
            tensors[f"model/{dtype}.{shape}"] = raw.view(dtype).reshape(shape)
    save(tmp_path, 1, tensors, {}, keep=1)
    assert_same({k.removeprefix("model/"): v for k, v in tensors.items()}, load_latest(tmp_path).tensors("model"))


def test_prefixes_are_files_and_state_and_extra_files_travel_along(tmp_path, rng):
    state = {"loss": 0.1 + 0.2, "position": {"row": 2**60, "done": None}, "name": "größer", "inf": float("inf")}
    tensors = some_tensors(rng)
    path = save(tmp_path, 123, tensors, state, keep=1, extra_files={"tokenizer.json": '{"é": 1}', "raw.bin": b"\0\xff"})
    assert path == tmp_path / "step-00000123"
    assert names(path) == sorted([*FILES, "raw.bin"])
    found = load_latest(tmp_path, warn=no_warning)
    assert (found.step, found.path, found.state) == (123, path, state)
    assert (path / "raw.bin").read_bytes() == b"\0\xff"
    assert (path / "tokenizer.json").read_text(encoding="utf-8") == '{"é": 1}'
    assert_same({"layers.0.w/m": tensors["optim/layers.0.w/m"]}, found.tensors("optim"))
    assert found.tensors("nothing") == {}


def test_shared_overlapping_and_strided_tensors_come_back_apart(tmp_path, rng):
    base = torch.randn(12, 10, generator=rng)
    tied = torch.nn.Parameter(base[2:5])
    tensors = {
        "model/whole": base,
        "model/tied": tied,
        "model/again": tied,
        "model/overlap": base[4:9],
        "model/transposed": base.t(),
        "model/strided": base[:, ::3],
        "model/expanded": base[:1].expand(4, 10),
        "optim/first": base.flatten()[:50],  # disjoint views of one buffer, as engines keep them
        "optim/second": base.flatten()[50:],
    }
    save(tmp_path, 1, tensors, {}, keep=1)
    found = load_latest(tmp_path)
    for prefix in ("model", "optim"):
        want = {k.split("/")[1]: v for k, v in tensors.items() if k.startswith(prefix)}
        assert_same(want, found.tensors(prefix))


def test_disjoint_views_of_one_buffer_are_not_copied(rng):
    buffer = torch.randn(1000, generator=rng)
    ready = checkpoint._savable({"a": buffer[:400], "b": buffer[400:], "tied": buffer[:400]})
    mine = [name for name, tensor in ready.items() if tensor.untyped_storage().data_ptr() == buffer.data_ptr()]
    assert len(mine) == 2 and "b" in mine


def test_loaded_tensors_outlive_the_folder(tmp_path, rng):
    tensors = some_tensors(rng)
    save(tmp_path, 1, tensors, {}, keep=1)
    have = load_latest(tmp_path).tensors("model")
    shutil.rmtree(tmp_path)
    assert_same({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}, have)


def test_no_checkpoint_is_none(tmp_path):
    assert load_latest(tmp_path / "absent") is None
    assert load_latest(tmp_path) is None
    (tmp_path / "notes").mkdir()
    (tmp_path / ".tmp-step-00000005-1-1").mkdir()
    assert load_latest(tmp_path, warn=no_warning) is None


# -------------------------------------------------------------------------------------------------------------- keeping


def test_newest_are_kept_and_leftovers_swept(tmp_path, rng):
    (tmp_path / ".tmp-step-00000001-77-88").mkdir()
    (tmp_path / ".tmp-step-00000001-77-88" / "model.safetensors").write_bytes(b"half")
    save_steps(tmp_path, rng, 2, 10, 9_999, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00009999"]
    save_steps(tmp_path, rng, 123_456_789, keep=1)
    assert names(tmp_path) == ["step-123456789"]


def test_later_steps_which_a_fallback_left_behind_are_dropped(tmp_path, rng):
    save_steps(tmp_path, rng, 100, 200)
    (tmp_path / "step-00000200" / "state.json").unlink()
    assert load_latest(tmp_path, warn=lambda text: None).step == 100
    save_steps(tmp_path, rng, 150, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00000150"]
    assert load_latest(tmp_path, warn=no_warning).step == 150


def test_the_same_step_may_be_written_again(tmp_path, rng):
    save_steps(tmp_path, rng, 7)
    second = save_steps(tmp_path, rng, 7)[7]
    assert names(tmp_path) == ["step-00000007"]
    assert bits(load_latest(tmp_path, warn=no_warning).tensors("model")["bias"]) == bits(second["model/bias"])


def test_a_crash_between_the_two_renames_of_a_rewrite_loses_nothing(tmp_path, rng):
    written = save_steps(tmp_path, rng, 7)
    os.rename(tmp_path / "step-00000007", tmp_path / "step-00000007.old")
    found = load_latest(tmp_path, warn=no_warning)
    assert found.step == 7
    assert bits(found.tensors("model")["bias"]) == bits(written[7]["model/bias"])
    save_steps(tmp_path, rng, 7)
    assert names(tmp_path) == ["step-00000007"]


def test_a_rewrite_that_fails_between_its_renames_loses_nothing(tmp_path, rng, monkeypatch):
    written = save_steps(tmp_path, rng, 7)
    real = os.rename

    def fail(source, target):
        if Path(target).name == "step-00000007":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match="Input/output error.*step 7 at"):
        save_steps(tmp_path, rng, 7)
    assert bits(load_latest(tmp_path, warn=no_warning).tensors("model")["bias"]) == bits(written[7]["model/bias"])


def test_failure_to_delete_an_old_one_is_a_warning(tmp_path, rng, monkeypatch):
    save_steps(tmp_path, rng, 1)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "_discard", refuse)
    warnings = []
    save(tmp_path, 2, some_tensors(rng), {}, keep=1, warn=warnings.append)
    assert len(warnings) == 1 and "step-00000001" in warnings[0] and "Permission denied" in warnings[0]
    assert load_latest(tmp_path, warn=no_warning).step == 2


# --------------------------------------------------------------------------------------------------------------- damage


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def lengthen(file):
    file.write_bytes(file.read_bytes() + b"\0")


def flip(file):
    content = bytearray(file.read_bytes())
    seed = random.SystemRandom().randrange(2**31)
    print("flip seed", seed)
    dice = random.Random(seed)
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def delete(file):
    file.unlink()


def become_a_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("harm", [truncate, empty, lengthen, flip, delete, become_a_folder])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named_and_the_checkpoint_before_taken(tmp_path, rng, file, harm):
    written = save_steps(tmp_path, rng, 3, 5)
    harm(tmp_path / "step-00000005" / file)
    warnings = []
    found = load_latest(tmp_path, warn=warnings.append)
    assert found.step == 3 and found.state == {"step": 3}
    assert bits(found.tensors("model")["bias"]) == bits(written[3]["model/bias"])
    assert len(warnings) == 1 and file in warnings[0] and "step 5" in warnings[0] and "\n" not in warnings[0]


def test_every_single_flipped_bit_of_a_manifest_is_noticed(tmp_path, rng):
    path = tmp_path / "step-00000001"
    save_steps(tmp_path, rng, 1)
    good = (path / "manifest.json").read_bytes()
    for place in range(len(good)):
        (path / "manifest.json").write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises(checkpoint.Damaged):
            checkpoint._verify(path)


def test_a_folder_under_another_steps_name_is_refused(tmp_path, rng):
    save_steps(tmp_path, rng, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009")
    warnings = []
    assert load_latest(tmp_path, warn=warnings.append).step == 1
    assert "belongs to step 1" in warnings[0]


def test_only_damaged_checkpoints_are_an_error_with_a_way_out(tmp_path, rng):
    save_steps(tmp_path, rng, 1, 2)
    for step in (1, 2):
        flip(tmp_path / f"step-0000000{step}" / "model.safetensors")
    warnings = []
    with pytest.raises(UserError, match=rf"none of the 2 checkpoints in {tmp_path} is whole.*run\.dir") as error:
        load_latest(tmp_path, warn=warnings.append)
    assert len(warnings) == 2 and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------- failing disk


@pytest.mark.parametrize("call", range(1, 8))  # six files, then the folder; the eighth follows the rename
def test_a_full_disk_at_any_sync_leaves_the_last_good_one(tmp_path, rng, monkeypatch, call):
    save_steps(tmp_path, rng, 4)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    calls, real = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as error:
        save_steps(tmp_path, rng, 8)
    text = str(error.value)
    assert str(tmp_path) in text and "No space left" in text and "step 4 at" in text and "space" in text
    assert "\n" not in text
    assert names(tmp_path) == ["step-00000004"]
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.undo()
    save_steps(tmp_path, rng, 8)
    assert load_latest(tmp_path, warn=no_warning).step == 8


@pytest.mark.skipif(os.name == "nt", reason="file size limits are a Unix matter")
def test_a_disk_that_fills_inside_a_shard_is_reported_in_one_line(tmp_path, rng):
    import resource

    save_steps(tmp_path, rng, 4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="step 8 cannot be written.*step 4 at") as error:
            save(tmp_path, 8, some_tensors(rng, scale=1000), {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step-00000004"]


def test_a_folder_that_cannot_be_made_says_that_nothing_was_there(tmp_path, rng):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="there is no earlier one"):
        save(tmp_path / "file", 1, some_tensors(rng), {}, keep=1)


def test_an_interruption_while_writing_leaves_no_trace(tmp_path, rng, monkeypatch):
    save_steps(tmp_path, rng, 4)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_seal", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_steps(tmp_path, rng, 8)
    assert names(tmp_path) == ["step-00000004"]


SAVER = """
import sys, torch
from pathlib import Path
from moe.train.checkpoint import load_latest, save
root = Path(sys.argv[1])
found = load_latest(root)
step = first = found.step if found else 0
while True:
    step += 1
    tensors = {f"{p}/{i}": torch.full((50_000,), float(step)) for p in ("model", "optim") for i in range(4)}
    save(root, step, tensors, {"step": step}, keep=2)
    if step == first + 1:
        print("ready", flush=True)
"""


def test_kill_in_the_middle_of_a_save_always_leaves_a_consistent_checkpoint(tmp_path):
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    dice = random.Random(seed)
    last = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SAVER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2 * dice.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = load_latest(tmp_path, warn=no_warning)
        assert found.step > last and found.state == {"step": found.step}
        values = {float(v) for p in ("model", "optim") for t in found.tensors(p).values() for v in (t.min(), t.max())}
        assert values == {float(found.step)}
        last = found.step


# ------------------------------------------------------------------------------------------------------- random numbers


def draws():
    import numpy

    python = [random.random(), random.gauss(0, 1), random.randrange(2**40)]
    return python, numpy.random.randn(3).tolist(), torch.randn(5).tolist(), torch.randint(9, (3,)).tolist()


@pytest.mark.parametrize("warm_up", range(3))  # an odd number of gaussians leaves half a pair behind in two generators
def test_generators_continue_where_they_were(tmp_path, warm_up):
    import numpy

    outside = rng_state()
    try:
        for _ in range(warm_up):
            random.gauss(0, 1)
            numpy.random.randn()
            torch.randn(1)
        save(tmp_path, 1, {f"rng/{k}": v for k, v in rng_state().items()}, {}, keep=1)
        want = draws()
        assert draws() != want
        set_rng_state(load_latest(tmp_path).tensors("rng"))
        assert draws() == want
    finally:
        set_rng_state(outside)


def test_nothing_is_ever_unpickled():
    source = Path(checkpoint.__file__).read_text(encoding="utf-8")
    assert not re.search(r"torch\.load|torch\.save|import pickle|allow_pickle", source)
