"""Fine-tuning's recipes as runs: SGD, partial, the average of the weights, few labels, patience, and the results left."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from outcome import refused
from PIL import Image
from safetensors.torch import load_file
from test_finetune import logits as timm_logits

from vitssl.data import ledger

KEPT = ("checkpoint.keep_last=9",)
SGD = ("optim.name=sgd", "optim.base_lr=0.03", "optim.weight_decay=0", "optim.clip=1.0", "optim.layer_decay=null")


def cut_back(folder: Path, to: Path, *steps: int) -> None:
    """A copy of a run as it was before these checkpoints."""
    shutil.copytree(folder, to)
    for step in steps:
        shutil.rmtree(to / f"checkpoints/step_{step:08}")


@pytest.mark.parametrize(
    "recipe",
    [SGD, ("ema=0.8", "drop_path=0.3"), (*SGD, "mode=partial", "blocks=1", "ema=0.5")],
    ids=["sgd", "ema", "partial sgd ema"],
)
def test_resumed_it_is_the_same(finetune: Callable, tmp_path: Path, recipe: tuple[str, ...]) -> None:
    whole = finetune(tmp_path / "whole", *recipe, *KEPT).ok()
    cut_back(whole.folder, tmp_path / "run", 12)
    run = finetune(tmp_path / "run", *recipe, *KEPT).ok()
    assert "from step 6" in run.out and run.losses() == whole.losses()
    assert run.rows("probes.jsonl") == whole.rows("probes.jsonl")
    ours, theirs = run.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    kinds = {name.split("/")[1] for name in ours if name.startswith("moments/")}
    assert kinds == ({"momentum_buffer"} if "optim.name=sgd" in recipe else {"exp_avg", "exp_avg_sq"})


def test_momentum_is_what_a_checkpoint_of_sgd_is_for(finetune: Callable, tmp_path: Path) -> None:
    """Without its momentum the run would go on differently, so the test above sees it."""
    with_, without = (finetune(tmp_path / f"m{value}", *SGD, f"optim.momentum=0.{value}").ok() for value in (9, 0))
    assert with_.losses()[:2] == without.losses()[:2] and with_.losses() != without.losses()


def test_sgd_learns(finetune: Callable, tmp_path: Path) -> None:
    losses = finetune(tmp_path / "run", *SGD, "labelled=8", "length=60", "test.every=60").ok().losses()
    assert np.mean(losses[-8:]) < 0.9 * losses[0]


def test_an_average_is_judged_and_written_and_the_raw_weights_stand_beside(finetune: Callable, tmp_path: Path) -> None:
    still = finetune(tmp_path / "still", "ema=0.999999").ok()
    assert "ema=0.999999 averages over about 1,000,000 steps, and the run has 12" in still.out
    row = still.rows("probes.jsonl")[-1]
    assert row["loss"] == pytest.approx(np.log(4), abs=1e-4) != row["raw_loss"]  # the zero head it began with
    tensors = still.tensors()
    written = load_file(still.folder / "export/last/classifier.safetensors")
    assert torch.equal(written["head.weight"], tensors["state/twin.average.head.head.weight"])
    plain = finetune(tmp_path / "plain").ok()
    theirs = plain.tensors()
    assert still.losses() == plain.losses() and all(torch.equal(tensors[name], theirs[name]) for name in theirs)
    assert plain.rows("probes.jsonl")[-1]["loss"] == row["raw_loss"]
    at_once = finetune(tmp_path / "at_once", "ema=0").ok()
    assert "averages over" not in at_once.out
    row = at_once.rows("probes.jsonl")[-1]
    assert (row["loss"], row["top1"]) == (row["raw_loss"], row["raw_top1"])


@pytest.mark.parametrize("recipe", [("ema=0.8",), (*SGD, "ema=0.8", "mode=partial", "blocks=1")], ids=["adamw", "sgd"])
def test_two_processes_keep_the_same_average(finetune: Callable, tmp_path: Path, recipe: tuple[str, ...]) -> None:
    overrides = (*recipe, "drop_path=0", "length=6", "checkpoint.every=3")
    one, two = finetune(tmp_path / "one", *overrides).ok(), finetune(tmp_path / "two", *overrides, processes=2).ok()
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-5)
    ours, theirs = two.rows("probes.jsonl")[-1], one.rows("probes.jsonl")[-1]
    assert ours == pytest.approx(theirs, rel=1e-4)
    averages = [name for name in one.tensors() if name.startswith("state/twin.average.head")]
    assert averages
    for name in averages:
        torch.testing.assert_close(two.tensors()[name], one.tensors()[name], rtol=0, atol=1e-4)


def test_partial_leaves_what_lies_below_as_it_was(finetune: Callable, exported, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", "mode=partial", "blocks=1", "optim.base_lr=1e-2").ok()
    before, after = load_file(exported.folder / "export/encoder.safetensors"), run.tensors()
    depth = 1 + max(int(name.split(".")[1]) for name in before if name.startswith("blocks."))
    names = {name for name in before if not name.startswith("norm.")}
    same = {name for name in names if torch.equal(after[f"state/encoder.vit.{name}"], before[name])}
    assert names - same == {name for name in names if name.startswith(f"blocks.{depth - 1}.")}
    plan = json.loads((run.folder / "plan.json").read_text())["parameters"]
    assert plan["frozen"] == sum(before[name].numel() for name in same)
    assert not [name for name in plan if name.startswith("block0.")] and "average" not in plan


PLANS = {
    "sgd keeps one moment": (SGD, 1, 0),
    "adamw keeps two": ((), 2, 0),
    "an average counts once": (("ema=0.9",), 2, 1),
}


@pytest.mark.parametrize("recipe, moments, averages", PLANS.values(), ids=PLANS)
def test_the_plan_counts_the_state(finetune: Callable, tmp_path: Path, recipe: tuple, moments: int, averages: int) -> None:
    plan = json.loads((finetune(tmp_path / "run", "length=1", *recipe).ok().folder / "plan.json").read_text())
    trained = sum(size for name, size in plan["parameters"].items() if name not in ("frozen", "average"))
    assert plan["memory"]["optimiser"] == 4 * moments * trained
    assert plan["memory"]["parameters"] == 4 * (1 + averages) * trained
    assert plan["parameters"].get("average", 0) == averages * trained


def test_shots_and_shares_reach_the_run(finetune: Callable, tmp_path: Path) -> None:
    assert "fine-tuned on 12 labelled images" in finetune(tmp_path / "shots", "shots=3", "length=1").ok().out
    assert "fine-tuned on 12 labelled images" in finetune(tmp_path / "share", "labelled=20%", "length=1").ok().out


REFUSED = {
    "more shots than images": (
        "shots=16",
        "too few labelled images of 4 of 4 classes (0 has 15, 1 has 15, 2 has 15, and 1 more)",
    ),
    "two kinds of few": ("shots=1 labelled=8", "labelled=8 and shots=1 are both given; keep one of them"),
    "no such share": ("labelled=101%", "labelled='101%': is no number of images; write 1000, or a share of each class as 1%"),
    "no such count": ("labelled=0", "labelled=0: is no number of images"),
    "a truth": ("labelled=true", "labelled=True: is no number of images"),
    "no such optimiser": ("optim.name=lion", "optim.name='lion': input should be 'adamw', 'sgd' or 'lars'"),
    "a momentum of one": ("optim.momentum=1.0", "optim.momentum=1.0: input should be less than 1"),
    "more blocks than there are": ("mode=partial blocks=99", "blocks: is 99, and mode=partial trains the last blocks of"),
    "a size that patches do not divide": ("test.image_size=18", "test.image_size 18x18 is not divisible by patches of 4x4"),
    "another optimiser later": ("optim.name=sgd", "holds a run of another config (optim.name: adamw -> sgd)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(finetune: Callable, tmp_path: Path, case: str) -> None:
    words, message = REFUSED[case]
    if case == "another optimiser later":
        finetune(tmp_path / "run", "length=1").ok()
    refused(finetune(tmp_path / "run", *words.split()), message)


def test_patience_ends_a_run_once_and_for_all(finetune: Callable, tmp_path: Path) -> None:
    """At a learning rate that moves nothing no evaluation is better than the first."""
    still = ("optim.base_lr=1e-12", "test.every=2", "test.patience=2", *KEPT)
    run = finetune(tmp_path / "run", *still).ok()
    assert [row["step"] for row in run.rows("probes.jsonl")] == [2, 4, 6] and len(run.losses()) == 6
    assert "at step 6, where patience ended" in run.out and (run.folder / "results/results.json").exists()
    assert json.loads((run.folder / "export/best/classifier.json").read_text())["step"] == 2
    assert [path.name for path in run.checkpoints()] == ["step_00000006"]
    again = finetune(tmp_path / "run", *still).ok()
    assert "ended at step 6 by test.patience=2; null goes on" in again.out and len(again.losses()) == 6
    on = finetune(tmp_path / "run", *still, "test.patience=null").ok()
    assert len(on.losses()) == 12 and [row["step"] for row in on.rows("probes.jsonl")] == [2, 4, 6, 8, 10, 12]


def test_a_run_of_an_earlier_version_goes_on(finetune: Callable, tmp_path: Path) -> None:
    """One whose config.yaml does not know the keys that have come since; what they are set to now must be what it did."""
    run = finetune(tmp_path / "run", "length=6").ok()
    path = run.folder / "config.yaml"
    new = r"^  (name: adamw|momentum: .*|patience: .*)\n|^(ema|shots|blocks): .*\n"
    older, found = re.subn(new, "", path.read_text(), flags=re.MULTILINE)
    assert found == 6
    path.write_text(older)
    other = finetune(tmp_path / "run", "ema=0.5")
    refused(other, "holds a run of another config (ema: None -> 0.5)", "another run.name\n")  # not init.weights
    assert len(finetune(tmp_path / "run", "length=9").ok().losses()) == 9


def test_test_images_may_be_of_another_size(finetune: Callable, data: Path, tmp_path: Path) -> None:
    """Positions are resampled as timm's own models do it when their size is set."""
    run = finetune(tmp_path / "run", "optim.base_lr=1e-2", "test.image_size=24").ok()
    row, folder = run.rows("probes.jsonl")[-1], run.folder / "export/last"
    facts = json.loads((folder / "classifier.json").read_text())
    assert facts["image_size"] == [16, 16] and facts["tested_size"] == [24, 24]
    weights = str(folder / "classifier.safetensors")
    model = timm.create_model(facts["architecture"], **facts["arguments"], checkpoint_path=weights).eval()
    model.set_input_size((24, 24))
    ours, labels = timm_logits(model, facts | {"image_size": [24, 24]}, data)
    assert float(torch.nn.functional.cross_entropy(ours, labels)) == pytest.approx(row["loss"], rel=1e-5)
    assert float((ours.argmax(1) == labels).float().mean()) == pytest.approx(row["top1"])
    assert run.losses() == finetune(tmp_path / "plain", "optim.base_lr=1e-2").ok().losses()


