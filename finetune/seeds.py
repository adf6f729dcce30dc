"""The same fine-tuning from several seeds, and what its numbers come to: mean, deviation, and the interval of the mean.

Each seed is a run like any other, in a folder of its own (``NAME-seed0``, ...), so a command that was stopped goes on where it
was, and more seeds later only add theirs. The interval is Student's: three seeds say little, and it shows.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.config import FinetuneConfig
from vitssl import dist
from vitssl.command import Command
from vitssl.report import Report
from vitssl.train.export import newest_export
from vitssl.train.folder import begun_with, run_folder

Once = Callable[..., bool]  # (config, command, last=) -> whether the run is finished
LEVEL = 0.95


def run_seeds(config: FinetuneConfig, command: Command, once: Once) -> int:
    """Run the seeds one after the other and sum them up. Returns the exit code."""
    own = [seeded(config, config.seed + number) for number in range(config.seeds)]
    if config.encoder == "newest":  # decided once: all seeds begin from the same
        known = ((begun_with(run_folder(each)) or {}).get("encoder") for each in own)
        found = next(filter(None, known), None) or str(newest_export(config.run.dir))
        own = [each.model_copy(update={"encoder": found}) for each in own]
    report = Report(active=dist.rank() == 0)
    for number, each in enumerate(own):
        report.say(f"seed {each.seed}, {number + 1} of {len(own)}", style="bold")
        if not once(each, command, last=number + 1 == len(own)) or command.flags:
            return 0
    if dist.rank() == 0:
        _sum_up(config, own, report)
    return 0


def seeded(config: FinetuneConfig, seed: int) -> FinetuneConfig:
    """The config of one seed: an ordinary run."""
    run = config.run.model_copy(update={"name": f"{config.run.name}-seed{seed}"})
    return config.model_copy(update={"seeds": 1, "seed": seed, "run": run})


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, deviation (n - 1) and the 95 % interval of the mean by Student's t. Two values at least."""
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    reach = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return {"values": list(values), "mean": mean, "deviation": deviation, "low": mean - reach, "high": mean + reach}


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """t with P(|T| < t) = ``level`` for Student's T of so many degrees of freedom."""
    low, high = 0.0, 1.0
    while _inside(high, freedom) < level:
        low, high = high, 2 * high
    for _ in range(60):  # halvings: to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < level else (low, middle)
    return high


def _inside(t: float, freedom: int) -> float:
    """P(|T| < t), the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for number in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (number + 1) / (number + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def _sum_up(config: FinetuneConfig, own: Sequence[FinetuneConfig], report: Report) -> None:
    rows = [_last_row(run_folder(each)) for each in own]
    names = [name for name in rows[0] if name not in ("step", "images") and all(name in row for row in rows)]
    found = {name: summary([row[name] for row in rows]) for name in names}
    folder = run_folder(config) / "results"
    folder.mkdir(parents=True, exist_ok=True)
    runs = [str(run_folder(each)) for each in own]
    words = {"seeds": [each.seed for each in own], "runs": runs, "interval": LEVEL, "measures": found}
    (folder / "seeds.json").write_text(json.dumps(words, indent=1) + "\n")
    shown = [name for name in ("map", "micro_f1", "macro_f1", "top1", "top5", "loss") if name in found]
    lines = [(name, _in_words(found[name])) for name in shown]
    report.pairs(
        f"{len(own)} seeds: mean and its 95 % interval (Student's t), deviation", [*lines, ("numbers", f"{folder}/seeds.json")]
    )


def _in_words(found: dict[str, Any]) -> str:
    reach = found["high"] - found["mean"]
    return f"{found['mean']:.4f} +- {reach:.4f}, deviation {found['deviation']:.4f}"


def _last_row(folder: Path) -> dict[str, Any]:
    """The last evaluation of a finished run."""
    return json.loads((folder / "probes.jsonl").read_text().splitlines()[-1])
