"""Distilling runs: from one of our classifiers and from a CNN of timm's, stopped and resumed, judged, asked and exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from outcome import refused
from safetensors.torch import load_file, save_file
from test_finetune import logits

from finetune.predict import main as predict
from finetune.teacher import columns_of
from vitssl.cli import main as vitssl
from vitssl.config import build
from vitssl.errors import CheckpointError, ConfigError
from vitssl.models.encoder import Encoder
from vitssl.sections import EncoderConfig
from vitssl.train.export import encoder_facts, write_export


@pytest.fixture(scope="module")
def teacher(finetune: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of ours, larger images than the student's."""
    settings = ("image_size=24", "optim.base_lr=1e-2", "length=24")
    return finetune(tmp_path_factory.mktemp("teacher") / "run", *settings).ok().folder


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A tiny CNN of timm's for four classes and for five, each as a folder that timm reads."""
    found = {}
    for classes in (4, 5):
        torch.manual_seed(classes)
        folder = found[classes] = tmp_path_factory.mktemp(f"cnn{classes}")
        model = timm.create_model("test_resnet", num_classes=classes)
        known = {"input_size": [3, 32, 32], "mean": [0.4] * 3, "std": [0.3] * 3, "classifier": "fc", "num_classes": classes}
        config = {"architecture": "test_resnet", "num_classes": classes, "pretrained_cfg": known}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), folder / "model.safetensors")
    return found


@pytest.fixture(scope="module")
def student(finetune: Callable, teacher: Path, tmp_path_factory: pytest.TempPathFactory):
    settings = ("teacher.kind=soft", "augment.mixup=0.8", "optim.base_lr=1e-2", "checkpoint.keep_last=9", "test.crop_pct=0.8")
    return finetune(tmp_path_factory.mktemp("student") / "run", f"teacher.name={teacher}", *settings).ok()


def test_it_says_who_teaches_and_saves_the_student_alone(student, teacher: Path) -> None:
    told = f"teacher {teacher}: soft distillation, 50% of the loss; it sees the student's images, resized from 16x16 to 24x24,"
    assert told in student.out and "read by finetune.predict and ONNX" in student.out
    names = set(student.tensors())
    assert {"state/head.head_dist.weight", "state/encoder.vit.reg_token"} <= names
    assert not [name for name in names if "teacher" in name or "network" in name]
    plan = json.loads((student.folder / "plan.json").read_text())["parameters"]
    assert plan["teacher"] == sum(each.numel() for each in load_file(teacher / "export/last/classifier.safetensors").values())


def test_the_token_begins_beside_the_pretrained_weights(finetune: Callable, exported, teacher: Path, tmp_path: Path) -> None:
    after = finetune(tmp_path / "run", f"teacher.name={teacher}", "length=1").ok().tensors()  # at lr 0
    before = load_file(exported.folder / "export/encoder.safetensors")
    token, positions = after["state/encoder.vit.reg_token"], after["state/encoder.vit.pos_embed"]
    assert token.shape == (1, 1, 24) and 0.01 < token.std() < 0.04
    assert torch.equal(positions[:, [0, *range(2, 18)]], before["pos_embed"]) and not positions[:, 1].any()
    kept = [name for name in before if not name.startswith(("pos_embed", "norm."))]
    assert kept and all(torch.equal(after[f"state/encoder.vit.{name}"], before[name]) for name in kept)


