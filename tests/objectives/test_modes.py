"""What fine-tuning trains: everything, the last blocks, the head alone; and the average of it."""

import pytest
import torch

from vitssl.errors import ConfigError
from vitssl.models.encoder import Encoder
from vitssl.models.heads import ClassificationHead
from vitssl.objectives.classify import Classify
from vitssl.schedule import Clock
from vitssl.task import Batch
from vitssl.train.optim import group_parameters
from vitssl.views import View

DEPTH, VIEW, CLOCK = 3, View(size=(16, 16)), Clock(step=0, total=10, samples=0, seed=7)


def task(mode: str = "full", blocks: int | None = None, *, pooling: str = "mean", **settings) -> Classify:
    torch.manual_seed(0)
    arguments = {"embed_dim": 24, "depth": DEPTH, "num_heads": 3, "pos_drop_rate": 0.5, "proj_drop_rate": 0.5}
    body = Encoder.create("vit_tiny_patch16_224", image_size=16, patch_size=4, drop_path=0.5, arguments=arguments)
    norm = body.drop_norm() if pooling == "mean" and mode != "linear" else False
    head = ClassificationHead(24, 5, pooling=pooling, norm=norm, init="trunc_normal", std=0.5)
    return Classify(body, head, mean=(0.5,) * 3, std=(0.25,) * 3, mode=mode, blocks=blocks, **settings)


def batch() -> Batch:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch({VIEW: images}, torch.arange(4), labels=torch.arange(4))


@pytest.mark.parametrize("pooling", ["mean", "class"])
@pytest.mark.parametrize("blocks", [1, 2, DEPTH])
def test_partial_trains_the_last_blocks_the_norm_and_the_head(blocks: int, pooling: str):
    model = task("partial", blocks, pooling=pooling, layer_decay=0.5).train()
    trained = [f"encoder.vit.blocks.{number}." for number in range(DEPTH - blocks, DEPTH)] + ["encoder.vit.norm.", "head."]
    expected = {name for name, _ in model.named_parameters() if name.startswith(tuple(trained))}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    model(batch(), CLOCK)[0].backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    groups = group_parameters(model)
    assert {name for group in groups for name in group.names} == expected
    scales = {name: group.rule.lr_scale for group in groups for name in group.names}
    assert scales["encoder.vit.blocks.2.attn.qkv.weight"] == 0.5  # as in full fine-tuning
    assert [stack.depth for stack in model.stacks()] == [blocks]


def test_what_is_frozen_stays_in_evaluation_mode():
    model = task("partial", 1).train()
    vit = model.encoder.vit
    assert [block.training for block in vit.blocks] == [False, False, True]
    assert not vit.patch_embed.training and not vit.pos_drop.training and model.head.training
    frozen = [vit.blocks[number](torch.ones(1, 2, 24)) for number in (0, 0)]
    assert torch.equal(*frozen)
    assert not any(module.training for module in model.eval().modules())


def test_before_it_is_told_a_linear_task_is_frozen_too():
    model = task("linear")
    assert model.training and not model.encoder.training


def test_partial_moves_nothing_below():
    model = task("partial", 1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model(batch(), CLOCK)[0].backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith(("encoder.vit.blocks.2.", "head.")) for name in moved)


REFUSED = {
    "no number": (
        {"mode": "partial"},
        "blocks: has no value, and mode=partial trains the last blocks of 3; give blocks=1 to 3",
    ),
    "too many": ({"mode": "partial", "blocks": 4}, "blocks: is 4, and mode=partial trains the last blocks of 3; give blocks=1"),
    "in full": ({"mode": "full", "blocks": 2}, "blocks=2: mode=full does not choose blocks; take mode=partial, or leave"),
    "in linear": ({"mode": "linear", "blocks": 2}, "blocks=2: mode=linear does not choose blocks"),
}


@pytest.mark.parametrize("settings, message", REFUSED.values(), ids=REFUSED)
def test_numbers_of_blocks_that_do_not_fit(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        task(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode, blocks", [("full", None), ("partial", 1), ("linear", None)])
def test_the_average_follows_encoder_and_head(mode: str, blocks: int | None):
    model = task(mode, blocks, ema=0.9).train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if not name.startswith("twin.")}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
    model.after_step(CLOCK)
    average = dict(model.twin.average.named_parameters())
    assert set(average) == set(start)
    for name, value in average.items():
        moved = dict(model.named_parameters())[name].requires_grad
        torch.testing.assert_close(value, start[name] + (0.1 if moved else 0.0), msg=name)
    encoder, head = model.judged
    assert encoder is model.twin.average["encoder"] and head is model.twin.average["head"]
    assert not any(name.startswith("twin.") for group in group_parameters(model) for name in group.names)


def test_logits_of_raw_and_averaged_weights():
    model, samples = task(ema=0.5).eval(), batch()
    images = (samples.views[VIEW].float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 1
        raw, nothing = model(samples, CLOCK, features="logits")
        averaged, _ = model(samples, CLOCK, features="averaged logits")
        torch.testing.assert_close(raw, model.head(model.encoder(images)))
        torch.testing.assert_close(averaged, model.twin.average["head"](model.twin.average["encoder"](images)))
    assert nothing == {} and not torch.allclose(raw, averaged)
    plain = task().eval()
    assert plain.twin is None and plain.judged == (plain.encoder, plain.head)
    plain.after_step(CLOCK)
