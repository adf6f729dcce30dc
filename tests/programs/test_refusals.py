"""What a user can get wrong: one line (two at most) that says so, exit code 2, no traceback, and nothing lost."""

import ctypes
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RUINED = ["optim.base_lr=3e38", "optim.weight_decay=100", "optim.warmup=0", "checkpoint.every=1"]
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
    "no images to probe": (["probe.bank.path=missing/"], ["missing"]),
    "loss is no number": (["optim.base_lr=1e30"], ["the loss is nan at step 3; nothing of it was saved", "base_lr"]),
    "weights are no numbers": (RUINED, ["is not finite after step 1; nothing of it was saved", "Lower optim.base_lr"]),
    "no run to resume": (["init.resume=/nowhere"], ["init.resume=/nowhere: there is no checkpoint in /nowhere/checkpoints"]),
    "no weights": (["weights=/nowhere"], ["/nowhere", "does not exist"]),
}


def refused(run, *words: str, lines: int = 1) -> None:
    assert run.codes == [2], run.out + run.err
    assert run.err.startswith("error: ") and run.err.count("\n") <= lines and "Traceback" not in run.err + run.out
    for word in words:
        assert word in run.err


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


def drop(folder: Path) -> None:
    for path in folder.glob("train-*.tar"):
        path.unlink()


