"""Distillation: DeiT's two heads and its loss by the official numbers, and a teacher that nobody trains, counts or saves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.data import Mixup

from vitssl.losses.classes import distillation
from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead, DistilledHead, head_like
from vitssl.models.teacher import Teacher
from vitssl.objectives.classify import Classify
from vitssl.objectives.distilled import Distilled
from vitssl.schedule import Clock
from vitssl.task import Batch
from vitssl.train.optim import group_parameters
from vitssl.views import View

GOLDEN = Path(__file__).parents[1] / "golden" / "vit_variants"
META = json.loads((GOLDEN / "meta.json").read_text())["config"]["deit"]
WEIGHTS, INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("weights", "inputs", "outputs"))
VIEW, CLOCK, CLASSES = View(size=(16, 16)), Clock(step=0, total=10, samples=0, seed=7), META["classes"]


def deit() -> tuple[Encoder, DistilledHead]:
    """The official network's weights in an encoder whose one register is the distillation token."""
    arguments = {"embed_dim": META["dim"], "depth": META["depth"], "num_heads": META["heads"], "mlp_ratio": 2}
    body = Encoder.create("vit_tiny_patch16_224", image_size=META["img"], patch_size=4, registers=1, arguments=arguments)
    head = DistilledHead(META["dim"], CLASSES, pooling="class", norm=False)
    own = {name.removeprefix("deit."): value for name, value in WEIGHTS.items() if name.startswith("deit.")}
    own["reg_token"] = own.pop("dist_token")
    head.load_state_dict({name: own.pop(name) for name in head.state()})
    body.load_state(own)
    return body.double().eval(), head.double().eval()


