"""Pretraining runs that learn from a frozen teacher: tokens of an encoder of ours, labels of a CNN; and CAN in parts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from outcome import refused
from safetensors.torch import load_file, save_file

OWN = ("objectives.mae=null", "heldout.pictures=0")
CAN = (*OWN, "objectives.can={decoder: {dim: 16, depth: 1, heads: 2}, out: 8}")


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CNN of timm's for five classes, as a folder that timm reads."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("cnn")
    model = timm.create_model("test_resnet", num_classes=5)
    known = {"input_size": [3, 32, 32], "mean": [0.4] * 3, "std": [0.3] * 3, "classifier": "fc", "num_classes": 5}
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": known}))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def distill(teacher: Path | str, **more: str) -> tuple[str, ...]:
    settings = [f"objectives.distill.{key}={value}" for key, value in more.items()]
    return (*OWN, f"objectives.distill.teacher.name={teacher}", *settings)


def test_an_encoder_teaches_tokens_and_a_run_goes_on_with_it_alone(pretrain: Callable, exported, tmp_path: Path) -> None:
    teacher = shutil.copytree(exported.folder / "export", tmp_path / "teacher")
    settings = (*distill(teacher), "encoder.patch_size=8")
    run = pretrain(tmp_path / "run", *settings).ok()
    assert f"teacher {teacher}: class and patch tokens; it sees the student's images, as they are" in run.out
    names, losses = run.tensors(), run.losses()
    assert losses[-1] < losses[0] and not [name for name in names if "teacher" in name or "network" in name]
    plan = json.loads((run.folder / "plan.json").read_text())["parameters"]
    assert plan["teacher"] == sum(each.numel() for each in load_file(teacher / "encoder.safetensors").values())
    assert (run.folder / "export/encoder.safetensors").is_file()
    shutil.rmtree(run.folder / "checkpoints/step_00000020")
    again = pretrain(tmp_path / "run", *settings).ok()
    assert "from step 10" in again.out and again.losses() == losses
    assert all(tensor.equal(names[name]) for name, tensor in again.tensors().items())
    state = load_file(teacher / "encoder.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, teacher / "encoder.safetensors")
    refused(pretrain(tmp_path / "run", *settings, "length=30"), f"teacher.name={teacher}: has other weights than when")


def test_a_cnn_teaches_labels_beside_another_objective_on_two_processes(pretrain: Callable, cnn: Path, tmp_path: Path) -> None:
    settings = (*distill(cnn, target="labels", weight="{peak: 0.5, warmup: 4}")[1:], "length=6")
    one = pretrain(tmp_path / "one", *settings).ok()
    two = pretrain(tmp_path / "two", *settings, "micro_batch=2", processes=2).ok()
    assert "labels; it sees the student's images, resized from 16x16 to 32x32, bicubic" in one.out
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-4)


def test_can_by_parts_and_processes_is_the_same_run(pretrain: Callable, tmp_path: Path) -> None:
    whole = pretrain(tmp_path / "whole", *CAN, "heldout.pictures=2", "length=8").ok()
    parts = pretrain(tmp_path / "parts", *CAN, "micro_batch=2", "length=8", processes=2).ok()
    np.testing.assert_allclose(parts.losses(), whole.losses(), rtol=2e-4)
    assert (whole.folder / "pictures").exists() and "8 meet in one loss" in parts.out


REFUSED = {
    "nobody": ((*OWN, "objectives.distill.target=tokens"), "objectives.distill.teacher: has no value and needs one"),
    "unknown": (distill("resnet999", target="labels"), "objectives.distill.teacher.name='resnet999': is no model of timm"),
    "no encoder": (distill("{empty}"), "objectives.distill.teacher.name={empty}: "),
    "weights for tokens": (
        distill("{empty}", **{"teacher.weights": "x.pt"}),
        "objectives.distill.teacher.weights=x.pt: is for",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_teachers_that_cannot_be(pretrain: Callable, tmp_path: Path, case: str) -> None:
    argv, words = REFUSED[case]
    (tmp_path / "empty").mkdir()
    placed = [word.replace("{empty}", str(tmp_path / "empty")) for word in (*argv, words)]
    refused(pretrain(tmp_path / "run", *placed[:-1]), placed[-1])
    assert not (tmp_path / "run").exists()
