"""Exactly once on real processes: killed, continued with other processes and workers, and the ledger has no repeat, no gap."""

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from vitssl.config import build
from vitssl.data import ledger
from vitssl.data.feed import open_configured, training_samples
from vitssl.data.layout import choose_layouts
from vitssl.sections import DataConfig

KILL = """
import os, signal
from vitssl.train import loop
real, count = loop._step, [0]
def step(*arguments, **options):
    count[0] += 1
    if count[0] == {after} and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
loop._step = step
"""


def entries(folder: Path) -> dict[int, str]:
    found = list(ledger.read(folder / "ledger"))
    assert len(dict(found)) == len(found), "a position stands twice"
    return dict(found)


@pytest.mark.parametrize("sources", [False, True], ids=["one source", "a mixture"])
def test_no_repeat_and_no_gap(start: Callable, data: Path, tmp_path: Path, sources: bool) -> None:
    argv = ["tests/tiny.yaml", "data.ledger=true", "checkpoint.every=4", "length=25", "heldout.every=100"]
    values = (
        {"sources": [{"path": f"{data}/train-{{0..1}}.tar", "weight": 3}, {"path": f"{data}/train-2.tar"}]} if sources else {}
    )
    values = values or {"path": str(data), "split": "train"}
    argv += [f"data.{key}={json.dumps(value)}" for key, value in values.items()]
    ways = [(2, 0, 7), (1, 1, 5), (2, 1, 6), (1, 4, None)]  # processes, workers, killed after so many steps
    for processes, workers, after in ways:
        trap = KILL.format(after=after) if after else None
        run = start("pretrain", tmp_path / "run", *argv, f"data.workers={workers}", processes=processes, trap=trap)
        if after is None:
            run.ok()
            continue
        assert run.forks.ask(wait=run.pids[0], timeout=60)["code"] == -signal.SIGKILL
        run.pids = run.pids[1:]  # the other waits for it
        run.kill()
        run.wait()
    found = entries(tmp_path / "run")
    assert sorted(found) == list(range(25 * 8))
    source = open_configured(build(DataConfig, values, where="here"), key="data")
    layouts = choose_layouts(source, DataConfig())
    order = training_samples(source, DataConfig(), [], seed=0, layouts=layouts, channels=3).order
    wanted = [raw.key for raw in source.read(order.locate(range(200)))]
    assert [found[position] for position in range(200)] == wanted
    if not sources:  # 200 positions of 60 samples: three epochs whole, and a third of the next
        assert set(Counter(wanted).values()) == {3, 4} and all(
            set(Counter(wanted[60 * epoch : 60 * epoch + 60]).values()) == {1} for epoch in range(3)
        )
    assert len(run.losses()) == 25
