"""Fine-tuning: the zero head, MAE's two forwards, timm's classifier, layer decay, seeded mixing, evaluation."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from vitssl.errors import DataError
from vitssl.models.encoder import Encoder, Tokens
from vitssl.models.heads import ClassificationHead
from vitssl.objectives.classify import Classify, seeded
from vitssl.schedule import Clock
from vitssl.task import Batch
from vitssl.views import View

GOLDEN = Path(__file__).parents[1] / "golden" / "mae"
META = json.loads((GOLDEN / "meta.json").read_text())["config"]
TABLES = json.loads((GOLDEN / "tables.json").read_text())
WEIGHTS, INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("weights", "inputs", "outputs"))
VIEW = View(size=(16, 16))
CLASSES = 5


def clock(step: int = 0) -> Clock:
    return Clock(step=step, total=10, samples=0, seed=7)


def encoder(**settings) -> Encoder:
    arguments = {"embed_dim": META["dim"], "depth": META["depth"], "num_heads": META["heads"]}
    return Encoder.create("vit_tiny_patch16_224", image_size=16, patch_size=4, arguments=arguments, **settings)


def task(pooling: str = "mean", *, init: str = "zero", seed: int = 0, **settings) -> Classify:
    torch.manual_seed(seed)
    body = encoder()
    norm = body.drop_norm() if pooling == "mean" else False
    head = ClassificationHead(META["dim"], CLASSES, pooling=pooling, norm=norm, init=init, std=0.5)
    return Classify(body, head, mean=(0.5,) * 3, std=(0.25,) * 3, **settings)


def batch(size: int = 4, *, first: int = 0) -> Batch:
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(first))
    return Batch({VIEW: images}, torch.arange(first, first + size), labels=torch.arange(size) % CLASSES)


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_a_zero_head_starts_at_chance_and_leaves_the_encoder_alone(pooling: str):
    model = task(pooling)
    loss, metrics = model(batch(), clock())
    assert loss.item() == pytest.approx(math.log(CLASSES), rel=1e-6)
    assert set(metrics) == {"top1"}
    loss.backward()
    assert all(not parameter.grad.any() for parameter in model.encoder.parameters())
    assert model.head.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("classes", [2, 5, 1000])
def test_the_first_loss_is_ln_c_in_double(classes: int):
    body = encoder().double()
    head = ClassificationHead(META["dim"], classes, pooling="class", norm=False).double()
    loss = torch.nn.functional.cross_entropy(head(body(INPUTS["imgs"].double())), torch.tensor([0, 1, 1]))
    assert loss.item() == pytest.approx(math.log(classes), rel=1e-12)
    loss.backward()
    assert all(not parameter.grad.any() for parameter in body.parameters())


@pytest.mark.parametrize("pooling, case", [("mean", "global_pool"), ("class", "cls")])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_features_and_logits_equal_mae(pooling: str, case: str, dtype: torch.dtype, tolerance: float):
    body, weights = encoder(), {name: value for name, value in WEIGHTS.items() if not re.match("decoder|mask_token|ft", name)}
    body.load_state(weights)
    head = ClassificationHead(META["dim"], CLASSES, pooling=pooling, norm=pooling == "mean")
    if pooling == "mean":
        body.drop_norm()
    own = {name: WEIGHTS[f"ft.{name}"] for name in head.state()}
    head.load_state_dict(own)
    body, head = body.to(dtype), head.to(dtype)
    tokens = body(INPUTS["imgs"].to(dtype))
    for actual, key in ((head.features(tokens), "features"), (head(tokens), "logits")):
        expected = OUTPUTS[f"ft.{case}.{key}"]
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("pooling, norm", [("mean", True), ("mean", False), ("class", False), ("class", True)])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224"])  # CLIP: another epsilon
def test_encoder_and_head_are_a_timm_classifier(name: str, pooling: str, norm: bool):
    torch.manual_seed(0)
    body = Encoder.create(
        name, image_size=32, patch_size=8, registers=1, arguments={"embed_dim": 24, "depth": 2, "num_heads": 3}
    )
    head = ClassificationHead(24, 7, pooling=pooling, norm=body.drop_norm() if norm else False, init="trunc_normal", std=0.1)
    for parameter in (*body.parameters(), *head.parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)
    model = timm.create_model(body.architecture, **(body.arguments_with(head.arguments)))
    model.load_state_dict(body.state() | head.state(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(head.eval()(body.eval()(images)), model.eval()(images), rtol=0, atol=1e-5)


def test_an_encoder_without_its_norm_still_loads_into_timm():
    body = encoder()
    body.drop_norm()
    model = timm.create_model(body.architecture, **body.arguments)
    assert tuple(model.load_state_dict(body.state(), strict=True)) == ([], [])


def test_head_initialisation_and_pooling():
    torch.manual_seed(0)
    head = ClassificationHead(64, 50, pooling="mean", norm=True, init="trunc_normal", std=2e-5)
    assert head.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert not head.head.bias.any()
    norm = torch.nn.LayerNorm(64, eps=1e-3)
    norm.weight.data.fill_(3.0)
    taken = ClassificationHead(64, 50, pooling="mean", norm=norm).fc_norm
    assert taken.eps == 1e-3
    assert torch.equal(taken.weight, torch.ones(64))
    tokens = Tokens(torch.randn(2, 1, 64), torch.randn(2, 4, 64), class_token=False)  # a register alone
    assert head(tokens).shape == (2, 50)
    with pytest.raises(AssertionError):
        ClassificationHead(64, 50, pooling="class", norm=False)(tokens)


def test_smoothing_is_the_field_s():
    model, samples = task(init="trunc_normal", smoothing=0.1), batch()
    loss, _ = model(samples, clock())
    model.smoothing = 0.0
    hard, _ = model(samples, clock())
    images = (samples.views[VIEW].float() / 255 - 0.5) / 0.25
    logp = model.head(model.encoder(images)).log_softmax(-1)
    torch.testing.assert_close(loss, 0.9 * hard - 0.1 * logp.mean())


def test_mixup_equals_timm_with_its_own_smoothing():
    samples = batch()
    mixer, smooth = (Mixup(0.8, 1.0, label_smoothing=value, num_classes=CLASSES) for value in (0.0, 0.1))
    model = task(init="trunc_normal", mixup=mixer, smoothing=0.1)
    loss, metrics = model(samples, clock(3))
    assert metrics == {}
    reference = task(init="trunc_normal", mixup=smooth)
    torch.testing.assert_close(reference(samples, clock(3))[0], loss)


def test_mixing_and_erasing_are_a_function_of_seed_step_and_part():
    settings = {
        "mixup": Mixup(0.8, 1.0, label_smoothing=0.0, num_classes=CLASSES),
        "erasing": RandomErasing(0.9, mode="pixel", device="cpu"),
    }
    first, second = (task(init="trunc_normal", **settings) for _ in range(2))
    losses = [first(batch(), clock(step))[0].item() for step in (0, 0, 1)]
    state, torch_state = random.getstate(), torch.get_rng_state()
    np.random.seed(5)
    arrays = np.random.get_state()[1].copy()
    random.random()
    random.setstate(state)
    assert [second(batch(), clock(step))[0].item() for step in (0, 0, 1)] == losses
    assert len(set(losses)) == 3
    assert random.getstate() == state
    assert np.array_equal(np.random.get_state()[1], arrays)
    assert torch.equal(torch.get_rng_state(), torch_state)
    resumed = task(init="trunc_normal", **settings)
    assert resumed(batch(), clock(1))[0].item() == losses[2]


def test_generators_are_put_back_after_an_error():
    state, numpy_state = random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(RuntimeError), seeded(3, torch.device("cpu")):
        random.random()
        np.random.rand()
        raise RuntimeError
    assert random.getstate() == state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_linear_mode_trains_the_head_alone():
    model = task("class", init="trunc_normal", mode="linear")
    model.train()
    assert not model.encoder.training
    assert model.head.training
    model(batch(), clock())[0].backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.head.weight", "head.head.bias"}


def test_evaluation_changes_no_image_and_counts_hits():
    model = task("class", init="trunc_normal", smoothing=0.1, mixup=Mixup(num_classes=CLASSES)).eval()
    samples = batch(7)
    with torch.no_grad():
        loss, metrics = model(samples, clock())
        logits = model.head(model.encoder((samples.views[VIEW].float() / 255 - 0.5) / 0.25))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, samples.labels))
    torch.testing.assert_close(metrics["top1"], (logits.argmax(-1) == samples.labels).float().mean())
    assert metrics["top5"] == 1  # of five classes


def test_features_are_the_encoder_s():
    model, samples = task("class").eval(), batch(2)
    tokens = model.encoder((samples.views[VIEW].float() / 255 - 0.5) / 0.25)
    for pooling, expected in (("mean", tokens.patches.mean(1)), ("class", tokens.prefix[:, 0])):
        features, metrics = model(Batch(samples.views, samples.positions), clock(), features=pooling)
        torch.testing.assert_close(features, expected)
        assert metrics == {}


def test_samples_without_labels_and_odd_pairs_are_refused():
    samples = batch(3)
    with pytest.raises(DataError, match="no labels"):
        task()(Batch(samples.views, samples.positions), clock())
    with pytest.raises(DataError, match="this one has 3; make micro_batch even"):
        task(mixup=Mixup(num_classes=CLASSES))(samples, clock())
