"""Rates and decay layer by layer: the official tables of MAE, DINO, DINOv2 and MoCo v3, in fine-tuning and in pretraining."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead
from vitssl.models.spec import EncoderSpec
from vitssl.objectives.base import Objective
from vitssl.objectives.classify import Classify
from vitssl.objectives.layerwise import layer_decay_rules
from vitssl.objectives.mixture import Mixture
from vitssl.schedule import Duration
from vitssl.task import Rule, Task, decay_rules
from vitssl.train.optim import covers, group_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
STATISTICS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
TABLES = {name: json.loads((GOLDEN / name / "tables.json").read_text()) for name in ("mae", "dino", "dinov2", "moco_v3")}
MAE = json.loads((GOLDEN / "mae/meta.json").read_text())["config"]


def encoder(depth: int = 2, **settings: Any) -> Encoder:
    more = {"embed_dim": 24, "depth": depth, "num_heads": 2} | settings.pop("arguments", {})
    return Encoder.create("vit_tiny_patch16_224", image_size=16, patch_size=4, arguments=more, **settings)


class Head(Objective):
    """What DINO, iBOT and DINOv2 have beside the encoder: a mask token and a head whose last layer has rules of its own."""

    def __init__(self, spec: EncoderSpec, *, ruled: bool = True) -> None:
        super().__init__(Objective.Config(), spec)
        self.mask_token = nn.Parameter(torch.zeros(1, spec.dim))
        self.mlp = nn.Sequential(nn.Linear(spec.dim, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        shapes = {"weight_g": (12, 1), "weight_v": (12, 8)}
        self.last_layer = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
        self.ruled = ruled

    def views(self) -> dict:
        return {}

    def param_rules(self) -> list[Rule]:
        last = r"last_layer\..*"
        return [Rule("last_layer", last, waits=Duration(1, "ep")), *decay_rules(f"(?!{last}$).*")] if self.ruled else []


def mixture(body: Encoder, *, ruled: bool = True, **settings: Any) -> Mixture:
    return Mixture(body, {"it": Head(body.spec, ruled=ruled)}, **STATISTICS, **settings)


def scales(task: Task) -> dict[str, tuple[float, float]]:
    """Parameter -> (share of the rate, share of the decay)."""
    return {name: (group.rule.lr_scale, group.rule.weight_decay) for group in group_parameters(task) for name in group.names}


@pytest.mark.parametrize("table", [key for key in TABLES["mae"] if key.startswith("layer_decay")])
def test_layer_decay_equals_mae(table: str) -> None:
    depth = 12 if "vit_base" in table else MAE["depth"]
    rules = layer_decay_rules(depth, MAE["ft"]["layer_decay"], prefix="")
    for name, (lr_scale, weight_decay) in TABLES["mae"][table].items():
        shape = (3,) if name.endswith(".bias") or "norm" in name else (3, 3)
        (rule,) = [each for each in rules if covers(each, name, nn.Parameter(torch.zeros(shape)))]
        assert rule.lr_scale == pytest.approx(lr_scale, rel=1e-14)
        assert rule.weight_decay * MAE["ft"]["wd"] == weight_decay


DECAYED = {  # of a matrix, a token, a vector
    "all": (1.0, 1.0, 1.0),
    "matrices": (1.0, 1.0, 0.0),
    "layers": (1.0, 0.0, 0.0),
}


@pytest.mark.parametrize("decay", DECAYED)
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_what_decays(decay: str, layer_decay: float) -> None:
    """In fine-tuning and in pretraining, with and without layer decay; of the heads' parameters too."""
    rates = {"layer_decay": layer_decay, "decay": decay, "patch_lr": 0.1}
    head = ClassificationHead(24, 5, pooling="class", norm=False)
    tuned = scales(Classify(encoder(registers=1), head, **STATISTICS, **rates))
    for found in (tuned, scales(mixture(encoder(registers=1), **rates)), scales(mixture(encoder(registers=1), decay=decay))):
        share = tuple(found[f"encoder.vit.{name}"][1] for name in ("blocks.0.mlp.fc1.weight", "cls_token", "norm.weight"))
        assert share == DECAYED[decay]
        assert found["encoder.vit.pos_embed"][1] == found["encoder.vit.reg_token"][1] == DECAYED[decay][1]
        assert {found[name][1] for name in found if name.endswith(("mlp.0.bias", "head.bias"))} == {DECAYED[decay][2]}
    assert tuned["encoder.vit.patch_embed.proj.weight"][0] == pytest.approx(0.1 * layer_decay**3)
    assert tuned["encoder.vit.blocks.1.mlp.fc1.weight"][0] == layer_decay and tuned["head.head.weight"][0] == 1.0


@pytest.mark.parametrize("ruled", [True, False])
@pytest.mark.parametrize("waits", [None, Duration(3, "steps")])
def test_dinov2s_tables(ruled: bool, waits: Duration | None) -> None:
    """Every multiplier of the backbone, whose mask token is the objective's here, and of the head."""
    body = encoder(depth=3, registers=2, arguments={"init_values": 1e-5})
    task = mixture(body, ruled=ruled, layer_decay=0.9, patch_lr=0.2, waits=waits)
    found = scales(task)
    ours = {"register_tokens": "encoder.vit.reg_token", "mask_token": "objectives.it.mask_token"}
    backbone = {ours.get(name, f"encoder.vit.{name}"): row for name, row in TABLES["dinov2"]["param_groups_backbone"].items()}
    head = {f"objectives.it.{name}": row for name, row in TABLES["dinov2"]["param_groups_dino_head"].items()}
    assert found.keys() == {**backbone, **head}.keys()
    for name, row in {**backbone, **head}.items():
        assert found[name] == pytest.approx((row["lr_multiplier"], row["wd_multiplier"]), rel=1e-12), name
    held = {name for group in group_parameters(task) if group.rule.waits for name in group.names}
    last = {name for name, row in head.items() if row["is_last_layer"] and ruled}
    assert held == last | (set() if waits is None else backbone.keys() - {"objectives.it.mask_token"})


def test_dinos_groups() -> None:
    found = scales(mixture(encoder()))
    groups = TABLES["dino"]["param_groups"]
    for group, share in (("regularised", 1.0), ("not_regularised", 0.0)):
        for name in groups[group]:
            own = name.replace("backbone.", "encoder.vit.").replace("head.", "objectives.it.")
            assert found.pop(own) == (1.0, share), name
    assert list(found) == ["objectives.it.mask_token"]


def test_moco_v3_decays_everything_that_trains() -> None:
    body = encoder(depth=1)
    task = mixture(body, decay="all")
    trained = [name for name, trains in TABLES["moco_v3"]["requires_grad"].items() if trains and "base_encoder" in name]
    found = scales(task)
    assert {found[name.replace("base_encoder.", "encoder.vit.")] for name in trained if ".head." not in name} == {(1.0, 1.0)}
    assert {share for _, share in found.values()} == {1.0}


def test_plain_pretraining_is_one_pair() -> None:
    """Nothing of the names that a plan shows has changed."""
    names = [group.rule.name for group in group_parameters(mixture(encoder(), ruled=False))]
    assert names == ["decay", "no_decay"]
    names = [group.rule.name for group in group_parameters(mixture(encoder(), ruled=False, layer_decay=0.9))]
    assert "encoder.block1.decay" in names and len(set(names)) == len(names)
