"""Binary cross entropy: timm's numbers, ln 2 from a zero head, several labels at once, mixed by the weights of their images."""

import math

import pytest
import torch
from test_classify import CLASSES, batch, clock, task
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy

from vitssl.losses.classes import binary_cross_entropy
from vitssl.task import Batch


def several(samples: Batch) -> Batch:
    hot = torch.rand(len(samples), CLASSES, generator=torch.Generator().manual_seed(3)) < 0.4
    return Batch(samples.views, samples.positions, labels=hot)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_equals_timm(smoothing: float):
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 4, 2, 2, 3])
    expected = BinaryCrossEntropy(smoothing=smoothing)(logits, labels)
    torch.testing.assert_close(binary_cross_entropy(logits, labels, smoothing=smoothing), expected)


def test_a_slow_oracle():
    logits, hot = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4) < 0.5
    total = 0.0
    for row, own in zip(logits.tolist(), hot.tolist()):
        for logit, there in zip(row, own):
            p = 1 / (1 + math.exp(-logit))
            target = 0.8 * there + 0.2 / 4
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    assert float(binary_cross_entropy(logits, hot, smoothing=0.2)) == pytest.approx(total / 12, rel=1e-12)


@pytest.mark.parametrize("make", [batch, lambda: several(batch())], ids=["one", "several"])
def test_a_zero_head_begins_at_ln_2(make):
    model = task(loss="bce")
    loss, metrics = model(make(), clock())
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert set(metrics) == ({"top1"} if make is batch else set())
    loss.backward()
    assert all(not parameter.grad.any() for parameter in model.encoder.parameters())


def test_several_labels_mix_as_their_images():
    """Of hot rows with one label each the mixed targets are timm's own of the numbers."""
    samples = batch()
    hot = Batch(samples.views, samples.positions, labels=torch.nn.functional.one_hot(samples.labels, CLASSES).bool())
    mixups = [Mixup(0.8, 1.0, label_smoothing=0.0, num_classes=CLASSES) for _ in "ab"]
    models = [task(init="trunc_normal", loss="bce", mixup=mixup) for mixup in mixups]
    one, more = (model(each, clock(3))[0] for model, each in zip(models, (samples, hot)))
    torch.testing.assert_close(one, more)
    assert models[1].mixup.num_classes == CLASSES
    images = models[1].normalize(samples.views[next(iter(samples.views))])
    _, targets = models[1]._augment(images, several(samples).labels, clock(3))
    assert targets.shape == (4, CLASSES) and 0 < targets.max() <= 1 and not torch.equal(targets, targets.round())


def test_evaluation_of_several_is_their_loss_without_smoothing():
    model, samples = task("class", init="trunc_normal", loss="bce", smoothing=0.1).eval(), several(batch())
    with torch.no_grad():
        loss, metrics = model(samples, clock())
        logits, _ = model(samples, clock(), features="logits")
    torch.testing.assert_close(loss, torch.nn.functional.binary_cross_entropy_with_logits(logits, samples.labels.float()))
    assert metrics == {}
