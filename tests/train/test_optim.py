"""Parameter rules: each parameter under exactly one, named where not; what MAE's code decays; what reaches the optimiser."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vitssl.errors import ConfigError
from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead
from vitssl.objectives.classify import Classify
from vitssl.sections import OptimConfig
from vitssl.task import Rule, decay_rules
from vitssl.train.optim import MOMENTS, build_optimizer, clip_each, clip_modules, covers, group_parameters, set_rates

GOLDEN = Path(__file__).parents[1] / "golden"
TABLES = json.loads((GOLDEN / "mae" / "tables.json").read_text())
CPU = torch.device("cpu")
ALL = {"weight": (2, 3), "bias": (3,), "token": (1, 1, 3)}

REFUSED = [
    ([Rule("matrices", ".*", vectors=False)], "parameter bias is covered by no rule; each needs exactly one"),
    ([], "parameter weight is covered by no rule"),
    ([Rule("a", ".*"), Rule("b", "to.*")], r"parameter token is covered by 2 rules \(a, b\); each needs exactly one"),
    ([Rule("a", ".*"), Rule("b", ".*"), Rule("c", "w.*")], r"parameter weight is covered by 3 rules \(a, b, c\)"),
    ([Rule("a", "weight"), Rule("a", "bias|token")], "two parameter rules are called a; each needs a name of its own"),
    ([Rule("a", "weight|bias|toke")], "parameter token is covered by no rule"),  # patterns stand for whole names
]


@pytest.mark.parametrize("rules, message", REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_not_exactly_one_rule(rules: list[Rule], message: str, ruled: type):
    with pytest.raises(ConfigError, match=message):
        group_parameters(ruled(ALL, rules))


@pytest.mark.parametrize(
    "name, shape, vectors, expected",
    [
        ("a.weight", (2, 2), None, True),
        ("a.weight", (2, 2), False, True),
        ("a.weight", (2, 2), True, False),
        ("norm.weight", (2,), True, True),
        ("norm.weight", (2,), False, False),
        ("a.bias", (2, 2), True, True),
        ("scale", (), True, True),
        ("token", (1, 1, 2), True, False),
    ],
)
def test_what_a_vector_is(name: str, shape: tuple[int, ...], vectors: bool | None, expected: bool):
    assert covers(Rule("it", ".*", vectors=vectors), name, nn.Parameter(torch.zeros(shape))) == expected


def test_groups_stand_in_the_order_of_the_rules_and_frozen_parameters_in_none(ruled: type):
    task = ruled(ALL | {"frozen": (5,)}, [Rule("none", "nothing"), *decay_rules(lr_scale=0.5)])
    task.frozen.requires_grad_(False)
    groups = group_parameters(task)
    assert [(group.rule.name, group.names, group.size) for group in groups] == [
        ("decay", ("weight", "token"), 9),
        ("no_decay", ("bias",), 3),
    ]
    optimizer = build_optimizer(task, OptimConfig(), lr=1.0, device=CPU)
    assert not any(parameter is task.frozen for group in optimizer.param_groups for parameter in group["params"])


def test_rules_and_config_reach_the_optimiser(ruled: type):
    rules = [Rule("a", "weight", lr_scale=0.25, weight_decay=2.0), Rule("b", "bias|token", weight_decay=0.0)]
    task = ruled(ALL, rules)
    config = OptimConfig(weight_decay=0.1, betas=(0.8, 0.7), eps=1e-5)
    optimizer = build_optimizer(task, config, lr=0.3, device=CPU)
    assert type(optimizer) is torch.optim.AdamW
    found = {group["rule"]: (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {"a": (0.25, 0.2), "b": (1.0, 0.0)}
    assert all((group["betas"], group["eps"]) == ((0.8, 0.7), 1e-5) for group in optimizer.param_groups)
    assert [parameter is task.weight for parameter in optimizer.param_groups[0]["params"]] == [True]
    set_rates(optimizer, lr=0.4, weight_decay=0.2)
    assert {group["rule"]: group["lr"] for group in optimizer.param_groups} == {"a": 0.1, "b": 0.4}
    assert {group["rule"]: group["weight_decay"] for group in optimizer.param_groups} == {"a": 0.4, "b": 0.0}


def test_pretraining_decays_what_mae_decays(small_mae: Callable):
    """Also cls_token and mask_token, which are no vectors; fixed positions are in no group."""
    task = small_mae(dim=24, decoder=(16, 2, 4))
    optimizer = build_optimizer(task, OptimConfig(weight_decay=0.05), lr=1.0, device=CPU)
    names = {parameter: official(name) for name, parameter in task.named_parameters()}
    found = {group["weight_decay"]: {names[parameter] for parameter in group["params"]} for group in optimizer.param_groups}
    expected = {group["weight_decay"]: set(group["names"]) for group in TABLES["pretrain_param_groups"]}
    assert found == expected
    assert {"cls_token", "mask_token"} <= found[0.05]


def official(name: str) -> str:
    """A parameter of ours in MAE's own code."""
    name = name.removeprefix("encoder.vit.")
    name = re.sub(r"^objectives\.mae\.decoder\.(?!mask_token)", "decoder_", name)
    return name.removeprefix("objectives.mae.decoder.").replace("decoder_predict", "decoder_pred")