class Brightness(torch.nn.Module):
    """A network whose answers are easily told: the mean of each channel twice over."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return torch.cat([images.mean((2, 3))] * 2, dim=1) * self.scale


def teacher(**settings) -> Teacher:
    return Teacher(Brightness(), **{"mean": (0.4,) * 3, "std": (0.2,) * 3, "size": (16, 16), "num_classes": CLASSES} | settings)


def task(kind: str = "soft", *, token: bool = True, alpha: float = 0.3, temperature: float = 3.0, **settings) -> Distilled:
    torch.manual_seed(0)
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    body = Encoder.create("vit_tiny_patch16_224", image_size=16, patch_size=4, registers=int(token), arguments=arguments)
    head = head_like({"distilled": token}, 24, CLASSES, pooling="class", norm=False, init="trunc_normal", std=0.5)
    taught = {"teacher": settings.pop("teacher", None) or teacher(), "kind": kind, "alpha": alpha, "temperature": temperature}
    return Distilled(body, head, mean=(0.5,) * 3, std=(0.25,) * 3, **taught, **settings)


def batch(size: int = 4) -> Batch:
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch({VIEW: images}, torch.arange(size), labels=torch.arange(size) % CLASSES)


def test_both_heads_equal_deit():
    body, head = deit()
    tokens = body(INPUTS["deit_img"].double())
    found = {"train_cls": head.both(tokens)[0], "train_dist": head.both(tokens)[1], "eval": head(tokens)}
    for name, value in found.items():
        torch.testing.assert_close(value, OUTPUTS[f"deit.{name}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("token", [True, False])
def test_the_loss_is_labels_and_teacher_by_alpha(kind: str, token: bool):
    model, samples = task(kind, token=token).train(), batch()
    loss, metrics = model(samples, CLOCK)
    pixels = samples.views[VIEW].float() / 255
    tokens = model.encoder((pixels - 0.5) / 0.25)
    own, other = model.head.both(tokens) if token else [model.head(tokens)] * 2
    answers = torch.cat([((pixels - 0.4) / 0.2).mean((2, 3))] * 2, dim=1) * 2
    base = torch.nn.functional.cross_entropy(own, samples.labels)
    kd = distillation(other, answers, kind=kind, temperature=3.0)
    torch.testing.assert_close(loss, 0.7 * base + 0.3 * kd)
    torch.testing.assert_close((metrics["labels"], metrics["teacher"]), (base.detach(), kd.detach()))
    assert set(metrics) == {"labels", "teacher", "agreement", "top1"}
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.head.parameters())


def test_labels_teach_one_head_and_the_teacher_the_other():
    for alpha, still in ((0.0, "head_dist.weight"), (1.0, "head.weight")):
        model = task(alpha=alpha).train()
        model(batch(), CLOCK)[0].backward()
        gradients = {name: parameter.grad.any() for name, parameter in model.head.named_parameters()}
        assert not gradients[still] and sum(map(bool, gradients.values())) == 2


def test_the_teacher_sees_the_mixed_images_once():
    mixing = Mixup(0.8, 1.0, label_smoothing=0.0, num_classes=CLASSES)
    model, plain = task(mixup=mixing).train(), task(mixup=mixing, token=False)
    _, metrics = model(batch(), CLOCK)
    (seen,) = model.companions()[0].network.seen
    wanted, _ = plain._augment(plain.normalize(batch().views[VIEW]), batch().labels, CLOCK)
    torch.testing.assert_close(seen * 0.2 + 0.4, wanted * 0.25 + 0.5)
    assert "top1" not in metrics and not torch.allclose(seen[:, 0], (batch().views[VIEW][:, 0] / 255 - 0.4) / 0.2)


def test_a_teacher_of_another_size_and_order():
    wide = teacher(size=(24, 32), columns=[3, 1, 2, 0, 5, 4])
    pixels = torch.rand(2, 3, 16, 16)
    answers = wide(pixels)
    (seen,) = wide.network.seen
    assert seen.shape == (2, 3, 24, 32)
    wanted = torch.nn.functional.interpolate(pixels, size=(24, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen, (wanted - 0.4) / 0.2)
    torch.testing.assert_close(answers, (torch.cat([seen.mean((2, 3))] * 2, dim=1) * 2)[:, [3, 1, 2, 0, 5, 4]])


def test_nobody_trains_counts_or_saves_the_teacher():
    model = task(ema=0.5).train()
    (own,) = model.companions()
    plain = Classify(model.encoder, model.head, mean=(0.5,) * 3, std=(0.25,) * 3, ema=0.5)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert not own.network.training and not own.network.scale.requires_grad
    assert sum(group.size for group in group_parameters(model)) == sum(group.size for group in group_parameters(plain))
    assert model.double().companions()[0].network.scale.dtype == torch.float64  # where the task goes it goes


def test_the_answer_is_the_mean_of_both_heads_everywhere():
    model, samples = task(ema=0.5).eval(), batch()
    with torch.no_grad():
        first, second = model.head.both(model.encoder(model.normalize(samples.views[VIEW])))
        for door in ("logits", "averaged logits"):
            torch.testing.assert_close(model(samples, CLOCK, features=door)[0], (first + second) / 2)
        loss, _ = model(samples, CLOCK)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy((first + second) / 2, samples.labels))


def test_mean_pooling_normalises_the_token_as_well():
    head = DistilledHead(8, 3, pooling="mean", norm=True, init="trunc_normal", std=0.5)
    body = Encoder.create("vit_tiny_patch16_224", image_size=16, patch_size=4, registers=2,
                          arguments={"embed_dim": 8, "depth": 1, "num_heads": 2})  # fmt: skip
    tokens = body(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(head.both(tokens)[1], head.head_dist(head.fc_norm(tokens.prefix[:, 2])))


def test_a_hidden_layer_is_the_papers():
    torch.manual_seed(0)
    head = ClassificationHead(400, 7, pooling="class", norm=False, hidden=300, init="trunc_normal", std=0.1)
    layer = head.pre_logits[0]
    assert layer.weight.std().item() == pytest.approx(400**-0.5, rel=0.01) and not layer.bias.any()
    assert head.head.in_features == 300 and head.beyond_timm == {"hidden": 300}
    body = Encoder.create("vit_tiny_patch16_224", image_size=16, patch_size=4,
                          arguments={"embed_dim": 400, "depth": 1, "num_heads": 2})  # fmt: skip
    tokens = body(torch.randn(2, 3, 16, 16))
    x = tokens.prefix[:, 0] @ layer.weight.T + layer.bias
    torch.testing.assert_close(head(tokens), torch.tanh(x) @ head.head.weight.T + head.head.bias)
    model = Classify(body, head, mean=(0.5,) * 3, std=(0.25,) * 3, layer_decay=0.5)
    scales = {name: group.rule.lr_scale for group in group_parameters(model) for name in group.names}
    assert scales["head.pre_logits.0.weight"] == scales["head.head.weight"] == 1.0
    assert ClassificationHead(8, 7, pooling="class", norm=False).beyond_timm == {}
