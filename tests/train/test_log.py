"""What a run leaves and says: folder, metrics, console, wandb, exit codes; nothing torn, asked for or doubled."""

import dataclasses
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from moe.config import LogConfig, PretrainConfig, RunConfig, TrainConfig, UserError, to_dict
from moe.kernels.configs import table_hash
from moe.train import log, run_folder
from moe.train.log import Console, Metrics, RunFolder, Wandb, open_run, read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dice():
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)  # shown with a failure
    return random.Random(seed)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB") or name in ("RANK", "WORLD_SIZE", "NETRC")]:
        monkeypatch.delenv(name)


def environment(**extra):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TORCHELASTIC", "RANK"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


# ----------------------------------------------------------------------------------------------------------- run folder


def changed(cfg, **sections):
    return dataclasses.replace(cfg, **sections)


def test_a_new_folder_says_what_runs_where(tmp_path):
    cfg = PretrainConfig(train=TrainConfig(steps=7))
    run = open_run(cfg, tmp_path / "deep" / "run", extra={"corpus": "abc123"})
    assert not run.resumed
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == json.loads(json.dumps(to_dict(cfg)))
    env = json.loads((run.path / "env.json").read_text())
    assert env["torch"] == torch.__version__ and env["corpus"] == "abc123" and env["cpu_count"] >= 1
    assert env["kernel_table"] == table_hash()
    assert env["versions"]["safetensors"] and env["started"] and env["command"] and env["platform"]
    assert (run.metrics, run.checkpoints) == (run.path / "metrics.jsonl", run.path / "checkpoints")
    assert not list(run.path.glob(".tmp-*"))


def test_the_same_configuration_reopens_and_free_keys_may_change(tmp_path):
    cfg = PretrainConfig()
    open_run(cfg, tmp_path)
    other = changed(
        cfg,
        run=RunConfig(dir="elsewhere"),
        log=LogConfig(every=3, wandb="offline"),
        train=dataclasses.replace(cfg.train, save_every=7, keep_checkpoints=5),
    )
    before = (tmp_path / "config.yaml").read_text()
    assert open_run(other, tmp_path).resumed
    assert (tmp_path / "config.yaml").read_text() == before
    resumed = json.loads((tmp_path / "env.json").read_text())["resumed"]
    assert len(resumed) == 1 and "torch" not in resumed[0]  # only what differs from the first time


def test_another_configuration_is_refused_naming_the_keys(tmp_path):
    cfg = PretrainConfig()
    open_run(cfg, tmp_path)
    train = dataclasses.replace(cfg.train, steps=99, seed=5, threads=2, eval_every=1)
    with pytest.raises(UserError) as error:
        open_run(changed(cfg, train=train), tmp_path)
    text = str(error.value)
    assert "train.eval_every: " in text and "train.seed: " in text and "train.steps: " in text and "-> 99" in text
    assert "1 more" in text and "run.dir=" in text and "\n" not in text