def test_patience_ends_all_processes(finetune: Callable, tmp_path: Path) -> None:
    still = ("optim.base_lr=1e-12", "test.every=2", "test.patience=1")
    run = finetune(tmp_path / "run", *still, processes=2).ok()
    assert len(run.losses()) == 4 and "where patience ended" in run.out


def test_results_are_left(finetune: Callable, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", "log.trackers=[tensorboard]", "test.mistakes=5").ok()
    folder, (row,) = run.folder / "results", [row for row in run.rows("probes.jsonl") if row["step"] == 12]
    found = json.loads((folder / "results.json").read_text())
    assert found["top1"] == row["top1"] and row["top1_low"] < row["top1"] < row["top1_high"] and 0 <= row["ece"] <= 1
    assert sum(each["images"] for each in found["classes"]) == 16
    right = sum(round(each["recall"] * each["images"]) for each in found["classes"] if each["images"])
    assert right == round(row["top1"] * 16)
    table = list(csv.DictReader((folder / "classes.csv").open()))
    assert [each["class"] for each in table] == [each["class"] for each in found["classes"]]
    counts = np.array([line[1:] for line in csv.reader((folder / "confusion.csv").open())][1:], dtype=int)
    assert counts.shape == (4, 4) and counts.sum() == 16 and np.trace(counts) == right
    for name in ("confusion", "mistakes"):
        assert Image.open(folder / f"{name}.png").size > (50, 50)
    assert "interval" in run.out and "weakest" in run.out and f"results     {folder}" in run.out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {path.parent for path in (run.folder / "tensorboard").rglob("events*")}
    tags = EventAccumulator(str(events)).Reload().Tags()
    assert {"test/top1", "test/ece", "test/top1_low"} <= set(tags["scalars"])
    assert {"test/confusion", "test/mistakes"} <= set(tags["images"])


def test_balanced_classes_reach_the_run_and_go_on_where_it_stopped(
    finetune: Callable, write_shard: Callable, tmp_path: Path
) -> None:
    write_shard(tmp_path / "train-0.tar", range(40), label=lambda number: min(3, number // 10) if number % 10 < 2 else 3)
    settings = (f"data.path={tmp_path}", "data.ledger=true", "test.every=100%", *KEPT)
    whole = finetune(tmp_path / "whole", "balance=true", *settings).ok()
    numbers = [int(key[-4:]) for _, key in ledger.read(whole.folder / "ledger")]
    classes = [min(3, number // 10) if number % 10 < 2 else 3 for number in numbers]
    assert len(numbers) == 96 and max(np.bincount(classes)) - min(np.bincount(classes)) <= 3
    cut_back(whole.folder, tmp_path / "run", 12)
    run = finetune(tmp_path / "run", "balance=1", *settings).ok()
    assert "from step 6" in run.out and run.losses() == whole.losses()
    assert finetune(tmp_path / "plain", *settings).ok().losses() != whole.losses()
