"""The ViT paper's patch prediction: against a slow oracle that corrupts embeddings, not pixels."""

import re

import pytest
import torch
import torch.nn.functional as F

from vitssl.draws import uniform
from vitssl.errors import ConfigError
from vitssl.masks.corrupt import corrupt
from vitssl.models.encoder import Encoder
from vitssl.objectives import create
from vitssl.objectives.base import Nets
from vitssl.objectives.mixture import Mixture
from vitssl.schedule import Clock
from vitssl.task import Batch

ARGUMENTS = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def encoder(**settings: object) -> Encoder:
    torch.manual_seed(0)
    given = {"image_size": (8, 12), "patch_size": 4, "arguments": ARGUMENTS} | settings
    return Encoder.create("vit_tiny_patch16_224", **given)


def test_loss_and_gradients_by_a_slow_oracle():
    """Embeddings are made first, then replaced one by one; colours are looked up one by one."""
    student = encoder().double()
    objective = create("patch_prediction", {}, student.spec).double()
    images = torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = uniform(0, 1, torch.arange(5), 18)
    noise[0, 6:12], noise[1, 6:12] = 0.85, 0.95  # one image's are swapped, another's kept
    nets = Nets(student, restore=lambda normalised: normalised * 0.5 + 0.25)
    loss, metrics = objective(nets, {"image": images}, None, lambda name, num: noise)
    loss.backward()
    own = {name: p.grad.clone() for part in (student, objective) for name, p in part.named_parameters()}
    assert own["vit.patch_embed.proj.weight"].abs().max() > 0
    student.zero_grad()
    objective.zero_grad()

    vit, errors, right = student.vit, [], 0
    places, masked, source = corrupt(noise, 3)
    assert masked.any() and (source != torch.arange(6)).any()
    embeddings = vit.patch_embed(images)
    assert embeddings.shape == (5, 6, 16)
    for b in range(5):
        rows = [objective.mask_token[0, 0] if masked[b, n] else embeddings[b, source[b, n]] for n in range(6)]
        x = torch.cat([vit.cls_token[0], torch.stack(rows)]) + vit.pos_embed[0]
        x = vit.norm(vit.blocks(x[None]))[0, 1:]
        for n in places[b].tolist():
            cut = images[b, :, 4 * (n // 3) : 4 * (n // 3) + 4, 4 * (n % 3) : 4 * (n % 3) + 4] * 0.5 + 0.25
            red, green, blue = (int(channel.mean() * 8) for channel in cut)
            logits = objective.colour(x[n])
            errors.append(F.cross_entropy(logits, torch.tensor(64 * red + 8 * green + blue)))
            right += int(logits.argmax()) == 64 * red + 8 * green + blue
    expected = sum(errors) / 15
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert metrics["accuracy"].item() == pytest.approx(right / 15)
    expected.backward()
    for part in (student, objective):
        for name, p in part.named_parameters():
            torch.testing.assert_close(own[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_colours_are_those_of_the_pixels_before_they_were_normalised():
    """Black, grey and white images, whatever the statistics; the head then says so at once."""
    student = encoder(image_size=8)
    objective = create("patch_prediction", {"corrupted": 1.0}, student.spec)
    with torch.no_grad():
        objective.colour.weight.zero_()
        objective.colour.bias.copy_(torch.arange(512))
    task = Mixture(student, {"patch_prediction": objective}, mean=(0.1, 0.5, 0.8), std=(0.2, 0.3, 0.4))
    (view,) = task.views
    for level, accuracy in ((255, 1.0), (224, 1.0), (223, 0.0), (0, 0.0)):
        batch = Batch({view: torch.full((2, 3, 8, 8), level, dtype=torch.uint8)}, torch.arange(2))
        _, metrics = task(batch, Clock(0, 1, 0, 0))
        assert metrics["patch_prediction/accuracy"].item() == accuracy


@pytest.mark.parametrize(
    "settings, spec, message",
    [
        ({"bits": 6}, {}, "objectives.patch_prediction.bits=6 of 3 channels are 262,144 colours, and at most 65,536"),
        ({}, {"channels": 6}, "bits=3 of 6 channels are 262,144 colours"),
        ({"corrupted": 0.01}, {}, "objectives.patch_prediction.corrupted=0.01 of 6 patches: one must be"),
        ({}, {"image_size": 4}, "objectives.patch_prediction.corrupted=0.5 of 1 patches: one must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, spec: dict, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        create("patch_prediction", settings, encoder(**spec).spec)
