"""``python -m tests.learning cifar10 --minutes 15 --jobs 2``: what methods learn with the same processor time each.

Every preset of ``configs/pretrain/small`` is timed first (processor seconds of a step on one core), then trained on the first
20,000 images for as many steps as the budget allows, and judged on frozen features by MAE's linear probe, kNN and few shots.
MAE runs under several seeds, whose deviation is the yardstick. Beside each stands its network before training, and beside all
raw pixels and the same network trained with the labels of the same images for the same time. Rows go to ``learning.jsonl`` as
they come, and what stands there is not done again; ``--table`` prints them. A machine that does other things makes steps look
longer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import torch

from vitssl.data.feed import evaluation_samples, open_configured, share
from vitssl.probes.protocols import Split, judge
from vitssl.sections import DataConfig
from vitssl.views import View

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "configs" / "pretrain" / "small"
YARDSTICK, LABELLED, PIXELS = "mae", "supervised", "raw pixels"
TAUGHT = {"distill": "can"}  # by whom
TIMED, SURE, SIDE = (2, 14, 98), 30, 32  # steps; seconds that a difference has to be; pixels
PROTOCOLS = ("linear_mae", "knn", "fewshot", "spectrum")
QUIET = ("data.split=null", "data.workers=0", "log.trackers=[]", "checkpoint.every=null")
UNJUDGED = [f"{key}=null" for part in ("heldout", "probe.bank", "probe.queries") for key in (f"{part}.path", f"{part}.split")]
COLUMNS = {"linear": "linear", "knn k=20": "kNN-20", "fewshot 5 shots": "5 shots"}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of CIFAR-10 shards, train-*.tar and test-*.tar")
    parser.add_argument("--minutes", type=float, default=15, help="processor time of each method")
    parser.add_argument("--jobs", type=int, default=1, help="methods at a time, each on a core of its own")
    parser.add_argument("--methods", help="a,b,c; else all")
    parser.add_argument("--seeds", type=int, default=3, help=f"of {YARDSTICK}, whose deviation is the yardstick")
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what stands in --out, and train nothing")
    options = parser.parse_args(argv)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.table:
        print("\n".join(table(rows)))
        return 0
    presets = sorted((path.stem for path in SMALL.glob("*.yaml") if path.stem != "base"), key=lambda name: name in TAUGHT)
    wanted = options.methods.split(",") if options.methods else [PIXELS, YARDSTICK, LABELLED, *presets]
    asked = dict.fromkeys((name, seed) for name in wanted for seed in range(options.seeds if name == YARDSTICK else 1))
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0))[: options.jobs]:
        cores.put(core)

    def work(name: str, seed: int) -> None:
        core = cores.get()
        try:
            steps = next((row["steps"] for row in rows if row["method"] == name), None)  # seeds differ in nothing else
            row = pixels(options.data) if name == PIXELS else learn(name, seed, options.data, options.minutes, core, steps)
            row = {"method": name, "seed": seed, **row}
            rows.append(row)
            line = json.dumps(row)
            with options.out.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
        finally:
            cores.put(core)

    done = {(row["method"], row["seed"]) for row in rows}
    with ThreadPoolExecutor(options.jobs) as pool:
        for ended in [pool.submit(work, *each) for each in asked if each not in done]:
            ended.result()
    return 0


def learn(method: str, seed: int, data: str, minutes: float, core: int, steps: int | None) -> dict:
    """A row: steps, processor seconds, first and last loss, what the protocols found, and what they find of new weights."""
    name, images = f"learn_{method}_{seed}", f"{data}/train-{{000000..000003}}.tar"
    settings = [f"data.path={images}", f"seed={seed}"]
    if method == LABELLED:
        arch = f"encoder=runs/learn_{YARDSTICK}_{seed}"
        program = ["finetune", str(ROOT / "configs/finetune/cifar10.yaml"), arch, "weights=random", "drop_path=0"]
        settings += [
            "optim.layer_decay=null",
            "augment.mixup=0",
            "augment.cutmix=0",
            f"test.path={data}/test-{{000000..000001}}.tar",
        ]
        settings += ["test.split=null", "test.every=100%"]
        if not Path(f"runs/learn_{YARDSTICK}_{seed}/export").exists():
            raise SystemExit(f"{arch} is not there: run {YARDSTICK} first")
    else:
        program = ["pretrain", str(SMALL / f"{method}.yaml")]
        settings += UNJUDGED
        settings += [f"objectives.{method}.teacher.name=runs/learn_{TAUGHT[method]}_0"] if method in TAUGHT else []
    command = ["-m", *program, *settings, *QUIET]
    if steps is None:
        began, *longer = TIMED
        few, many, short = cpu([*command, f"run.name={name}_{began}", f"length={began}"], core), 0.0, began
        while longer and many - few < SURE:  # short steps drown in what a start takes
            short = longer.pop(0)
            many = cpu([*command, f"run.name={name}_{short}", f"length={short}"], core)
        steps = max(short, int((minutes * 60 - few) * (short - began) / (many - few)))
    spent = cpu([*command, f"run.name={name}", f"length={steps}"], core)
    losses = [json.loads(line)["loss"] for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    batch = json.loads(Path(f"runs/{name}/plan.json").read_text())["batch_size"]
    row = {"steps": steps, "images": steps * batch, "cpu_seconds": round(spent), "losses": [losses[0], losses[-1]]}
    if method == LABELLED:  # its own head says what the images are
        rows = Path(f"runs/{name}/probes.jsonl").read_text().splitlines()
        return row | {"linear": json.loads(rows[-1])["top1"]}
    row |= judged(f"runs/{name}", data, core)
    return row | {f"random {key}": value for key, value in judged(f"random:runs/{name}", data, core).items()}


def judged(encoder: str, data: str, core: int) -> dict[str, float]:
    """The protocols' numbers, of 10,000 labelled images on 10,000 others."""
    out = Path(f"{encoder.replace(':', '_').replace('/', '_')}.json")
    shards = [f"data.path={data}/train-{{000000..000001}}.tar", f"test.path={data}/test-{{000000..000001}}.tar"]
    settings = [f"protocol=[{','.join(PROTOCOLS)}]", f"encoder=[{encoder}]", "crop_pct=1.0", "data.workers=0"]
    cpu(["-m", "finetune.evaluate", *settings, *shards, f"out={out}"], core)
    rows = json.loads(out.read_text())
    return means((row["protocol"], row["setting"], row["value"]) for row in rows)