@pytest.mark.parametrize(
    "plant, message",
    [
        (lambda d: (d / "config.yaml").write_text("a: [1"), "config.yaml is damaged"),
        (lambda d: (d / "config.yaml").write_text("text"), "config.yaml is damaged"),
        (lambda d: (d / "metrics.jsonl").write_text("{}"), "without its config.yaml"),
        (lambda d: (d / "checkpoints").mkdir(), "without its config.yaml"),
        (lambda d: (d.rmdir(), d.write_text("a file")), "cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_trusted_is_refused(tmp_path, plant, message):
    folder = tmp_path / "run"
    folder.mkdir()
    plant(folder)
    with pytest.raises(UserError, match=message) as error:
        open_run(PretrainConfig(), folder)
    assert "run.dir=" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_in_use_by_another_process_is_refused_and_freed_when_that_is_killed(tmp_path):
    pytest.importorskip("fcntl")
    script = (
        "import sys, time\nfrom moe.train.run_folder import _lock\nfrom pathlib import Path\n_lock(Path(sys.argv[1]))\n"
    )
    script += "print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by another process"):
            open_run(PretrainConfig(), tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    open_run(PretrainConfig(), tmp_path)


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    run = open_run(PretrainConfig(), tmp_path / "run")
    metrics = Metrics(run.metrics)
    metrics.truncate(0)
    metrics.write({"step": 1, "train/loss": 1.0})
    metrics.sync()
    with Console(steps=3, every=1) as console:
        console.header({"model": "tiny"})
        console.line("a")
        console.warn("b")
        console.step({"step": 1, "train/loss": 1.0, "val/bpb": 2.0})
    sink = Wandb(LogConfig(wandb="offline"), run, {}, console.warn)
    sink.log({"step": 1})
    sink.finish()
    assert sink.mode == "disabled" and not (tmp_path / "run").exists() and capfd.readouterr() == ("", "")


def test_git_state_shows_changed_and_new_source_files_without_touching_the_repository(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True)

    assert run_folder.git_state(tmp_path) == ({}, "")
    git("init")
    assert run_folder.git_state(tmp_path) == ({}, "")  # no commit yet
    (tmp_path / "a.py").write_text("one\n")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git("add", ".")
    git("commit", "-m", "first")
    state, diff = run_folder.git_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", state["git_commit"]) and not state["git_dirty"] and diff == ""
    (tmp_path / "a.py").write_text("two\n")
    (tmp_path / "ä new.py").write_text("fresh\n")
    (tmp_path / "ignored.py").write_text("no\n")
    (tmp_path / "big.txt").write_text("data\n")
    index = (tmp_path / ".git" / "index").read_bytes()
    state, diff = run_folder.git_state(tmp_path)
    assert state["git_dirty"] and "+two" in diff and "+fresh" in diff and "+no" not in diff and "data" not in diff
    assert (tmp_path / ".git" / "index").read_bytes() == index
    (tmp_path / "a.py").write_text("x" * 2_000_000)
    _, diff = run_folder.git_state(tmp_path)
    assert len(diff) < 1_000_100 and "cut at" in diff
    (tmp_path / "inner").mkdir()
    assert run_folder.git_state(tmp_path / "inner") == ({}, "")  # installed inside somebody else's checkout


# -------------------------------------------------------------------------------------------------------------- metrics


def test_records_come_back_and_every_line_is_strict_json(tmp_path, dice):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    records = [{"step": s, "train/loss": dice.random() * 10 ** dice.randint(-30, 30), "n": 3} for s in range(1, 9)]
    for record in records:
        metrics.write(record)
        assert read_metrics(metrics.path)[-1] == record  # visible at once, bit for bit
    assert read_metrics(metrics.path) == records


def test_tensors_become_numbers_and_nonfinite_values_null(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(
        {
            "step": 1,
            "a": torch.tensor(0.5),
            "b": torch.tensor(float("nan")),
            "c": float("inf"),
            "d": [1.0, float("-inf")],
            "e": torch.tensor([1, 2]),
            "f": None,
        }
    )
    line = (tmp_path / "metrics.jsonl").read_text()
    plain = {"step": 1, "a": 0.5, "b": None, "c": None, "d": [1.0, None], "e": [1, 2], "f": None}
    assert json.loads(line, parse_constant=pytest.fail) == {**plain, "nonfinite": ["b", "c", "d"]}


def test_truncate_leaves_no_torn_and_no_double_line_wherever_a_crash_cut(tmp_path, dice):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": s, "train/loss": dice.random()} for s in range(1, 13)]
    whole = "".join(json.dumps(r) + "\n" for r in records)
    for _ in range(40):
        cut, step = dice.randrange(len(whole) + 1), dice.randrange(14)
        path.write_text(whole[:cut] + dice.choice(["", "\0\0\0\n"]))
        complete = whole[:cut].count("\n")
        metrics = Metrics(path)
        metrics.truncate(step)
        assert read_metrics(path) == records[: min(step, complete)]
        metrics.write({"step": step + 1, "again": True})
        metrics.close()
        assert read_metrics(path) == [*records[: min(step, complete)], {"step": step + 1, "again": True}]
        assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_the_first_write_drops_what_stands_from_its_step_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    Metrics(path).write({"step": 2, "x": 1})
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "x": 1}]


def test_a_step_is_written_once(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.write({"step": 3})
    for step in (3, 2):
        with pytest.raises(AssertionError):
            metrics.write({"step": step})


def test_unreadable_metrics_name_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(path)
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not a record"):
        read_metrics(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_ends_in_one_line(monkeypatch):
    metrics = Metrics("/dev/full")
    monkeypatch.setattr(metrics, "truncate", lambda step: None)
    with pytest.raises(UserError, match="/dev/full cannot be written.*No space left"):
        metrics.write({"step": 1})
    metrics.close()


# -------------------------------------------------------------------------------------------------------------- console

RECORD = {
    "train/loss": 3.21987,
    "train/bpb": 1.5,
    "perf/tokens_per_s": 12_345.0,
    "moe/maxvio": 0.817,
    "perf/mfu": 0.031,
    "train/lr": 3e-3,
}


def test_without_a_terminal_there_are_plain_lines_every_so_often(capsys):
    with Console(steps=25, every=10) as console:
        console.header({"model": "tiny", "run folder": "runs/a\nand more"})
        for step in range(1, 26):
            console.step({"step": step, **RECORD, **({"val/bpb": 1.4, "val/loss": 3.0} if step == 20 else {})})
        console.line("done [with brackets]")
        console.warn("careful")
    out, err = capsys.readouterr()
    assert err == "warning: careful\n" and "\x1b" not in out and "\r" not in out
    lines = out.splitlines()
    assert lines[:3] == ["model       tiny", "run folder  runs/a", "            and more"]
    steps = [line for line in lines if line.startswith("step ") and "/25" in line]
    assert [line.split()[1] for line in steps] == ["1/25", "10/25", "20/25", "25/25"]
    assert re.fullmatch(
        r"step 10/25  loss 3\.2199  bpb 1\.500  12\.3k tok/s  maxvio 0\.82  mfu 3\.1%  lr 3\.0e-03  eta \d+s", steps[1]
    )
    assert "step 20: validation bpb 1.4000, loss 3.0000" in lines and lines[-1] == "done [with brackets]"


def test_figures_that_a_run_lacks_are_left_out(capsys):
    Console(steps=2, every=1).step({"step": 1, "train/loss": None, "perf/mfu": None, "train/lr": 1e-4})
    assert capsys.readouterr().out == "step 1/2  lr 1.0e-04\n"


def test_a_resumed_run_starts_with_a_line(capsys):
    Console(steps=100, every=10).step({"step": 57, "train/loss": 1.0})
    assert capsys.readouterr().out == "step 57/100  loss 1.0000\n"


def test_durations_read_well():
    texts = {0.6: "1s", 59.6: "1m00s", 61: "1m01s", 3599: "59m59s", 3600: "1h00m", 90_061: "25h01m"}
    assert {seconds: log._duration(seconds) for seconds in texts} == texts


TERMINAL = """
import time
from moe.train.log import Console
with Console(steps=30, every=10) as console:
    console.header({"model": "tiny"})
    for step in range(1, 31):
        record = {"step": step, "train/loss": 3.25, "train/bpb": 1.5, "perf/tokens_per_s": 12345.0, "moe/maxvio": 0.8,
                  "perf/mfu": 0.031, "train/lr": 3e-3}
        if step == 20:
            record["val/bpb"] = 1.25
        console.step(record)
        time.sleep(0.03)
    console.warn("close [to] the edge")
print("after")
"""


def in_terminal(script, columns=80, **extra):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=follower, stdout=follower, stderr=follower,
        env=environment(TERM="xterm", COLUMNS=str(columns), **extra),
    )  # fmt: skip
    os.close(follower)
    output = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(leader)
    assert process.wait() == 0, output.decode()
    return output.decode()


def test_on_a_terminal_there_is_one_bar_and_messages_stand_above_it():
    output = in_terminal(TERMINAL)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert "step 30/30" in plain and "loss 3.2500" in plain and "12.3k tok/s" in plain
    assert "step 20: validation bpb 1.2500" in plain and "warning: close [to] the edge" in plain
    assert plain.rstrip().endswith("after")
    assert "\x1b[?25l" in output and output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor is back
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]+", plain))


@pytest.mark.parametrize("columns", [50, 200])
def test_the_bar_fits_its_terminal_and_the_time_left_is_the_last_to_go(columns):
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", in_terminal(TERMINAL, columns))
    assert "eta " in plain and "\u2026" not in plain
    assert ("mfu 3.1%" in plain) == (columns == 200)
    assert all(len(line) <= columns for line in re.split(r"[\r\n]+", plain))


# ---------------------------------------------------------------------------------------------------------------- wandb


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    folder = RunFolder(tmp_path / "run", False)
    folder.path.mkdir()
    yield folder
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def test_wandb_offline_writes_the_records_silently_under_one_id(wandb_home, capfd):
    pytest.importorskip("wandb")
    for _ in range(2):  # the second time is a resumed run
        sink = Wandb(LogConfig(wandb="offline"), wandb_home, {"model": {"hidden_size": 64}}, pytest.fail)
        assert sink.mode == "offline"
        for step in range(1, 4):
            sink.log({"step": step, "train/loss": 1.0 / step, "train/needle": 0.5, "gap": None})
        sink.finish()
    assert capfd.readouterr() == ("", "")
    sys.modules["wandb"].teardown()  # its process may write the last records after `finish` has returned
    files = list(wandb_home.path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {"run-" + (wandb_home.path / "wandb_id").read_text()}
    assert all(b"train/needle" in file.read_bytes() for file in files)


def test_an_unreachable_wandb_server_means_offline_and_one_line(wandb_home, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(log, "WANDB_PATIENCE", 1.0)
    warnings = []
    sink = Wandb(LogConfig(wandb="auto"), wandb_home, {}, warnings.append)
    sink.log({"step": 1, "train/loss": 1.0})
    sink.finish()
    assert len(warnings) == 1 and "logging offline" in warnings[0] and "\n" not in warnings[0]
    assert sink.mode == "offline" and list(wandb_home.path.glob("wandb/offline-run-*/*.wandb"))
    assert capfd.readouterr() == ("", "")


def test_a_failing_wandb_costs_one_warning_and_nothing_else(wandb_home):
    class Broken:
        def log(self, *_, **__):
            raise RuntimeError("the service is gone\nmany lines")

    warnings = []
    sink = Wandb(LogConfig(wandb="disabled"), wandb_home, {}, warnings.append)
    sink._run = Broken()
    for step in (1, 2):
        sink.log({"step": step})
    sink.finish()
    assert len(warnings) == 1 and "the service is gone" in warnings[0] and "\n" not in warnings[0]


NO_KEY = """
import sys
from pathlib import Path
from moe.config import LogConfig
from moe.train.log import RunFolder, Wandb
folder = RunFolder(Path(sys.argv[1]), False)
assert Wandb(LogConfig(wandb="auto"), folder, {}, print).mode == "disabled"
assert "wandb" not in sys.modules and "rich" not in sys.modules
sink = Wandb(LogConfig(wandb="online"), folder, {}, print)
sink.log({"step": 1, "train/loss": 1.0})
sink.finish()
print(sink.mode)
"""


def test_without_a_key_nothing_is_asked_and_auto_does_not_even_load_wandb(tmp_path):
    pytest.importorskip("wandb")
    done = subprocess.run(
        [sys.executable, "-c", NO_KEY, tmp_path], cwd=tmp_path, env=environment(HOME=str(tmp_path)),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    warning, mode = done.stdout.splitlines()
    assert "finds no key" in warning and "logging offline" in warning and mode == "offline"


@pytest.mark.parametrize(
    "wish, env, netrc, mode",
    [
        ("auto", {}, None, "disabled"),
        ("auto", {"WANDB_API_KEY": "k"}, None, "online"),
        ("auto", {}, "machine api.wandb.ai login user password k", "online"),
        ("auto", {}, "machine example.com login user password k", "disabled"),
        ("auto", {}, "machine api.wandb.ai\nlogin", "disabled"),  # half a file
        ("auto", {"WANDB_BASE_URL": "https://my.host:8080"}, "machine my.host login user password k", "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, "offline"),
        ("auto", {"WANDB_MODE": "online"}, None, "disabled"),
        ("offline", {"WANDB_API_KEY": "k"}, None, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, None, "disabled"),
        ("online", {"WANDB_API_KEY": "k"}, None, "online"),
    ],
)
def test_wandb_goes_online_only_with_a_key(tmp_path, monkeypatch, wish, env, netrc, mode):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
        (tmp_path / ".netrc").chmod(0o600)
    assert log._wandb_mode(wish, pytest.fail) == mode


# ---------------------------------------------------------------------------------------------------------------- entry

RECIPE = """
import sys
from moe.config import UserError
from moe.train.log import entry

def main():
    print("working")
    kind = sys.argv[1]
    if kind == "user":
        raise UserError("train.steps=x must be\\nan integer")
    if kind == "bug":
        raise ValueError("a bug")
    while kind == "flood":
        print("on and on", flush=True)

entry(main)
"""


def recipe(kind):
    return subprocess.run([sys.executable, "-c", RECIPE, kind], env=environment(), capture_output=True, text=True)


def test_a_user_error_is_one_line_and_exit_code_2():
    done = recipe("user")
    assert (done.returncode, done.stdout) == (2, "working\n")
    assert done.stderr == "error: train.steps=x must be an integer\n"


def test_a_reader_that_leaves_ends_a_recipe_in_one_line():
    command = [sys.executable, "-c", RECIPE, "flood"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.readline()
        run.stdout.close()
        told = run.stderr.read()
    assert (run.returncode, told) == (1, "error: nobody reads the output any more; the same command resumes\n")


def test_a_bug_keeps_its_traceback():
    done = recipe("bug")
    assert (done.returncode, done.stdout) == (1, "working\n")
    assert "Traceback" in done.stderr and done.stderr.endswith("ValueError: a bug\n")


def test_ctrl_c_is_one_line_and_exit_code_130(capfd):
    with pytest.raises(SystemExit) as end:
        log.entry(lambda: signal.raise_signal(signal.SIGINT))
    assert end.value.code == 130
    assert capfd.readouterr().err == "interrupted; the same command with the same run.dir resumes\n"


@pytest.mark.parametrize("main", [lambda: None, lambda: sys.exit(0)])
def test_success_and_help_return_quietly(main, capfd):
    log.entry(main)
    assert capfd.readouterr() == ("", "")


def test_other_ranks_exit_silently_and_leave_the_line_to_the_launcher(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def main():
        raise UserError("data.path=x does not exist")

    with pytest.raises(SystemExit) as end:
        log.entry(main)
    assert end.value.code == 2 and capfd.readouterr() == ("", "")
    error = json.loads((tmp_path / "error.json").read_text())
    assert error["message"]["message"] == "error: data.path=x does not exist"


def test_under_torchrun_the_line_comes_once_and_first(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, tmp_path / "recipe.py", "user"], env=environment(), capture_output=True, text=True, timeout=120
    )
    print(f"{time.monotonic() - start:.1f} s")
    line = "error: train.steps=x must be an integer"
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == line
    assert done.stderr.splitlines().count(line) == 1  # the table repeats it in its own column
    assert "exitcode  : 2" in done.stderr and "Traceback" not in done.stderr.split("ChildFailedError")[1]
