"""What a user can get wrong: one line (two at most) that says so, exit code 2, no traceback, and nothing lost."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import contents, refused
from safetensors.torch import load_file, save_file

from finetune.predict import main as predict
from vitssl.errors import CheckpointError

RUINED = ["optim.base_lr=3e38", "optim.weight_decay=100", "optim.warmup=0", "checkpoint.every=1"]
GREY = ["encoder.channels=1", "data.mean=[0.5]", "data.std=[0.5]", "objectives.mae.view.photometric.jitter=0.8"]
SETTINGS = {
    "unknown key": (["optim.base_lrr=1"], ["optim.base_lrr: unknown key", "did you mean optim.base_lr?"]),
    "unknown section": (["optimm.base_lr=1"], ["optimm", "unknown key", "optim"]),
    "wrong type": (["batch_size=many"], ["batch_size='many'", "valid integer"]),
    "wrong choice": (["launch.engine=zero9"], ["launch.engine='zero9'", "'zero1'", "'zero2'"]),
    "not a setting": (["=3"], ["is not an override; write key.path=value"]),
    "unknown flag": (["--plann"], ["--plann: unknown flag", "--plan"]),
    "indivisible micro-batch": (["micro_batch=3"], ["micro_batch=3 does not divide", "8 / 3 = 2.67", "take 2 or 4"]),
    "nothing to train": (["length=0"], ["length=0 is 0 steps of 8 over 60 images"]),
    "unknown objective": (["objectives.may={}", "objectives.mae=null"], ["objectives.may: no such objective", "mean mae?"]),
    "unknown objective key": (["objectives.mae.mask_ration=0.5"], ["objectives.mae.mask_ration: unknown key", "mask_ratio?"]),
    "unknown encoder": (["encoder.name=vit_tiny_patch61_224"], ["vit_tiny_patch61_224", "vit_tiny_patch16_224"]),
    "indivisible image": (["encoder.image_size=18"], ["encoder.image_size 18x18 is not divisible by patches of 4x4", "16x16"]),
    "fp16 on a CPU": (["launch.precision=fp16"], ["launch.precision=fp16 needs a GPU", "bf16 or fp32"]),
    "unknown tracker": (["log.trackers=[tensorbord]"], ["log.trackers: 'tensorbord' is none of", "tensorboard"]),
    "no images to probe": (["probe.bank.path=missing/"], ["probe.bank: missing/"]),
    "no bank to vote": (["probe.queries.path=missing/"], ["probe.bank.path: has no value"]),
    "no images held out": (["heldout.path=/no/where"], ["heldout: /no/where"]),
    "rates of decay of one": (
        ["optim.betas=[0.9, 1.0]"],
        ["optim.betas.1=1.0: input should be less than 1 (in the command line)"],
    ),
    "a seed beyond 63 bits": ([f"seed={2**63}"], [f"seed={2**63}: input should be less than {2**63}"]),
    "more lanes than samples": (["data.lanes=61"], ["data.lanes=61: there are only 60 samples"]),
    "nothing to look at": (["probe.crop_pct=0"], ["probe.crop_pct=0: input should be greater than 0"]),
    "no time between": (["checkpoint.every=0"], ["checkpoint.every=0: must be longer than 0"]),
    "no time between probes": (["heldout.every=0%"], ["heldout.every='0%': must be longer than 0"]),
    "no deviation": (["data.std=[0.2, 0, 0.2]"], ["data.std.1=0: input should be greater than 0"]),
    "an encoder without blocks": (["encoder.arguments.depth=0"], ["encoder.arguments.depth=0: an encoder without a block"]),
    "a fine-tuning key": (["drop_path=0.5"], ["drop_path: unknown key; did you mean encoder.drop_path?"]),
    "loss is no number": (["optim.base_lr=1e30"], ["the loss is nan at step 3; nothing of it was saved", "base_lr"]),
    "weights are no numbers": (RUINED, ["is not finite after step 1; nothing of it was saved", "Lower optim.base_lr"]),
    "no run to resume": (["init.resume=/nowhere"], ["init.resume=/nowhere: there is no checkpoint in /nowhere/checkpoints"]),
    "areas upside down": (
        ["objectives.mae.view.scale=[0.9,0.1]"],
        ["objectives.mae.view.scale=[0.9, 0.1]: is no range; write the smaller first"],
    ),
    "an end of no momentum": (["teacher.final=0.5"], ["teacher.final=0.5: is of a momentum that is not given"]),
    "groups that do not divide": (
        ["objectives.mae=null", "objectives.dino={koleo: 0.1, koleo_group: 3, crops: {num_local: 0}}", "--plan"],
        ["objectives.dino.koleo_group=3 does not divide a batch of 8 images"],
    ),
    "no class token to pool": (["encoder.class_token=false", "pooling=class"], ["pooling=class needs a class token"]),
    "an argument that timm does not know": (["encoder.arguments.norm_layer=foo"], ["timm cannot build it", "'foo'"]),
    "a probe that looks at patches": (["probe.protocols=[attentive]"], ["attentive is none of knn, fewshot, ridge"]),
    "colours of grey images": (GREY, ["photometric: changes the colours of 3 channels", "encoder.channels=1"]),
    "no weights, not even for a plan": (["init.weights=/nowhere", "--plan"], ["/nowhere", "does not exist"]),
    "no weights": (["init.weights=/nowhere"], ["/nowhere", "does not exist"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_cannot_be(pretrain: Callable, tmp_path: Path, case: str) -> None:
    argv, words = SETTINGS[case]
    refused(pretrain(tmp_path / "run", *argv), *words)
    assert not (tmp_path / "run/export").exists() and not (tmp_path / "run/checkpoints").exists()


def test_a_config_file_that_is_not_there(start: Callable, tmp_path: Path) -> None:
    refused(start("pretrain", tmp_path / "run", "tests/tinny.yaml").wait(), "tests/tinny.yaml", "did you mean tests/tiny.yaml?")


def test_a_key_that_stands_twice(start: Callable, tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("seed: 1\nbatch_size: 8\nseed: 2\n")
    refused(start("pretrain", tmp_path / "run", str(tmp_path / "twice.yaml")).wait(), "twice.yaml:3: key 'seed' stands twice")


@pytest.mark.parametrize("name", ["..", "1.5", "''"])
def test_a_run_name_that_is_no_folder(start: Callable, tmp_path: Path, name: str) -> None:
    run = start("pretrain", tmp_path / name, "tests/tiny.yaml")
    refused(run.wait(), "run.name=", "is the name of one folder, without / or \\; quote what YAML would read as a number")


def test_a_place_where_no_folder_can_be(pretrain: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(pretrain(tmp_path / "file" / "run"), f"{tmp_path}/file", "name a path that can be used")


def test_a_run_that_is_running(pretrain: Callable, tmp_path: Path) -> None:
    first = pretrain(tmp_path / "run", "length=3000", "heldout.every=3000", "checkpoint.every=3000", wait=False)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    before = (tmp_path / "run/config.yaml").read_bytes()
    refused(pretrain(tmp_path / "run", "length=3000"), f"{tmp_path}/run: another program is training in it now")
    assert (tmp_path / "run/config.yaml").read_bytes() == before
    first.kill()
    first.wait()
    pretrain(tmp_path / "run").ok()  # the lock went with its process


def test_a_gpu_that_is_not_there(pretrain: Callable, tmp_path: Path) -> None:
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    run = pretrain(tmp_path / "run", "launch.device=cuda", env=no_gpu)
    refused(run, "launch.device=cuda: torch sees no GPU here; take launch.device=auto")


def test_a_batch_that_does_not_divide_over_processes(pretrain: Callable, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", "batch_size=9", processes=2)
    assert run.codes == [2, 2] and run.err.count("\n") == 1
    assert "batch_size=9 does not divide over 2 processes (9 / 2 = 4.50); take 8 or 10" in run.err


def test_an_engine_that_accelerate_was_told_otherwise(pretrain: Callable, tmp_path: Path) -> None:
    for name, value, words in (
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed but launch.engine=ddp; take launch.engine=zero2"),
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP but launch.engine=ddp"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "asks for bf16 but the run is fp32; take launch.precision=bf16"),
    ):
        refused(pretrain(tmp_path / "run", env={name: value}), words)


def test_another_config_than_the_runs(pretrain: Callable, exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder, tmp_path / "run")
    before = contents(tmp_path / "run")
    run = pretrain(tmp_path / "run", "seed=5", "optim.base_lr=0.5", "log.every=7")
    refused(run, "holds a run of another config (seed: 0 -> 5; optim.base_lr: 0.01 -> 0.5)", "another run.name")
    assert contents(tmp_path / "run") == before


def test_a_checkpoint_of_another_architecture(pretrain: Callable, exported, tmp_path: Path) -> None:
    before = contents(exported.folder)
    wide, deep = ["encoder.arguments.embed_dim=32", "length=30"], ["encoder.arguments.depth=3", "length=30"]
    run = pretrain(tmp_path / "run", *wide, f"init.resume={exported.folder}")
    refused(
        run,
        "holds a run of another config (encoder.arguments.embed_dim: 24 -> 32)",
        "(from this one's export with init.weights=...)",
    )
    assert contents(exported.folder) == before
    shutil.copytree(exported.folder, tmp_path / "bare")
    (tmp_path / "bare/config.yaml").unlink()  # with nothing to compare, the tensors tell
    run = pretrain(tmp_path / "run", *wide, f"init.resume={tmp_path / 'bare'}")
    refused(run, "do not fit the configured network", "of other shape (encoder.vit.", "24", "instead of", "32", "and ")
    run = pretrain(tmp_path / "run", *deep, f"init.resume={tmp_path / 'bare'}")
    refused(run, "12 missing (encoder.vit.blocks.2.")
    run = pretrain(tmp_path / "other", *deep, f"init.weights={exported.folder}")
    refused(
        run, f"init.weights={exported.folder}: these weights do not fit", "depth 2 instead of 3; write  encoder: {name: vit_"
    )


FINETUNE = {
    "no export": (["encoder=/nowhere"], ["/nowhere/encoder.safetensors does not exist"]),
    "nothing exported yet": (["encoder=newest"], ["no encoder was exported below", "python -m pretrain"]),
    "no test images": (["test.path=null", "test.split=null"], ["test.path: has no value"]),
    "no training images": (["data.path=null", "data.split=null"], ["data.path: has no value"]),
    "more labels than there are": (["labelled=61"], ["cannot choose 61 of 60 labelled samples"]),
    "class token that is not pooled": (["head.pooling=token"], ["head.pooling='token'", "'mean' or 'class'"]),
    "statistics of another number of channels": (["data.mean=[0.5]"], ["data.mean has 1 and data.std 3 values"]),
    "odd mixup": (["augment.mixup=0.8", "micro_batch=1"], ["in pairs, and micro_batch=1; make it even"]),
    "areas upside down": (["augment.scale=[0.9,0.1]"], ["augment.scale=[0.9, 0.1]: is no range; write the smaller"]),
    "no official file": (["encoder=/nowhere.pth"], ["encoder=/nowhere.pth: /nowhere.pth does not exist"]),
    "size that patches do not divide": (["image_size=18"], ["18x18 is not divisible by patches of 4x4"]),
    "unknown augmentation": (["augment.rand_augment=rnd-m9"], ["augment.rand_augment", "rnd-m9"]),
}


@pytest.mark.parametrize("case", FINETUNE)
def test_fine_tuning_that_cannot_be(finetune: Callable, tmp_path: Path, case: str) -> None:
    argv, words = FINETUNE[case]
    refused(finetune(tmp_path / "run", *argv), *words)
    assert not (tmp_path / "run").exists()


def test_labels_that_are_missing_or_too_many(finetune: Callable, tmp_path: Path, picture: Callable) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_bytes(picture(1))
    plain = tmp_path / "photos"
    refused(finetune(tmp_path / "run", f"data.path={plain}", "data.split=null"), "photos", "label for every image")
    refused(finetune(tmp_path / "run", f"test.path={plain}", "test.split=null"), "photos", "label for every image")
    for name in "abcde":
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "one.jpg").write_bytes(picture(1))
    refused(finetune(tmp_path / "run", f"test.path={tmp_path / 'classes'}", "test.split=null"), "has label 4", "has 0 to 3")
    assert not (tmp_path / "run").exists()


def test_exports_that_are_not_what_they_say(finetune: Callable, exported, tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[dict, dict], None]) -> str:
        """A copy of the export with other facts or tensors."""
        shutil.copytree(exported.folder / "export", folder := tmp_path / name)
        facts, state = json.loads((folder / "encoder.json").read_text()), load_file(folder / "encoder.safetensors")
        change(facts, state)
        (folder / "encoder.json").write_text(json.dumps(facts))
        save_file(state, folder / "encoder.safetensors")
        return f"encoder={folder}"

    def in_part(facts: dict, state: dict) -> None:
        del state["blocks.1.attn.qkv.weight"]

    def unknown(facts: dict, state: dict) -> None:
        facts["encoder"]["name"] = "vit_tiny_patch61_224"

    run = finetune(tmp_path / "run", changed("part", in_part))
    refused(run, f"{tmp_path}/part: these weights do not fit", "1 missing (blocks.1.attn.qkv.weight)")
    run = finetune(tmp_path / "run", changed("unknown", unknown))
    refused(run, "timm", "has no such model; the nearest supported: vit_tiny_")
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_classifier_of_another_number_of_classes(finetune: Callable, data: Path, tmp_path: Path) -> None:
    folder = finetune(tmp_path / "run", "length=1").ok().folder / "export/last"
    facts = json.loads((folder / "classifier.json").read_text())
    for change, words in (
        ({"classes": ["a", "b"]}, "this classifier names 2 classes and its head has 4; export it again"),
        ({"classes": ["a", "b"], "arguments": facts["arguments"] | {"num_classes": 2}}, "head.weight 4x24 instead of 2x24"),
    ):
        (folder / "classifier.json").write_text(json.dumps(facts | change))
        with pytest.raises(CheckpointError, match=words) as error:
            predict([str(folder), f"{data}/test-0.tar"])
        assert "\n" not in str(error.value)
