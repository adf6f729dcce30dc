"""``--bench step``: one training step of the config beside a plain eager one, each in processes of their own, in one run.

Both sides run the same shapes on the same random batch: ours through the engine, the yardstick by hand under autocast with
``torch.optim.AdamW`` as it comes. The sides alternate, so a machine that drifts slows both; the ratio is of medians.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vitssl import dist, draws
from vitssl.report import Report
from vitssl.schedule import Clock
from vitssl.sections import ProgramConfig
from vitssl.task import Batch, Task
from vitssl.train.launch import Engine, choose_precision
from vitssl.train.planning import batch_split, outline

ROUNDS, STEPS = 3, 3


def bench_step(
    config: ProgramConfig, build: Callable[[ProgramConfig], Task], plain: Callable[[Task], torch.nn.Module], report: Report
) -> list[dict[str, Any]]:
    """Time and peak memory of a step, ours and plain, in fp32 and (where the hardware has it) bf16; printed and returned.

    ``build`` and ``plain`` must be importable by name: each side runs in a fresh process.
    """
    device = dist.choose_device(config.launch.device)
    report.say(f"one step of {config.batch_size} images on {device}, {ROUNDS} x {STEPS} steps a side, alternating")
    rows = []
    auto = config.launch.model_copy(update={"precision": "auto"})
    for precision in dict.fromkeys(("fp32", choose_precision(auto, device))):
        launch = config.launch.model_copy(update={"precision": precision, "engine": "ddp"})
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(_alone(_measure, config.model_copy(update={"launch": launch}), build, None))
            theirs.append(_alone(_measure, config.model_copy(update={"launch": launch}), build, plain))
        rows.append(_row(precision, config.batch_size, ours, theirs))
        report.pairs(precision, [(name, f"{value}") for name, value in rows[-1].items() if name != "precision"])
    report.say(json.dumps(rows))
    return rows


def step_rate(config: ProgramConfig, build: Callable[[ProgramConfig], Task]) -> float:
    """Images/s that one process trains on where data cost nothing: in micro-batches of what fits, on a CPU of at most 16."""
    micro_batch, _ = batch_split(config, outline(lambda: build(config)))
    size = min(micro_batch, 16) if dist.choose_device(config.launch.device) == "cpu" else micro_batch
    found = _alone(_measure, config.model_copy(update={"batch_size": size, "micro_batch": size}), build, None)
    return size / statistics.median(found["seconds"])


def _row(precision: str, batch_size: int, ours: list, theirs: list) -> dict[str, Any]:
    seconds = [statistics.median(time for run in side for time in run["seconds"]) for side in (ours, theirs)]
    memory = [statistics.median(run["peak_bytes"] for run in side) / 2**30 for side in (ours, theirs)]
    return {
        "precision": precision,
        "images_per_s": round(batch_size / seconds[0], 2),
        "plain_images_per_s": round(batch_size / seconds[1], 2),
        "speed_ratio": round(seconds[1] / seconds[0], 3),
        "peak_gib": round(memory[0], 3),
        "plain_peak_gib": round(memory[1], 3),
        "memory_ratio": round(memory[0] / memory[1], 3),
    }


def _alone(work: Callable, *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _measure(
    config: ProgramConfig, build: Callable[[ProgramConfig], Task], plain: Callable[[Task], torch.nn.Module] | None
) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    task = build(config)
    step = _plain_step(plain(task), task, config) if plain else _our_step(task, config, build)
    step(0)
    step(1)  # the first step allocates the optimiser's state
    on_gpu = dist.choose_device(config.launch.device) == "cuda"
    seconds = []
    for number in range(2, 2 + STEPS):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step(number)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if on_gpu:
        return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _our_step(task: Task, config: ProgramConfig, build: Callable[[ProgramConfig], Task]) -> Callable[[int], None]:
    micro_batch, accumulation = batch_split(config, outline(lambda: build(config)))
    folder = TemporaryDirectory()
    options = {
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "clip": None,
        "trackers": [],
        "folder": Path(folder.name),
    }
    engine = Engine(config.launch, **options)
    engine.prepare(task, config.optim, lr=1e-4)
    batches = [batch.to(engine.device) for batch in _batches(task, config, micro_batch, accumulation)]
    engine.wrapped.train()

    def step(number: int) -> None:
        for part, batch in enumerate(batches):
            with engine.micro_step(last=part == accumulation - 1):
                loss, _ = engine.forward(batch, Clock(step=number, total=100, samples=0, seed=0))
                engine.backward(loss)
        engine.step(want_norm=False)

    return step


def _plain_step(model: torch.nn.Module, task: Task, config: ProgramConfig) -> Callable[[int], None]:
    device = dist.choose_device(config.launch.device)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=config.optim.betas, weight_decay=config.optim.weight_decay)
    micro_batch, accumulation = batch_split(config, outline(lambda: task))
    batches = [batch.to(device) for batch in _batches(task, config, micro_batch, accumulation)]
    (view,) = task.views
    mean, std = task.normalize.mean.to(device), task.normalize.std.to(device)
    num_patches = task.encoder.spec.num_patches

    def step(number: int) -> None:
        for batch in batches:
            images = (batch.views[view].float() / 255 - mean) / std
            noise = torch.rand(len(batch), num_patches, device=device)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=config.launch.precision == "bf16"):
                loss = model(images, noise)
            (loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _batches(task: Task, config: ProgramConfig, micro_batch: int, accumulation: int) -> list[Batch]:
    """Random uint8 images, the same for both sides."""
    (view,) = task.views
    channels = task.encoder.spec.channels
    found = []
    for part in range(accumulation):
        positions = torch.arange(micro_batch) + part * micro_batch
        size = channels * view.size[0] * view.size[1]
        pixels = (draws.uniform(0, 0, positions, size) * 256).to(torch.uint8).reshape(micro_batch, channels, *view.size)
        found.append(Batch({view: pixels}, positions))
    return found
