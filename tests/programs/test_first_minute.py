"""The README's first two commands, as a newcomer types them, cut to a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def typed(program: str, *overrides: str, cwd: Path) -> str:
    command = [sys.executable, "-m", program, *overrides]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_demo_in_a_minute(tmp_path: Path) -> None:
    probes = ["probe.bank_samples=1000", "probe.queries_samples=500", "probe.protocols=[knn]", "heldout.samples=64"]
    said = typed("pretrain", "length=60", "log.every=20", *probes, cwd=tmp_path)
    run = tmp_path / "runs" / "demo"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert "python -m finetune encoder=runs/demo/export" in said
    assert "kNN" in said
    assert (run / "export" / "encoder.safetensors").is_file()
    assert len(list((run / "pictures").glob("*.png"))) >= 2
    assert len(list((tmp_path / "data" / "demo").glob("*.tar"))) == 7

    said = typed("finetune", "length=16", "test.every=16", cwd=tmp_path)
    assert "fine-tuned on 1,000 labelled images from runs/demo/export" in said
    assert "top-1" in said
    first = json.loads((tmp_path / "runs" / "demo-finetune" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"] - 2.4849066) < 2e-6  # ln 12: the head begins at zero
