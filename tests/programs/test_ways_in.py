"""The command line and the launchers: what is instant, what only plans, and every way in."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import contents

from finetune.config import FinetuneConfig
from pretrain.config import PretrainConfig

ROOT = Path(__file__).parents[2]
PROBE = """
import sys
from vitssl.report import program
from {program}.__main__ import main
code = program(main, {argv!r})
heavy = [name for name in ("torch", "timm", "accelerate", "numpy", "torchvision", "deepspeed") if name in sys.modules]
print("loaded", heavy)
sys.exit(code)
"""


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    ("argv", "code"),
    [(["--help"], 0), (["-h", "none.yaml"], 0), (["data.pth=x"], 2), (["none.yaml"], 2), (["length=soon"], 2), (["--no"], 2)],
    ids=str,
)
def test_help_and_config_errors_load_no_torch(program: str, argv: list[str], code: int) -> None:
    script = PROBE.format(program=program, argv=argv)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code and done.stdout.splitlines()[-1] == "loaded []", done.stderr
    assert done.stderr.count("\n") == (0 if code == 0 else 1)


@pytest.mark.parametrize(("program", "model"), [("pretrain", PretrainConfig), ("finetune", FinetuneConfig)])
def test_help_names_every_key(start: Callable, tmp_path: Path, program: str, model) -> None:
    run = start(program, tmp_path / "run", "--help").ok()
    text = " ".join(run.out.split())
    assert f"usage: python -m {program} [CONFIG.yaml] [key.path=value ...]" in text and "--plan" in text
    for name, field in model.model_fields.items():
        assert f" {name}=" in text or f" {name}." in text
        assert (field.description or "") in text or f" {name}." in text
    assert " optim.base_lr=0.00015 learning rate before the rule " in text


def test_plan_prints_and_writes_nothing(pretrain: Callable, finetune: Callable, exported, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", "--plan", "micro_batch=2").ok()
    assert not (tmp_path / "run").exists() and run.err == ""
    for line in ("20 steps = 2.667 epochs", "8 = 1 x 2 x 4 (processes x micro-batch x accumulation)", "0.01, not scaled"):
        assert line in run.out
    before = contents(exported.folder)
    pretrain(exported.folder, "--plan", "length=9").ok()
    assert contents(exported.folder) == before
    run = finetune(tmp_path / "run", "--plan").ok()
    assert not (tmp_path / "run").exists() and "12 steps" in run.out and "rule rest.decay" in run.out


def test_a_plan_needs_no_gpu_and_tells_what_is_odd(pretrain: Callable, data: Path, tmp_path: Path, picture) -> None:
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    for precision, shown in (("auto", "bf16"), ("fp16", "fp16")):
        run = pretrain(tmp_path / "run", "--plan", "launch.device=cuda", f"launch.precision={precision}", env=no_gpu).ok()
        assert f"ddp, {shown}, cuda" in run.out and "8 = 1 x 8 x 1 (" in run.out
    assert "longer than the run: this rate is never reached" in pretrain(tmp_path / "run", "--plan", "length=3").ok().out
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg", "c.heic", "notes.txt"):
        (tmp_path / "photos" / name).write_bytes(picture(1))
    run = pretrain(tmp_path / "run", "--plan", f"data.path={tmp_path / 'photos'}", "data.split=null", "length=2").ok()
    assert "2 images (2 other files ignored), 1 lanes" in run.out


def test_the_plan_is_the_runs(pretrain: Callable, tmp_path: Path, exported) -> None:
    planned = pretrain(tmp_path / "run", "--plan").ok().out.splitlines()
    run = exported.out.splitlines()
    begin = next(number for number, line in enumerate(run) if line.startswith("plan of"))
    lines = planned[planned.index("plan") + 1 :]
    assert len(lines) > 6 and run[begin + 1 : begin + 1 + len(lines)] == lines


LAUNCHERS = {
    "python": ["-m"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"],
    "accelerate": ["-m", "accelerate.commands.launch", "--config_file=configs/launch/single.yaml", "-m"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_way_in(launcher: str, data: Path, tmp_path: Path, exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = ["tests/tiny.yaml", f"data.path={data}", "data.split=train", f"run.dir={tmp_path}"]
    done = subprocess.run([sys.executable, *LAUNCHERS[launcher], "pretrain", *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    processes = 2 if launcher == "torchrun" else 1
    assert f"8 = {processes} x {8 // processes} x 1 (" in done.stdout and done.stdout.count("plan of") == 1
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(exported.losses(), rel=1e-5)
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == processes
    assert launcher != "python" or done.stderr == ""
