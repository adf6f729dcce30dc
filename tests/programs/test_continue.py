"""Pretraining that goes on from given weights: where they come from, how the encoder waits, and what is refused."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from outcome import WAIT, contents, equal_bits, refused
from safetensors.torch import load_file

from pretrain.config import PretrainConfig
from pretrain.run import build_task
from pretrain.start import Start
from vitssl.cli import main as tools
from vitssl.config import load
from vitssl.errors import CheckpointError, UserError
from vitssl.train.planning import outline

ROOT = Path(__file__).parents[2]
ENCODER = "encoder.vit."


def test_the_encoder_waits_then_trains(waited, exported) -> None:
    given = load_file(exported.folder / "export/encoder.safetensors")
    trained = [name for name in given if name != "pos_embed"]  # fixed
    for step in range(1, 11):
        tensors = waited.tensors(step - 1)
        assert equal_bits(tensors, given) == (step <= 6)
        moved = [tensors[f"moments/exp_avg/{ENCODER}{name}"].any() for name in trained]
        assert all(moved) if step > 6 else not any(moved)
        heads = [tensor for name, tensor in tensors.items() if name.startswith("moments/exp_avg/objectives.")]
        assert all(tensor.any() for tensor in heads)
        facts = json.loads((waited.checkpoints()[step - 1] / "manifest.json").read_text())["facts"]
        waits = {"steps": 6, "updates": max(0, step - 6)}
        assert facts["updates"] == step and facts["waiting"] == dict.fromkeys(("encoder.decay", "encoder.no_decay"), waits)
    assert set(json.loads((waited.folder / "plan.json").read_text())["waits"].values()) == {6}
    assert "6 steps in which the encoder keeps its weights" in waited.out
    assert f"encoder from {exported.folder}: every tensor as it is" in waited.out


def test_two_processes_wait_as_one_does(pretrain: Callable, waited, exported, tmp_path: Path) -> None:
    """Their batches accumulated, their activations computed again."""
    carried = ("micro_batch=2", "launch.checkpointing=true")
    run = pretrain(tmp_path / "run", *WAIT, f"init.weights={exported.folder}", *carried, processes=2).ok()
    np.testing.assert_allclose(run.losses(), waited.losses(), rtol=1e-5)
    given = load_file(exported.folder / "export/encoder.safetensors")
    assert equal_bits(run.tensors(5), given) and not equal_bits(run.tensors(6), given)


def test_killed_while_it_waits_it_goes_on_bit_for_bit_without_the_weights(
    pretrain: Callable, waited, exported, tmp_path: Path
) -> None:
    """What it began from may be gone by then."""
    shutil.copytree(exported.folder, tmp_path / "given")
    options = (*WAIT, f"init.weights={tmp_path}/given")
    run = pretrain(tmp_path / "run", *options).ok()
    assert run.losses() == waited.losses()
    for step in range(4, 11):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:08}")
    shutil.rmtree(tmp_path / "given")
    on = pretrain(tmp_path / "run", *options).ok()
    assert "from step 3" in on.out and "encoder from" not in on.out.split("from step 3")[1] and on.losses() == run.losses()
    assert all(torch.equal(tensor, waited.tensors()[name]) for name, tensor in on.tensors().items())


def test_a_longer_run_does_not_wait_again(pretrain: Callable, exported, tmp_path: Path) -> None:
    options = ("init.head_warmup=25%", f"init.weights={exported.folder}", "checkpoint.every=1", "checkpoint.keep_last=99")
    assert equal_bits(pretrain(tmp_path / "run", *options, "length=4").ok().tensors(0), {})
    run = pretrain(tmp_path / "run", *options, "length=20").ok()
    assert set(json.loads((run.folder / "plan.json").read_text())["waits"].values()) == {1}
    for step in range(2, 6):
        ours, before = run.tensors(step - 1), run.tensors(step - 2)
        assert not torch.equal(ours[f"state/{ENCODER}norm.weight"], before[f"state/{ENCODER}norm.weight"])


def test_other_weights_are_another_run(pretrain: Callable, waited, exported, tmp_path: Path) -> None:
    shutil.copytree(waited.folder, tmp_path / "run")
    before = contents(tmp_path / "run")
    run = pretrain(tmp_path / "run", *WAIT, "init.weights=/elsewhere", "init.head_warmup=2")
    refused(run, f"of another config (init.weights: {exported.folder} -> /elsewhere; init.head_warmup: 6 -> 2)")
    assert contents(tmp_path / "run") == before


def test_another_run_is_resumed_with_its_weights(pretrain: Callable, waited, exported, tmp_path: Path) -> None:
    shutil.copytree(waited.folder, tmp_path / "other")
    for step in range(4, 11):
        shutil.rmtree(tmp_path / f"other/checkpoints/step_{step:08}")
    run = pretrain(tmp_path / "run", *WAIT, f"init.weights={exported.folder}", f"init.resume={tmp_path}/other").ok()
    assert "from step 3" in run.out and equal_bits(run.tensors(2), load_file(exported.folder / "export/encoder.safetensors"))


def test_weights_for_other_images(pretrain: Callable, exported, tmp_path: Path) -> None:
    """Twice the image and patch size, grey: what was carried over is told, and the run is an ordinary one."""
    other = ("encoder.image_size=32", "encoder.patch_size=8", "encoder.channels=1", "data.mean=[0.5]", "data.std=[0.2]")
    run = pretrain(tmp_path / "run", f"init.weights={exported.folder}", *other, "encoder.registers=2", "length=3").ok()
    told = "patches of 4x4 pixels -> 8x8 (FlexiViT), 3 channels -> 1, fresh: register 1, register 2"
    assert f"encoder from {exported.folder}: {told}" in run.out
    assert json.loads((run.folder / "export/encoder.json").read_text())["encoder"]["patch_size"] == 8


def config_of(*overrides: str) -> PretrainConfig:
    return load(PretrainConfig, ROOT / "tests/tiny.yaml", ["run.dir=/nowhere", *overrides])


SOURCES: dict[str, Callable[[Path, Path], str]] = {
    "a run": lambda run, folder: str(run),
    "an export": lambda run, folder: str(run / "export"),
    "its file": lambda run, folder: str(run / "export/encoder.safetensors"),
    "timm": lambda run, folder: f"timm:{given_to('timm', run, folder)}",
    "transformers": lambda run, folder: f"hf:{given_to('transformers', run, folder)}",
}


def given_to(whom: str, run: Path, folder: Path) -> Path:
    assert tools(["export", str(run), str(folder / whom), "--to", whom]) == 0
    return folder / whom


@pytest.mark.parametrize("source", SOURCES)
def test_any_weights(exported, tmp_path: Path, source: str) -> None:
    config = config_of(f"init.weights={SOURCES[source](exported.folder, tmp_path)}")
    start, task = Start.open(config), build_task(config)
    start.require_fit(outline(lambda: build_task(config)).encoder, config.encoder)
    (said,) = start.fill(task.encoder, config)
    assert said.endswith(": every tensor as it is")
    for name, tensor in load_file(exported.folder / "export/encoder.safetensors").items():
        torch.testing.assert_close(task.encoder.state()[name], tensor, rtol=0, atol=1e-6, msg=name)


ONE_HEAD = ("encoder.arguments={embed_dim: 64, depth: 1, num_heads: 1}", "encoder.pos_resample=mae")


@pytest.fixture
def mae(tmp_path: Path) -> Path:
    """An official checkpoint of MAE, with its decoder."""
    task = build_task(config_of(*ONE_HEAD))
    decoder = {f"decoder_blocks.0.{name}": torch.ones(3) for name in ("norm1.weight", "norm1.bias")}
    state = task.encoder.state() | decoder | {"mask_token": torch.zeros(1, 1, 16)}
    torch.save({"model": state, "epoch": 1, "args": argparse.Namespace(lr=0.1)}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth"


def test_an_official_file_gives_its_encoder_but_not_its_decoder(mae: Path) -> None:
    config = config_of(f"init.weights={mae}", *ONE_HEAD, "data.mean=[0.5, 0.5, 0.5]")
    start, task = Start.open(config), build_task(config)
    start.require_fit(task.encoder, config.encoder)
    said = start.fill(task.encoder, config)
    assert said[0] == f"encoder from {mae}: 3 tensors beside it (heads, a decoder) not taken"
    assert said[1].startswith("warning: these weights were trained with data.mean=[0.485, 0.456, 0.406], and this run has [0.5")
    assert len(said) == 2 and torch.equal(task.encoder.state()["norm.weight"], torch.ones(64))


def test_the_section_that_a_message_names_is_the_one_that_fits(mae: Path, tmp_path: Path) -> None:
    """Copied into a file of the user's own, with the run's image size."""
    config = config_of(f"init.weights={mae}", "encoder.image_size=32")
    start = Start.open(config)
    with pytest.raises(CheckpointError, match=r"width 64 .* 24, depth 1 .* 2, heads 1 instead of 2; write  ") as caught:
        start.require_fit(outline(lambda: build_task(config)).encoder, config.encoder)
    (tmp_path / "own.yaml").write_text(str(caught.value).partition("; write  ")[2] + "\n")
    config = load(PretrainConfig, tmp_path / "own.yaml", [f"init.weights={mae}", "run.dir=/nowhere"])
    start.require_fit(outline(lambda: build_task(config)).encoder, config.encoder)
    assert config.encoder.image_size == 32 and config.encoder.positions == "sincos"


def broken(mae: Path, change: Callable[[dict], object]) -> Path:
    values = torch.load(mae, weights_only=False)
    change(values["model"])
    torch.save(values, mae)
    return mae


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a part of a checkpoint": (
        lambda mae: [f"init.weights={broken(mae, lambda state: state.pop('blocks.0.attn.proj.weight'))}", *ONE_HEAD],
        r"init.weights=.*mae.pth: these weights do not fit .*: 1 missing \(blocks.0.attn.proj.weight\)",
    ),
    "a damaged file": (
        lambda mae: [f"init.weights={mae if mae.write_bytes(mae.read_bytes()[:999]) else ''}", *ONE_HEAD],
        r"init.weights=.*mae.pth: .*is damaged or no checkpoint",
    ),
    "of no known code": (
        lambda mae: [f"init.weights={broken(mae, lambda state: state.update(surprise=torch.ones(1)))}", *ONE_HEAD],
        r"init.weights=.*mae.pth is of none of the known formats .*vitssl import  takes them",
    ),
    "no file": (lambda mae: ["init.weights=/none/mae.pth"], r"init.weights=/none/mae.pth: /none/mae.pth does not exist"),
    "no run": (lambda mae: ["init.weights=/none"], r"init.weights=/none: /none/encoder.safetensors does not exist; give a run"),
    "a tag that timm has not": (lambda mae: ["init.weights=timm:vit_odd"], r"init.weights=timm:vit_odd: timm .* cannot load"),
    "learned positions for fixed ones": (
        lambda mae: [f"init.weights={broken(mae, lambda state: state['pos_embed'].add_(1))}", *ONE_HEAD],
        r"init.weights=.*: the positions of these weights are not the fixed table .*take encoder.positions=learned",
    ),
    "an encoder that is unknown": (
        lambda mae: [f"init.weights={mae}", "encoder.name=vit_tiny_patch61_224"],
        r"encoder.name='vit_tiny_patch61_224': timm .* has no such model; .*vit_tiny_patch16_224",
    ),
    "an image that patches do not divide": (
        lambda mae: [f"init.weights={mae}", *ONE_HEAD, "encoder.image_size=18"], r"encoder.image_size 18x18 is not divisible"
    ),
    "statistics of other channels": (
        lambda mae: [f"init.weights={mae}", *ONE_HEAD, "encoder.channels=1"], r"data.mean has 3 and data.std 3 values for"
    ),
    "nothing to wait for": (
        lambda mae: ["init.head_warmup=5%"],
        r"init.head_warmup='5%': is for weights that were given, and init.weights names none; leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_begun_with(mae: Path, case: str) -> None:
    argv, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        config = config_of(*argv(mae))
        start = Start.open(config)
        start.require_fit(outline(lambda: build_task(config)).encoder, config.encoder)
        start.fill(build_task(config).encoder, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wait", ["20", "100%", "3ep"])
def test_a_wait_as_long_as_the_run(pretrain: Callable, exported, tmp_path: Path, wait: str) -> None:
    run = pretrain(tmp_path / "run", f"init.weights={exported.folder}", f"init.head_warmup={wait}")
    refused(run, f"init.head_warmup={wait}: the encoder would wait for {22 if wait == '3ep' else 20}", "the run has 20, so")
    assert not (tmp_path / "run").exists()
