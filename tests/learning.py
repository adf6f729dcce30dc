"""``python -m tests.learning cifar10 --minutes 15``: what methods learn with the same processor time each.

Every preset of ``configs/pretrain/small`` is timed first (processor seconds of a step), then trained for as many steps as the
budget allows, and judged on frozen features by MAE's linear probe, kNN and few shots. MAE runs under several seeds, which give
the spread, and its random initialisations are judged beside it. Rows go to ``learning.jsonl`` as they come, and what stands
there is not done again. Run it where nothing else runs: a busy machine makes steps look longer than they are.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "configs" / "pretrain" / "small"
YARDSTICK = "mae"
QUIET = ("data.workers=0", "log.trackers=[]", "heldout.pictures=0", "probe.bank.path=null", "probe.queries.path=null")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of CIFAR-10 shards, train-*.tar and test-*.tar")
    parser.add_argument("--minutes", type=float, default=15, help="processor time of each method")
    parser.add_argument(
        "--methods", default=",".join(sorted(path.stem for path in SMALL.glob("*.yaml") if path.stem != "base"))
    )
    parser.add_argument("--seeds", type=int, default=3, help=f"of {YARDSTICK}, whose deviation is the yardstick")
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    options = parser.parse_args(argv)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for method in options.methods.split(","):
        for seed in range(options.seeds if method == YARDSTICK else 1):
            if not any((row["method"], row["seed"]) == (method, seed) for row in done):
                row = learn(method, seed, options.data, options.minutes)
                done.append(row)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    return 0


def learn(method: str, seed: int, data: str, minutes: float) -> dict:
    """A row: steps, images, processor seconds, first and last loss, and what the protocols found."""
    name, places = f"learn_{method}_{seed}", (f"data.path={data}", f"heldout.path={data}", *QUIET, f"seed={seed}")
    command = ["-m", "pretrain", str(SMALL / f"{method}.yaml"), *places]
    few, many = (cpu([*command, f"run.name={name}_{steps}", f"length={steps}", "heldout.every=99"]) for steps in (4, 20))
    steps = max(20, int((minutes * 60 - few) * 16 / (many - few)))
    spent = cpu([*command, f"run.name={name}", f"length={steps}"])
    losses = [json.loads(line)["loss"] for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    tenth = max(1, len(losses) // 10)
    row = {"method": method, "seed": seed, "steps": steps, "images": steps * 256, "cpu_seconds": round(spent)}
    row |= {"loss_first": sum(losses[:tenth]) / tenth, "loss_last": sum(losses[-tenth:]) / tenth}
    row |= judged(f"runs/{name}", data)
    if method == YARDSTICK:
        row |= {f"random_{key}": value for key, value in judged(f"random:runs/{name}", data).items()}
    return row


def judged(encoder: str, data: str) -> dict[str, float]:
    """The protocols' numbers, of 5,000 labelled images on 5,000 others."""
    out = Path(f"{encoder.replace(':', '_').replace('/', '_')}.json")
    shards = [f"data.path={data}/train-000000.tar", f"test.path={data}/test-000000.tar"]
    protocols = "protocol=[linear_mae,knn,fewshot,spectrum]"
    cpu(["-m", "finetune.evaluate", protocols, f"encoder=[{encoder}]", "crop_pct=1.0", *shards, f"out={out}"])
    rows = json.loads(out.read_text())
    found: dict[str, list[float]] = {}
    for row in rows if isinstance(rows, list) else rows["rows"]:
        key = "linear" if row["protocol"] == "linear_mae" else f"{row['protocol']} {row['setting']}"
        found.setdefault(key, []).append(row["value"])
    return {key: round(sum(values) / len(values), 4) for key, values in found.items()}


def cpu(arguments: list[str]) -> float:
    """Processor seconds of a command of this project. Ends the program with its words where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(arguments)}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
