"""Fine-tuning from an export: where it begins, what it changes, what it leaves, and that plain timm agrees."""

import io
import json
import math
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
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from vitssl.data.sources import open_source
from vitssl.interop.timm import export_timm
from vitssl.train.export import read_export

NOISY = ("drop_path=0.3", "augment.mixup=0.8", "augment.cutmix=1.0", "augment.erasing=0.5", "smoothing=0.1")
RANDOM = (*NOISY, "augment.rand_augment=rand-m9-mstd0.5-inc1", "checkpoint.keep_last=9", "length=18")


def in_timm(folder: Path, name: str) -> tuple[torch.nn.Module, dict]:
    """Two lines of plain timm, and the state strictly."""
    facts = json.loads((folder / f"{name}.json").read_text())
    model = timm.create_model(facts["architecture"], **facts["arguments"], checkpoint_path=str(folder / f"{name}.safetensors"))
    model.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=True)
    return model.eval(), facts


def logits(model: torch.nn.Module, facts: dict, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the test images, resized and normalised as the JSON says, with nothing of vitssl between file and model."""
    source = open_source(data, split="test")
    raws = source.read(range(source.num_samples))
    size = min(facts["image_size"])
    steps = [Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), ToTensor(), Normalize(facts["mean"], facts["std"])]
    images = torch.stack([Compose(steps)(Image.open(io.BytesIO(raw.image))) for raw in raws])
    with torch.no_grad():
        return model(images), torch.tensor([raw.label for raw in raws])


@pytest.fixture(scope="module")
def tuned(finetune: Callable, tmp_path_factory: pytest.TempPathFactory):
    return finetune(tmp_path_factory.mktemp("tuned") / "run", "length=40", "test.every=10").ok()


@pytest.mark.parametrize(
    "overrides", [[], ["smoothing=0.1"], ["mode=linear"], ["augment.mixup=0.8"], ["weights=random"]], ids=str
)
def test_the_first_loss_is_ln_of_the_classes(finetune: Callable, tmp_path: Path, overrides: list[str]) -> None:
    run = finetune(tmp_path / "run", "length=2", *overrides).ok()
    assert run.losses()[0] == pytest.approx(math.log(4), rel=1e-6)
    assert run.losses()[1] == run.losses()[0] or "augment" in str(overrides)  # the warm-up starts at 0: nothing moved yet


def test_the_other_head_begins_elsewhere(finetune: Callable, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", "length=2", "head.init=trunc_normal", "head.std=0.5").ok()
    assert abs(run.losses()[0] - math.log(4)) > 1e-3


def test_it_learns_and_tells_how_well(tuned) -> None:
    tests = [row for row in tuned.rows("probes.jsonl") if "top1" in row]
    assert [row["step"] for row in tests] == [10, 20, 30, 40] and all(row["images"] == 16 for row in tests)
    assert tuned.losses()[-1] < tuned.losses()[0] and all(row["top5"] == 1.0 for row in tests)
    assert f"test        top-1 {tests[-1]['top1']:.2%}" in tuned.out
    best = max(tests, key=lambda row: row["top1"])
    assert json.loads((tuned.folder / "export/best/classifier.json").read_text())["step"] == best["step"]
    assert json.loads((tuned.folder / "export/last/classifier.json").read_text())["step"] == 40


@pytest.mark.parametrize(
    "overrides",
    [[], ["head.pooling=class"], ["mode=linear"], ["image_size=24"], ["mode=linear", "head.pooling=class"]],
    ids=["mean", "class", "linear", "larger", "linear class"],
)
def test_plain_timm_has_the_same_accuracy(finetune: Callable, data: Path, tmp_path: Path, overrides: list[str]) -> None:
    run = finetune(tmp_path / "run", "optim.base_lr=1e-2", *overrides).ok()
    measured = [row for row in run.rows("probes.jsonl") if "top1" in row][-1]
    model, facts = in_timm(run.folder / "export/last", "classifier")
    ours, labels = logits(model, facts, data)
    assert facts["classes"] == ["0", "1", "2", "3"] and facts["top1"] == measured["top1"]
    assert float((ours.argmax(1) == labels).float().mean()) == pytest.approx(measured["top1"])
    assert float(torch.nn.functional.cross_entropy(ours, labels)) == pytest.approx(measured["loss"], rel=1e-5)
    assert facts["image_size"] == ([24, 24] if "image_size=24" in overrides else [16, 16])


def test_the_encoder_export_is_timms(exported, data: Path) -> None:
    model, facts = in_timm(exported.folder / "export", "encoder")
    features, _ = logits(model, facts, data)
    assert features.shape == (16, 24) and features.std() > 0
    known = {"method": "mae", "pooling": "mean", "step": 20, "samples": 160, "run": str(exported.folder)}
    assert {key: facts[key] for key in known} == known


def test_the_lines_of_the_readme(exported) -> None:
    (block,) = re.findall(
        r"```python\n(import json, timm\n.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.S
    )
    names: dict = {}
    exec(block.replace("runs/demo", str(exported.folder)), names)
    saved = load_file(exported.folder / "export/encoder.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in names["model"].state_dict().items())


def test_linear_leaves_the_encoder_as_it_was(finetune: Callable, exported, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", "mode=linear", "optim.base_lr=0.1").ok()
    before, after = load_file(exported.folder / "export/encoder.safetensors"), run.tensors()
    for name, tensor in before.items():
        assert torch.equal(after[f"state/encoder.vit.{name}"], tensor), name
    assert after["state/head.head.weight"].abs().max() > 0
    assert not [name for name in after if name.startswith("moments/") and "encoder" in name]


def test_full_changes_it_everywhere(finetune: Callable, exported, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run").ok()
    before, after = load_file(exported.folder / "export/encoder.safetensors"), run.tensors()
    kept = [name for name in before if not name.startswith("norm.")]
    assert [name for name in kept if torch.equal(after[f"state/encoder.vit.{name}"], before[name])] == []


def test_random_weights_are_another_network(finetune: Callable, exported, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", "weights=random", "length=1").ok()  # at lr 0: what it started from
    before, after = load_file(exported.folder / "export/encoder.safetensors"), run.tensors()
    weights = [name for name in before if name.endswith("weight") and before[name].ndim > 1]
    assert weights and not any(torch.equal(after[f"state/encoder.vit.{name}"], before[name]) for name in weights)
    assert "scratch" in run.out


def test_a_larger_image_resamples_the_positions(finetune: Callable, exported, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", "image_size=24", "length=1").ok()
    before = load_file(exported.folder / "export/encoder.safetensors")["pos_embed"]
    after = run.tensors()["state/encoder.vit.pos_embed"]
    assert before.shape[1] == 17 and after.shape[1] == 37
    assert torch.equal(after[:, 0], before[:, 0])
    wanted = timm.layers.resample_abs_pos_embed(before, [6, 6], old_size=[4, 4])
    torch.testing.assert_close(after, wanted)


def test_few_labels_are_balanced(finetune: Callable, tmp_path: Path) -> None:
    run = finetune(tmp_path / "run", "labelled=8", "length=1", trap="""
import finetune.run as program
real = program.open_training
def counted(*arguments):
    source = real(*arguments)
    print("labels", sorted(source.label_array().tolist()))
    return source
program.open_training = counted
""").ok()  # fmt: skip
    assert "labels [0, 0, 1, 1, 2, 2, 3, 3]" in run.out and "fine-tuned on 8 labelled images" in run.out


MIXTURE = ["data.path=null", "data.split=null", "data.sources=[{{path: {0}, split: train}}]", "labelled=8"]
REFUSED = {
    "few labels of a mixture": (MIXTURE, "labelled and data.sources exclude each other"),
    "a stray label": (["data.path={1}", "data.split=null"], "has 2 different labels, and one is 20,000,000; number classes"),
    "colours RandAugment does not know": (["encoder={2}", "augment.rand_augment=rand-m9"], "is for 1 or 3 channels, not 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fine_tuned(
    finetune: Callable, pretrain: Callable, write_shard: Callable, data: Path, tmp_path: Path, case: str
) -> None:
    argv, words = REFUSED[case]
    colours = ["encoder.channels=4", "data.mean=[0,0,0,0]", "data.std=[1,1,1,1]"]
    four = pretrain(tmp_path / "four", *colours, "length=1").ok().folder if "colours" in case else None
    write_shard(tmp_path / "stray.tar", range(2), label=lambda number: 20_000_000 * number)
    refused(finetune(tmp_path / "run", *(each.format(data, tmp_path / "stray.tar", four) for each in argv)), words)


def test_resumed_with_every_random_thing_it_is_the_same(finetune: Callable, tmp_path: Path) -> None:
    """Drop path, mixup, cutmix, erasing and RandAugment: after a stop at step 12 bit for bit as without."""
    whole = finetune(tmp_path / "whole", *RANDOM).ok()
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000018")
    shutil.rmtree(tmp_path / "run/export")
    run = finetune(tmp_path / "run", *RANDOM).ok()
    assert "from step 12" in run.out and run.losses() == whole.losses()
    assert run.rows("probes.jsonl") == whole.rows("probes.jsonl")
    ours, theirs = run.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    weights = "export/last/classifier.safetensors"
    assert (run.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()
    for off in ("drop_path=0", "augment.mixup=0", "augment.erasing=0"):  # and each of them was at work
        assert finetune(tmp_path / off, *RANDOM, off, "length=4").ok().losses()[2:] != whole.losses()[2:4]


def test_two_processes_train_the_same_run(finetune: Callable, tmp_path: Path) -> None:
    overrides = ("drop_path=0", "length=12")
    one, two = finetune(tmp_path / "one", *overrides).ok(), finetune(tmp_path / "two", *overrides, processes=2).ok()
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-5)
    ours, theirs = (run.rows("probes.jsonl")[-1] for run in (one, two))
    assert ours["top1"] == theirs["top1"] and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_run_goes_on_from_the_encoder_it_began_with(finetune: Callable, exported, tmp_path: Path) -> None:
    """``newest`` is decided once: an encoder exported meanwhile does not disturb a run that was stopped."""
    shutil.copytree(exported.folder, tmp_path / "older")
    newest = ("encoder=newest", "checkpoint.keep_last=9")
    whole = finetune(tmp_path / "run", *newest).ok()
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000012")
    shutil.copytree(tmp_path / "older", tmp_path / "newer")
    (tmp_path / "newer/export/encoder.safetensors").touch()
    run = finetune(tmp_path / "run", *newest).ok()
    assert "from step 6" in run.out and f"from {tmp_path / 'older'}" in run.out
    assert run.tensors().keys() == whole.tensors().keys()
    said = finetune(tmp_path / "run", *newest).ok().out
    assert (
        "is finished: step 12 of 12" in said
        and f"it began from {tmp_path / 'older'}" in said
        and "newer/export is newer" in said
    )


def test_somebody_elses_encoder(finetune: Callable, exported, tmp_path: Path) -> None:
    """As ``finetune.evaluate`` takes it: the same run as from the export that it was made of, and it goes on."""
    state, facts = read_export(exported.folder)
    export_timm(tmp_path / "theirs", state, facts)
    foreign = f"encoder=timm:{tmp_path / 'theirs'}"
    finetune(tmp_path / "run", foreign, "length=6").ok()
    run, own = finetune(tmp_path / "run", foreign, "length=8").ok(), finetune(tmp_path / "own", "length=6").ok()
    assert "from step 6" in run.out and f"images from timm:{tmp_path / 'theirs'}" in run.out
    assert run.losses()[:6] == own.losses() and len(run.losses()) == 8
    torch.save({"model": state}, tmp_path / "mae.pth")
    words = "say it with --heads; make an export of it first:  vitssl import  takes them"
    refused(finetune(tmp_path / "file", f"encoder={tmp_path / 'mae.pth'}"), f"encoder={tmp_path / 'mae.pth'}: ", words)


def test_images_are_normalised_as_the_encoder_knows_them(pretrain: Callable, finetune: Callable, tmp_path: Path) -> None:
    own = ("data.mean=[0.5, 0.4, 0.3]", "data.std=[0.1, 0.2, 0.3]")
    pretrain(tmp_path / "encoder", "length=2", *own).ok()
    found = {}
    for name, given in {"own": (), "named": own, "other": ("data.mean=[0.1, 0.1, 0.1]",)}.items():
        run = finetune(tmp_path / name, f"encoder={tmp_path / 'encoder'}", "length=3", *given).ok()
        facts = json.loads((run.folder / "export/last/classifier.json").read_text())
        found[name] = (run.losses(), facts["mean"], facts["std"])
    assert found["own"] == found["named"] and found["own"][1:] == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    assert found["other"][1:] == ([0.1, 0.1, 0.1], [0.1, 0.2, 0.3]) and found["other"][0] != found["own"][0]
