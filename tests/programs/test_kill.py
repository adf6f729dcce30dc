"""Killed at any moment, asked to stop, or started again: the run goes on as if nothing had been."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcome import contents

LONG = ("length=60", "checkpoint.every=4", "heldout.every=10", "log.every=3")
TRAPS = {
    "before the tensors": "from vitssl.train import checkpoint as module; name = 'save_file'",
    "before the manifest": "from vitssl.train import checkpoint as module; name = '_write'",
    "before the rename": "import os as module; name = 'rename'",
    "before LATEST": "import os as module; name = 'replace'",
    "while an old one is removed": "import os as module; name = 'unlink'",
    "before the export": "import pretrain.run as module; name = 'write_export'",
}
SLOW = """
import time, vitssl.train.loop as loop
real = loop._step
loop._step = lambda *a, **k: (time.sleep({pause}), real(*a, **k))[1]
"""
KILL = """
import os, signal
{target}
real, calls = getattr(module, name), [0]
def killed(*arguments, **options):
    calls[0] += any(word in repr(arguments) for word in ('step_', 'LATEST', 'manifest.json', 'encoder'))
    if calls[0] == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(module, name, killed)
"""


@pytest.fixture(scope="module")
def whole(pretrain: Callable, tmp_path_factory: pytest.TempPathFactory):
    """The run that nothing happened to."""
    return pretrain(tmp_path_factory.mktemp("whole") / "run", *LONG).ok()


def equal(run, other) -> None:
    """Bit for bit: every loss and held-out number, parameters and both moments, the export."""
    assert run.losses() == other.losses()
    assert run.rows("probes.jsonl") == other.rows("probes.jsonl")
    ours, theirs = run.tensors(), other.tensors()
    assert ours.keys() == theirs.keys() and any(name.startswith("moments/exp_avg_sq/") for name in ours)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    weights = "export/encoder.safetensors"
    assert (run.folder / weights).read_bytes() == (other.folder / weights).read_bytes()


def test_killed_at_random_moments(start: Callable, data: Path, tmp_path: Path, whole) -> None:
    argv = ["tests/tiny.yaml", f"data.path={data}", "data.split=train", *LONG]
    chance = random.Random(0)
    kills = []
    for after in (8, 24, 44):
        run = start("pretrain", tmp_path / "run", *argv)
        wait_for(tmp_path / f"run/checkpoints/step_{after:08}", run)
        time.sleep(chance.uniform(0, 0.1))
        run.kill()
        kills += run.wait().codes
    assert kills == [-signal.SIGKILL] * 3
    run = start("pretrain", tmp_path / "run", *argv).ok()
    assert re.search(r"continuing \S+ from step (44|48|52|56)", run.out)
    equal(run, whole)


@pytest.mark.parametrize("moment", TRAPS)
def test_killed_at_the_worst_moments(pretrain: Callable, tmp_path: Path, whole, moment: str) -> None:
    count = 1 if moment in ("before the export", "while an old one is removed") else 3
    killed = pretrain(tmp_path / "run", *LONG, trap=KILL.format(target=TRAPS[moment], count=count))
    assert killed.codes == [-signal.SIGKILL], killed.err
    run = pretrain(tmp_path / "run", *LONG).ok()
    assert "continuing" in run.out
    equal(run, whole)
    assert not list((run.folder / "checkpoints").glob(".*")) and not list(run.folder.glob("*.tmp"))


def test_a_killed_process_leaves_a_row_half_written(pretrain: Callable, tmp_path: Path, whole) -> None:
    run = pretrain(tmp_path / "run", *LONG).ok()
    forget(run, 60)
    for name, rest in (("metrics.jsonl", '{"step": 59, "lo'), ("probes.jsonl", "\0\0")):
        with open(run.folder / name, "a") as file:
            file.write(rest)
    equal(pretrain(tmp_path / "run", *LONG).ok(), whole)


@pytest.mark.parametrize("content", ["", "run: [", "\xff", None])
def test_a_damaged_config_is_survived(pretrain: Callable, exported, tmp_path: Path, content: str | None) -> None:
    shutil.copytree(exported.folder, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.unlink() if content is None else path.write_bytes(content.encode("latin1"))
    run = pretrain(tmp_path / "run", "checkpoint.every=5", "length=20")
    assert run.ok().out.count("warning") == 1 and "config.yaml is damaged or missing" in run.out
    assert "is finished" in run.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(
    start: Callable, data: Path, tmp_path: Path, whole, number: signal.Signals
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number!r} is ignored here (nohup), and a program that was started so goes on, as it should")
    argv = ["tests/tiny.yaml", f"data.path={data}", "data.split=train", *LONG, "checkpoint.every=50", "data.workers=1"]
    run = start("pretrain", tmp_path / "run", *argv, trap=SLOW.format(pause=0.02))
    wait_for(tmp_path / "run" / "metrics.jsonl", run)
    os.killpg(run.pids[0], number)  # as a terminal and a batch system do it: the loader's workers are told too
    assert run.ok().err == ""
    step, command = re.search(r"stopped at step (\d+) of 60, saved. To go on, run:  python -m pretrain (.*)", run.out).groups()
    assert 0 < int(step) < 50 and [path.name for path in run.checkpoints()] == [f"step_{int(step):08}"]
    assert not (run.folder / "export").exists()
    again = start("pretrain", tmp_path / "run", *shlex.split(command)).ok()
    assert f"from step {step}" in again.out
    equal(again, whole)


def test_a_killed_worker_is_named_and_the_run_goes_on_later(
    start: Callable, pretrain, data: Path, tmp_path: Path, whole
) -> None:
    argv = ["tests/tiny.yaml", f"data.path={data}", "data.split=train", *LONG, "data.workers=1"]
    run = start("pretrain", tmp_path / "run", *argv, trap=SLOW.format(pause=0.02))
    wait_for(tmp_path / "run/checkpoints/step_00000008", run)
    for child in Path(f"/proc/{run.pids[0]}/task/{run.pids[0]}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    assert run.wait().codes == [2] and run.err.startswith("error: a data worker was killed") and run.err.count("\n") == 1
    equal(pretrain(tmp_path / "run", *LONG).ok(), whole)


def test_interrupted_before_there_is_anything_to_save(pretrain: Callable, tmp_path: Path) -> None:
    press = "lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)"
    run = pretrain(tmp_path / "run", trap=f"import os, signal, pretrain.run as program; program.open_configured = {press}")
    assert run.codes == [130] and run.err.startswith("interrupted: the same command") and run.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_second_interrupt_waits_for_no_step(start: Callable, data: Path, tmp_path: Path) -> None:
    argv = ["tests/tiny.yaml", f"data.path={data}", "data.split=train", "checkpoint.every=1"]
    run = start("pretrain", tmp_path / "run", *argv, trap=SLOW.format(pause="60 * (a[1].step == 1)"))
    wait_for(tmp_path / "run/checkpoints/LATEST", run)
    for _ in range(2):
        time.sleep(0.3)
        run.kill(signal.SIGINT)
    assert run.wait().codes == [130] and run.err.startswith("interrupted: the same command")
    assert [path.name for path in run.checkpoints()] == ["step_00000001"]


def test_killed_before_the_first_checkpoint_it_begins_anew(pretrain: Callable, data: Path, tmp_path: Path) -> None:
    """Also the probe's rows of step 0 stand there once."""
    probe = [f"probe.{part}.{key}" for part in ("bank", "queries") for key in (f"path={data}", "split=test")]
    killed = pretrain(tmp_path / "run", *probe, trap=KILL.format(target=TRAPS["before the tensors"], count=1))
    assert killed.codes == [-signal.SIGKILL] and len(killed.rows()) == 10
    assert [row["step"] for row in killed.rows("probes.jsonl")] == [0, 0, 4, 8, 10]
    run, whole = pretrain(tmp_path / "run", *probe).ok(), pretrain(tmp_path / "whole", *probe).ok()
    assert "continuing" not in run.out
    assert [row["step"] for row in run.rows("probes.jsonl")][:3] == [0, 0, 4]
    equal(run, whole)