@pytest.mark.parametrize("pooling, table", [("mean", "layer_decay_tiny_global_pool"), ("class", "layer_decay_tiny_cls")])
def test_layer_decay_reaches_the_optimiser(pooling: str, table: str):
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    encoder = Encoder.create("vit_tiny_patch16_224", image_size=16, patch_size=4, arguments=arguments)
    norm = encoder.drop_norm() if pooling == "mean" else False
    head = ClassificationHead(24, 5, pooling=pooling, norm=norm)
    task = Classify(encoder, head, mean=(0.5,) * 3, std=(0.5,) * 3, layer_decay=0.75)
    optimizer = build_optimizer(task, OptimConfig(weight_decay=0.05), lr=1.0, device=CPU)
    set_rates(optimizer, lr=2.0, weight_decay=0.05)
    names = {parameter: name for name, parameter in task.named_parameters()}
    found = {
        names[parameter].removeprefix("encoder.vit."): [group["lr"] / 2, group["weight_decay"]]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected = {name: pair for name, pair in TABLES[table].items() if not name.startswith(("head.", "fc_norm."))}
    assert {name: pair for name, pair in found.items() if not name.startswith("head.")} == expected
    assert {tuple(pair) for name, pair in found.items() if name.startswith("head.")} == {(1.0, 0.05), (1.0, 0.0)}


def test_a_linear_probe_trains_only_its_head():
    arguments = {"embed_dim": 24, "depth": 1, "num_heads": 3}
    encoder = Encoder.create("vit_tiny_patch16_224", image_size=16, patch_size=8, arguments=arguments)
    head = ClassificationHead(24, 5, pooling="mean", norm=False)
    task = Classify(encoder, head, mean=(0.5,) * 3, std=(0.5,) * 3, mode="linear")
    names = {name for group in group_parameters(task) for name in group.names}
    assert names == {name for name, _ in task.named_parameters() if name.startswith("head.")} != set()


def test_each_gradient_is_clipped_as_dino_clips_it():
    clip = json.loads((GOLDEN / "dino/meta.json").read_text())["config"]["clip"]
    official = load_file(GOLDEN / "dino/outputs.safetensors")
    raw, clipped = (under(official, part) for part in ("model_grad/", "model_clipped_grad/"))
    assert list(raw) == list(clipped) and len(raw) == len(official["model.clip_norms"])
    names = [name for name in raw if not torch.equal(raw[name], clipped[name])]
    assert 3 < len(names) < len(raw), "some are clipped and some are not"
    clip_each(list(raw.values()), clip)
    for name, gradient in raw.items():
        torch.testing.assert_close(gradient, clipped[name], rtol=1e-12, atol=0)


def test_gradients_of_the_encoder_and_of_each_head_are_clipped_apart_as_dinov2_clips_them():
    names = {
        "encoder": ["encoder.vit.cls_token", "encoder.vit.blocks.0.attn.qkv.weight", "objectives.ibot.mask_token"],
        "head": ["objectives.ibot.head.mlp.0.weight", "objectives.ibot.head.last_layer.weight"],
        "patch_head": ["objectives.ibot.patch_head.last_layer.weight"],
        "decoder": ["objectives.mae.decoder.blocks.0.norm1.bias"],
    }
    generator = torch.Generator().manual_seed(0)
    sizes = {"encoder": 9.0, "head": 0.1, "patch_head": 4.0, "decoder": 2.0}
    raw = {name: size * torch.randn(7, generator=generator) for part, size in sizes.items() for name in names[part]}
    clipped = {name: gradient.clone() for name, gradient in raw.items()}
    clip_modules(clipped, 3.0)
    for part, own in names.items():
        norm = torch.cat([raw[name] for name in own]).norm()
        assert (norm > 3) == (part != "head"), part
        for name in own:
            torch.testing.assert_close(clipped[name], raw[name] * min(1.0, 3.0 / float(norm)), rtol=1e-5, atol=0)


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_by_a_slow_oracle(momentum: float, ruled: type):
    """Heavy-ball momentum, decay on the gradient, each rule with its own rate and decay."""
    rules = [Rule("a", "weight", lr_scale=0.5, weight_decay=1.0), Rule("b", "bias|token", weight_decay=0.0)]
    task = ruled(ALL, rules)
    config = OptimConfig(name="sgd", momentum=momentum, weight_decay=0.1)
    optimizer = build_optimizer(task, config, lr=0.3, device=CPU)
    assert type(optimizer) is torch.optim.SGD
    generator = torch.Generator().manual_seed(0)
    for parameter in task.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    expected = {name: [parameter.detach().clone().double(), 0.0] for name, parameter in task.named_parameters()}
    for step in range(4):
        lr = 0.4 / (step + 1)
        set_rates(optimizer, lr=lr, weight_decay=0.1)
        for name, parameter in task.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            weight, velocity = expected[name]
            decay, scale = (0.1, 0.5) if name == "weight" else (0.0, 1.0)
            velocity = momentum * velocity + parameter.grad.double() + decay * weight
            expected[name] = [weight - lr * scale * velocity, velocity]
        optimizer.step()
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name][0], rtol=1e-5, atol=1e-6)
        if momentum:
            velocity = optimizer.state[parameter][MOMENTS["sgd"][0]].double()
            torch.testing.assert_close(velocity, expected[name][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MOMENTS)
def test_the_moments_are_the_optimisers_own(name: str, ruled: type):
    """What a checkpoint holds is all that torch keeps: a name that torch changes is found here."""
    task = ruled({"weight": (2, 3)}, [Rule("all", ".*")])
    optimizer = build_optimizer(task, OptimConfig(name=name), lr=0.1, device=CPU)
    task.weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert set(optimizer.state[task.weight]) == {*MOMENTS[name], *(["step"] if name == "adamw" else [])}