def pixels(data: str) -> dict[str, float]:
    """The same of the images themselves."""
    splits = []
    for pattern in ("train-{000000..000001}.tar", "test-{000000..000001}.tar"):
        config = DataConfig(path=f"{data}/{pattern}")
        samples = evaluation_samples(open_configured(config, key="data"), config, [View((SIDE, SIDE))], channels=3, labels=True)
        batches = list(share(samples, tell=print))
        images = torch.cat([next(iter(batch.views.values())).flatten(1) for batch in batches]).float() / 255
        splits.append((images, torch.cat([batch.labels for batch in batches])))
    centre = splits[0][0].mean(0)
    parts = [Split({"pooled": images - centre}, labels) for images, labels in splits]
    return means((row.protocol, row.setting, row.value) for name in PROTOCOLS[:2] for row in judge(name, *parts))


def means(rows: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """{protocol and setting: mean over seeds}."""
    found: dict[str, list[float]] = defaultdict(list)
    for protocol, setting, value in rows:
        found["linear" if protocol == "linear_mae" else f"{protocol} {setting}"].append(value)
    return {key: round(statistics.fmean(values), 4) for key, values in found.items()}


def table(rows: Sequence[dict]) -> list[str]:
    """Markdown: each method's numbers, and whether it is above its own beginning by three deviations of MAE's seeds."""
    spread = statistics.stdev(row["linear"] for row in rows if row["method"] == YARDSTICK)
    names = ["method", "minutes", "steps", "loss", "random", *COLUMNS.values(), "RankMe", "learns"]
    lines = [f"| {' | '.join(names)} |", f"|---|{'--:|' * (len(names) - 2)}---|"]
    for row in sorted(rows, key=lambda row: -row["linear"]):
        random = row.get("random linear")
        learns = "" if random is None else "yes" if row["linear"] > random + 3 * spread else "**not shown**"
        name = row["method"] + (f", seed {row['seed']}" if row["method"] == YARDSTICK else "")
        counts = [f"{row['cpu_seconds'] / 60:.1f}", f"{row['steps']:,}"] if "steps" in row else ["", ""]
        loss = "{:.3g} to {:.3g}".format(*row["losses"]) if "losses" in row else ""
        shares = ["" if value is None else f"{value:.1%}" for value in (random, *map(row.get, COLUMNS))]
        rank = next((f"{value:.1f}" for key, value in row.items() if key.startswith("rankme")), "")
        lines.append(f"| {' | '.join([name, *counts, loss, *shares, rank, learns])} |")
    seeds = sum(row["method"] == YARDSTICK for row in rows)
    return [*lines, "", f"Deviation of {YARDSTICK}'s {seeds} seeds: {spread:.2%}; three of them: {3 * spread:.1%}."]


def cpu(arguments: Sequence[str], core: int) -> float:
    """Processor seconds of a command of this project on one core. Ends the program with its words where it fails."""
    # memory that is given back at every step is cleared at every step, which takes a fifth of the time
    memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **memory}
    log = Path(f"learning_{core}.log")
    with log.open("w") as file:
        pinned = ["taskset", "-c", str(core), sys.executable, *arguments]
        child = subprocess.Popen(pinned, env=env, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)}\n{log.read_text()[-4000:]}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