def test_resumed_it_is_the_same(student, finetune: Callable, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(student.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000012")
    settings = ("teacher.kind=soft", "augment.mixup=0.8", "optim.base_lr=1e-2", "checkpoint.keep_last=9", "test.crop_pct=0.8")
    run = finetune(tmp_path / "run", f"teacher.name={teacher}", *settings).ok()
    assert "from step 6" in run.out and run.losses() == student.losses()
    ours, theirs = run.tensors(), student.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_teacher_under_the_same_name_is_refused(finetune: Callable, cnn: dict, tmp_path: Path) -> None:
    shutil.copytree(cnn[4], tmp_path / "cnn")
    settings = (f"teacher.name={tmp_path / 'cnn'}", "teacher.token=false", "length=2")
    finetune(tmp_path / "run", *settings).ok()
    assert "is finished" in finetune(tmp_path / "run", *settings).ok().out
    state = load_file(tmp_path / "cnn/model.safetensors")
    save_file(state | {"fc.bias": state["fc.bias"] + 1}, tmp_path / "cnn/model.safetensors")
    refused(finetune(tmp_path / "run", *settings), f"has other weights than when {tmp_path / 'run'} was begun; put them back")


def test_predict_and_onnx_say_what_the_evaluation_said(student, data: Path, tmp_path: Path) -> None:
    assert predict([str(student.folder), f"{data}/test-0.tar", "--jsonl", f"{tmp_path}/rows.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    hits = sum(row["top"][0]["class"] == str(number % 4) for number, row in enumerate(rows))
    assert hits / 16 == pytest.approx(student.rows("probes.jsonl")[-1]["top1"])
    assert vitssl(["export", str(student.folder), str(tmp_path / "onnx"), "--to", "onnx"]) == 0


def test_timms_deit_says_the_same(finetune: Callable, teacher: Path, data: Path, tmp_path: Path) -> None:
    """Plain timm, from the folder alone, has the accuracy and the loss that the run measured."""
    settings = (f"teacher.name={teacher}", "head.pooling=class", "optim.base_lr=1e-2")
    run = finetune(tmp_path / "run", *settings).ok()
    assert vitssl(["export", str(run.folder), str(tmp_path / "timm"), "--to", "timm"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert type(model).__name__ == "VisionTransformerDistilled"
    facts = json.loads((run.folder / "export/last/classifier.json").read_text())
    ours, labels = logits(model, facts, data)
    row = run.rows("probes.jsonl")[-1]
    assert float(torch.nn.functional.cross_entropy(ours, labels)) == pytest.approx(row["loss"], rel=1e-5)
    assert float((ours.argmax(1) == labels).float().mean()) == pytest.approx(row["top1"])


NO_PLACE = {
    "timm": "timm's DeiT reads the class token after the final norm, and this distilled classifier the mean over patches",
    "transformers": "two heads and a distillation token, and transformers's ViT has no place for that; export --to onnx",
}


@pytest.mark.parametrize("to", NO_PLACE)
def test_other_libraries_have_no_such_head(student, to: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=NO_PLACE[to]) as error:
        vitssl(["export", str(student.folder), str(tmp_path / to), "--to", to])
    assert "\n" not in str(error.value) and not (tmp_path / to).exists()


def test_timms_deit_has_two_tokens(exported, finetune: Callable, pretrain: Callable, teacher: Path, tmp_path: Path) -> None:
    pretrain(tmp_path / "encoder", "encoder.registers=2", "length=1").ok()
    settings = (f"teacher.name={teacher}", "head.pooling=class", "length=1", f"encoder={tmp_path / 'encoder'}")
    run = finetune(tmp_path / "run", *settings).ok()
    assert run.tensors()["state/encoder.vit.reg_token"].shape[1] == 3
    with pytest.raises(CheckpointError, match="and this encoder 4 tokens before its patches; export --to onnx"):
        vitssl(["export", str(run.folder), str(tmp_path / "timm"), "--to", "timm"])


def test_other_families(finetune: Callable, teacher: Path, tmp_path: Path) -> None:
    """Eva takes the token as a register; Beit has none, and learns from a teacher without."""
    names = {"eva": "vit_small_patch16_dinov3", "beit": "beit_base_patch16_224"}
    for name, architecture in names.items():
        shape = {"embed_dim": 24, "depth": 1, "num_heads": 3}
        values = {"name": architecture, "image_size": 16, "patch_size": 4, "arguments": shape}
        section = build(EncoderConfig, values, where="here")
        body = Encoder.create(section.name, **section.model_dump(exclude={"name"}))
        facts = encoder_facts(body, section, mean=[0.5] * 3, std=[0.5] * 3, pooling="mean")
        write_export(tmp_path / name, "encoder", body.state(), facts)
    taught = (f"teacher.name={teacher}", "head.pooling=class", "length=2")
    eva = finetune(tmp_path / "run", f"encoder={tmp_path / 'eva'}", *taught).ok()
    with pytest.raises(CheckpointError, match="a plain ViT, and vit_small_patch16_dinov3 is not; export --to onnx"):
        vitssl(["export", str(eva.folder), str(tmp_path / "timm"), "--to", "timm"])
    beit = (f"encoder={tmp_path / 'beit'}", *taught)
    refused(finetune(tmp_path / "refused", *beit), "teacher.token=true: there is no place for it", "take teacher.token=false")
    finetune(tmp_path / "without", *beit, "teacher.token=false").ok()


def test_two_processes_distil_the_same(finetune: Callable, teacher: Path, tmp_path: Path) -> None:
    settings = (f"teacher.name={teacher}", "drop_path=0", "length=4")
    one, two = finetune(tmp_path / "one", *settings).ok(), finetune(tmp_path / "two", *settings, processes=2).ok()
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)


def test_a_cnn_from_a_folder_or_a_file_teaches_the_same(finetune: Callable, cnn: dict, tmp_path: Path) -> None:
    settings = ("length=4", "teacher.token=false", "teacher.image_size=32")
    folder = finetune(tmp_path / "folder", f"teacher.name={cnn[4]}", *settings).ok()
    file = ("teacher.name=test_resnet", f"teacher.weights={cnn[4]}/model.safetensors")
    named = finetune(tmp_path / "file", *file, *settings).ok()
    assert "hard distillation, 50% of the loss" in named.out and "resized from 16x16 to 32x32, bicubic" in folder.out
    assert len(set(folder.losses())) > 1
    assert "state/head.head_dist.weight" not in folder.tensors() and "a plain timm state" in folder.out
    other = finetune(tmp_path / "other", f"teacher.name={cnn[4]}", *settings, "teacher.alpha=0.9").ok()
    assert other.losses() != folder.losses()


def test_classes_are_joined_by_name() -> None:
    assert columns_of("x", ("c", "a", "b"), ("a", "b", "c")) == [1, 2, 0]
    assert columns_of("x", None, ("a", "b")) is columns_of("x", ("a", "b"), ("a", "b")) is None
    assert columns_of("x", ("a", "b"), ("0", "1")) is None  # numbers are no names
    with pytest.raises(ConfigError, match=r"teacher.name=x: does not know 2 of the classes \(b, d\); take another teacher"):
        columns_of("x", ("a", "c", "e"), ("a", "b", "d"))


REFUSED = {
    "another number of classes": (["teacher.name={5}"], "tells 5 classes apart and the training data has 4; take a teacher"),
    "another in a file": (["teacher.name=test_resnet", "teacher.weights={5}/model.safetensors"], "tells 5 classes apart"),
    "unknown": (["teacher.name=resnet999"], "teacher.name='resnet999': is no model of timm"),
    "of several labels": (["teacher.name={several}"], "tells several labels of an image, and distillation is of one"),
    "an empty folder": (["teacher.name={empty}"], "holds neither a classifier of ours nor a timm model's config.json"),
    "two weights": (["teacher.name={4}", "teacher.weights=x.pt"], "has weights of its own; leave them out"),
    "no such file": (["teacher.name=test_resnet", "teacher.weights=x.pt"], "x.pt does not exist"),
    "partial weights": (
        ["teacher.name=test_resnet", "teacher.weights={empty}/part.safetensors"],
        "these weights do not fit teacher.name=test_resnet",
    ),
    "a frozen token": (["teacher.name={4}", "mode=linear"], "teacher.token=true trains a token, which mode=linear freezes"),
    "two kinds of head": (["teacher.name={4}", "head.hidden=8"], "teacher.token=true and head.hidden=8 exclude each other"),
    "no name": (["teacher.kind=soft"], "teacher.name: has no value and needs one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_teachers_that_cannot_be(finetune: Callable, cnn: dict, tmp_path: Path, case: str) -> None:
    argv, words = REFUSED[case]
    (tmp_path / "empty").mkdir()
    save_file({"fc.bias": torch.zeros(4)}, tmp_path / "empty/part.safetensors")
    facts = {"architecture": "x", "arguments": {}, "image_size": [8, 8], "mean": [0.5], "std": [0.5], "pooling": "mean"}
    write_export(tmp_path / "several", "classifier", {}, facts | {"classes": list("abcd"), "labels": "several"})
    places = {"5": cnn[5], "4": cnn[4], "empty": tmp_path / "empty", "several": tmp_path / "several"}

    def placed(text: str) -> str:
        for name, path in places.items():
            text = text.replace(f"{{{name}}}", str(path))
        return text

    refused(finetune(tmp_path / "run", *map(placed, argv)), words)
    assert not (tmp_path / "run").exists()