def cut(folder: Path) -> None:
    content = (folder / "train-1.tar").read_bytes()
    (folder / "train-1.tar").write_bytes(content[: len(content) // 2 + 100])


def scribble(folder: Path) -> None:
    """Overwrite the image of key 0027, after its header."""
    content = (folder / "train-1.tar").read_bytes()
    start = content.index(b"0027.jpg") + 512
    (folder / "train-1.tar").write_bytes(content[:start] + b"x" * 200 + content[start + 200 :])


FILES = {
    "no shards": (drop, "data.split=train", ["train", "test-0.tar"]),
    "a pattern that meets nothing": (None, "data.path={data}/train-{{7..9}}.tar", ["train-7.tar", "test-0.tar to train-2.tar"]),
    "an empty tar": (lambda folder: (folder / "train-2.tar").write_bytes(b""), "", ["train-2.tar: is an empty file"]),
    "a truncated tar": (cut, "", ["train-1.tar: is truncated or damaged", "byte"]),
    "an image that does not decode": (scribble, "", ["train-1.tar", "0027"]),
    "no such folder": (None, "data.path=/no/where", ["/no/where"]),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", FILES)
def test_data_that_cannot_be_read(pretrain: Callable, data: Path, tmp_path: Path, case: str, workers: int) -> None:
    damage, setting, words = FILES[case]
    shutil.copytree(data, tmp_path / "data")
    if damage:
        damage(tmp_path / "data")
    argv = [f"data.path={tmp_path / 'data'}", *([setting.format(data=data)] if setting else [])]
    argv += ["data.split=null"] if "data.path" in setting else []
    refused(pretrain(tmp_path / "run", *argv, f"data.workers={workers}"), *words)


def test_an_image_that_only_the_second_process_meets(pretrain: Callable, data: Path, tmp_path: Path) -> None:
    """Its error is told though process 0 knows nothing of it; a launcher then ends the other."""
    trap = """
import os
from vitssl.data import transforms
from vitssl.errors import DataError
real, count = transforms.decode, [0]
def decode(*arguments):
    count[0] += 1
    if os.environ["RANK"] == "1" and count[0] > 20:
        raise DataError("train-0.tar: 0007 does not decode")
    return real(*arguments)
transforms.decode = decode
"""
    run = pretrain(tmp_path / "run", "heldout.every=100", processes=2, trap=trap, wait=False)
    rank1 = run.pids[1]
    assert run.forks.ask(wait=rank1, timeout=60)["code"] == 2
    run.pids = run.pids[:1]
    run.kill()
    run.wait()
    assert run.files[1][1].read_text() == "error in process 1: train-0.tar: 0007 does not decode\n"


def test_another_config_than_the_runs(pretrain: Callable, exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder, tmp_path / "run")
    before = contents(tmp_path / "run")
    run = pretrain(tmp_path / "run", "seed=5", "optim.base_lr=0.5", "log.every=7")
    refused(run, "holds a run of another config (seed: 0 -> 5; optim.base_lr: 0.01 -> 0.5)", "another run.name")
    assert contents(tmp_path / "run") == before


def test_a_checkpoint_of_another_architecture(pretrain: Callable, exported, tmp_path: Path) -> None:
    before = contents(exported.folder)
    wide = ["encoder.arguments.embed_dim=32", f"init.resume={exported.folder}"]
    run = pretrain(tmp_path / "run", *wide, "length=30")
    refused(run, "do not fit the configured network", "of other shape (encoder.vit.", "24", "instead of", "32", "and ")
    deep = ["encoder.arguments.depth=3", f"init.resume={exported.folder}"]
    run = pretrain(tmp_path / "deep", *deep, "length=30")
    refused(run, "12 missing (encoder.vit.blocks.2.")
    assert contents(exported.folder) == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``disk(size)``: a folder that holds no more than that; called again, it is given more room."""
    folder, libc = tmp_path / "disk", ctypes.CDLL(None, use_errno=True)

    def mount(size: str) -> Path:
        remount = 32 if folder.exists() else 0
        folder.mkdir(exist_ok=True)
        if os.geteuid() or libc.mount(b"none", str(folder).encode(), b"tmpfs", remount, f"size={size}".encode()):
            pytest.skip("needs the right to mount a tmpfs")
        return folder

    yield mount
    libc.umount2(str(folder).encode(), 2)


def test_no_space_left(pretrain: Callable, disk: Callable) -> None:
    """The run ends, the checkpoints that were written stay whole, and with more room the same command goes on."""
    argv = ["checkpoint.every=2", "checkpoint.keep_last=99", "heldout.pictures=0"]
    run = pretrain(disk("1200k") / "run", *argv)
    refused(run, "No space left on device", "the newest whole checkpoint is step_", "free space and run the same command")
    kept = run.checkpoints()
    assert kept and not list((run.folder / "checkpoints").glob(".writing*"))
    again = pretrain(disk("20m") / "run", *argv).ok()
    assert f"from step {int(kept[-1].name[5:])}" in again.out and "warning" not in again.out
    assert len(again.losses()) == 20


def test_no_space_for_anything(pretrain: Callable, disk: Callable) -> None:
    folder = disk("4k")
    refused(pretrain(folder / "run"), "no space left on the device while writing ", "run the same command to go on")
    assert len(pretrain(disk("20m") / "run").ok().losses()) == 20


def test_an_export_that_cannot_be_written(pretrain: Callable, tmp_path: Path) -> None:
    trap = "import resource, pretrain.run as program; real = program.write_export\n" \
        "def write(*a):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); return real(*a)\n" \
        "program.write_export = write"  # fmt: skip
    run = pretrain(tmp_path / "run", trap=trap)
    refused(run, "export/encoder.safetensors could not be written: ", "run the same command again")
    assert not list((run.folder / "export").iterdir()) and [path.name for path in run.checkpoints()] == ["step_00000010"]
    again = pretrain(tmp_path / "run").ok()
    assert "from step 10" in again.out and (run.folder / "export/encoder.safetensors").exists()


@pytest.mark.parametrize("limit", [3_000, 90_000, 130_000])
def test_a_file_that_may_not_grow(pretrain: Callable, tmp_path: Path, limit: int) -> None:
    """Where no disk can be filled, a limit on the size of files stops a write half-way."""
    trap = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))"
    run = pretrain(tmp_path / "run", "heldout.pictures=0", trap=trap)
    refused(run, "could not be written: ", "no earlier checkpoint exists")
    assert not list((run.folder / "checkpoints").iterdir())


FINETUNE = {
    "no export": (["encoder=/nowhere"], ["/nowhere/encoder.safetensors does not exist"]),
    "nothing exported yet": (["encoder=newest"], ["no encoder was exported below", "python -m pretrain"]),
    "no test images": (["test.path=null", "test.split=null"], ["test.path: has no value"]),
    "no training images": (["data.path=null", "data.split=null"], ["data.path: has no value"]),
    "more labels than there are": (["labelled=61"], ["cannot choose 61 of 60 labelled samples"]),
    "class token that is not pooled": (["head.pooling=token"], ["head.pooling='token'", "'mean' or 'class'"]),
    "odd mixup": (["augment.mixup=0.8", "micro_batch=1"], ["mixup pairs the samples", "make micro_batch even"]),
    "size that patches do not divide": (["image_size=18"], ["18x18 is not divisible by patches of 4x4"]),
    "unknown augmentation": (["augment.rand_augment=rnd-m9"], ["augment.rand_augment", "rnd-m9"]),
}


@pytest.mark.parametrize("case", FINETUNE)
def test_fine_tuning_that_cannot_be(finetune: Callable, tmp_path: Path, case: str) -> None:
    argv, words = FINETUNE[case]
    refused(finetune(tmp_path / "run", *argv), *words)


def test_labels_that_are_missing_or_too_many(finetune: Callable, tmp_path: Path, picture: Callable) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_bytes(picture(1))
    plain = tmp_path / "photos"
    refused(finetune(tmp_path / "run", f"data.path={plain}", "data.split=null"), "photos", "label for every image")
    refused(finetune(tmp_path / "run", f"test.path={plain}", "test.split=null"), "photos", "label for every image")
    for name in "abcde":
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "one.jpg").write_bytes(picture(1))
    refused(finetune(tmp_path / "run", f"test.path={tmp_path / 'classes'}", "test.split=null"), "label 4", "classes 0 to 3")
    assert not (tmp_path / "run").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