def test_both_processes_stop_at_the_same_step(start: Callable, pretrain: Callable, data: Path, tmp_path: Path, whole) -> None:
    argv = ["tests/tiny.yaml", f"data.path={data}", "data.split=train", *LONG, "checkpoint.every=50"]
    run = start("pretrain", tmp_path / "run", *argv, processes=2, trap=SLOW.format(pause=0.02))
    wait_for(tmp_path / "run" / "metrics.jsonl", run)
    run.pids, others = run.pids[1:], run.pids[:1]
    run.kill(signal.SIGTERM)
    run.pids = [*others, *run.pids]
    assert "To go on, start the same launch again:  ... -m pretrain tests/tiny.yaml" in run.ok().out
    again = pretrain(tmp_path / "run", *LONG).ok()
    assert again.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_a_finished_run_says_so(pretrain: Callable, exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder, tmp_path / "run")
    before = contents(tmp_path / "run")
    run = pretrain(tmp_path / "run", "checkpoint.every=5").ok()
    assert "is finished: step 20 of 20" in run.out and run.err == ""
    after = contents(tmp_path / "run")
    assert after.keys() == before.keys() and {name for name in after if after[name] != before[name]} == {"log.txt"}


def test_another_run_that_is_finished_leaves_nothing_to_do(pretrain: Callable, exported, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", f"init.resume={exported.folder}")
    assert run.codes == [2] and f"init.resume={exported.folder}: nothing is left to do" in run.err
    assert "is finished: step 20 of 20. A larger length goes on" in run.err and not (tmp_path / "run").exists()


def test_a_finished_fine_tuning_says_so(finetune: Callable, tmp_path: Path) -> None:
    finetune(tmp_path / "run").ok()
    before = contents(tmp_path / "run")
    assert "is finished: step 12 of 12" in finetune(tmp_path / "run").ok().out
    assert {name for name, content in contents(tmp_path / "run").items() if content != before[name]} == {"log.txt"}


def test_a_larger_length_goes_on(pretrain: Callable, exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder, tmp_path / "run")
    run = pretrain(tmp_path / "run", "length=24").ok()
    assert "from step 20" in run.out and run.losses()[:20] == exported.losses() and len(run.losses()) == 24
    assert '"step": 24' in (run.folder / "export/encoder.json").read_text()


def test_another_run_is_continued_under_a_new_name(pretrain: Callable, exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder, tmp_path / "old")
    shutil.rmtree(tmp_path / "old/checkpoints/step_00000020")
    run = pretrain(tmp_path / "new", f"init.resume={tmp_path / 'old'}").ok()
    assert "from step 15" in run.out and [row["step"] for row in run.rows()] == list(range(16, 21))
    assert [row["loss"] for row in run.rows()] == exported.losses()[15:]


def test_a_real_command_dies_of_a_real_kill(data: Path, tmp_path: Path, whole, pretrain: Callable) -> None:
    argv = ["tests/tiny.yaml", f"data.path={data}", "data.split=train", *LONG, f"run.dir={tmp_path}", "run.name=run"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as many threads as the run it is compared with: they order the sums
    command = [sys.executable, "-m", "pretrain", *argv, "data.workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    wait_for(tmp_path / "run/checkpoints/step_00000012", process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    equal(pretrain(tmp_path / "run", *LONG).ok(), whole)


def wait_for(path: Path, process, *, patience: float = 60.0) -> None:
    end = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > end:
            process.kill()
            pytest.fail(f"{path} never came")
        time.sleep(0.002)


def forget(run, step: int) -> None:
    """As if the run had been killed before this checkpoint."""
    shutil.rmtree(run.folder / f"checkpoints/step_{step:08}")
