"""Eva and Beit as every stage takes them: masked autoencoding, fine-tuning in each mode, layer decay."""

import pytest
import torch

from vitssl.errors import ConfigError
from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead
from vitssl.objectives import create
from vitssl.objectives.classify import Classify
from vitssl.objectives.mixture import Mixture
from vitssl.schedule import Clock
from vitssl.sections import OptimConfig
from vitssl.task import Batch
from vitssl.train.optim import build_optimizer, group_parameters
from vitssl.views import View

CLOCK = Clock(step=0, total=10, samples=0, seed=7)
STATISTICS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
EVAS = ["vit_small_patch16_dinov3", "eva02_base_patch14_224", "vit_small_patch16_rope_mixed_ape_224"]


def encoder(name: str) -> Encoder:
    torch.manual_seed(0)
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    settings = {"image_size": 16, "patch_size": 4, "registers": None, "class_token": None}
    return Encoder.create(name, **settings, weights_init="mae", arguments=arguments)


def batch(view: View) -> Batch:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch({view: images}, torch.arange(4), labels=torch.arange(4))


def mae(name: str) -> tuple[Mixture, Batch]:
    body = encoder(name)
    objective = create("mae", {"decoder": {"dim": 16, "depth": 1, "heads": 2}}, body.spec)
    return Mixture(body, {"mae": objective}, **STATISTICS).train(), batch(objective.views()["image"])


@pytest.mark.parametrize("name", EVAS)
def test_masked_autoencoding_learns(name: str):
    task, images = mae(name)
    optimizer = build_optimizer(task, OptimConfig(weight_decay=0.0), lr=1e-2, device=torch.device("cpu"))
    losses = []
    for _ in range(3):
        loss, _ = task(images, CLOCK)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in task.encoder.parameters())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_masked_autoencoding_asks_for_another_encoder_than_beit():
    with pytest.raises(ConfigError, match=r"objectives.mae leaves patches out, and a Beit's relative positions"):
        mae("beit_base_patch16_224")


@pytest.mark.parametrize("mode, blocks", [("full", None), ("partial", 1), ("linear", None)])
@pytest.mark.parametrize("name", [*EVAS, "beit_base_patch16_224"])
def test_fine_tuning_covers_every_parameter_and_moves_what_the_mode_says(name: str, mode: str, blocks: int | None):
    body = encoder(name)
    norm = body.drop_norm() if mode != "linear" else False
    head = ClassificationHead(24, 4, pooling="mean", norm=norm, init="trunc_normal", std=0.5)
    task = Classify(body, head, **STATISTICS, mode=mode, blocks=blocks, layer_decay=0.5).train()
    wanted = {"full": ("encoder.", "head."), "partial": ("encoder.vit.blocks.1.", "head."), "linear": ("head.",)}[mode]
    expected = {key for key, _ in task.named_parameters() if key.startswith(wanted)}
    groups = group_parameters(task)
    assert {key for group in groups for key in group.names} == expected
    task(batch(View(size=(16, 16))), CLOCK)[0].backward()
    assert {key for key, parameter in task.named_parameters() if parameter.grad is not None} == expected
    assert [part.training for part in body.vit.children() if part is not body.vit.blocks and part is not body.vit.norm] == [
        mode == "full"
    ] * (len(list(body.vit.children())) - 2)
    rules = {key: (group.rule.lr_scale, group.rule.weight_decay) for group in groups for key in group.names}
    early = {"cls_token", "reg_token", "pos_embed", "rope.freqs"} & body.state().keys()
    if mode == "full":
        assert early and all(rules[f"encoder.vit.{key}"] == (0.125, 0.0) for key in early)
        assert rules["encoder.vit.patch_embed.proj.weight"] == (0.125, 1.0)
    if mode != "linear":
        assert all(rules[key][0] == 0.5 for key in rules if key.startswith("encoder.vit.blocks.1."))
        vectors = {"gamma_1", "attn.q_bias", "attn.q_proj.bias", "norm1.weight"} & {
            key.removeprefix("blocks.1.") for key in body.state()
        }
        assert all(rules[f"encoder.vit.blocks.1.{key}"][1] == 0.0 for key in vectors) and len(vectors) >= 2
