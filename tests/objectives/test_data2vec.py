"""data2vec for images against the official implementation: the teacher's blocks, targets, gradients, three steps."""

import re

import pytest
import torch
import torch.nn.functional as F
from official_numbers import Golden, beit, close
from torch import Tensor

from vitssl.errors import ConfigError
from vitssl.losses.regression import smooth_l1
from vitssl.models.encoder import Encoder
from vitssl.objectives import create
from vitssl.objectives.base import Nets
from vitssl.objectives.data2vec import Data2Vec
from vitssl.objectives.mixture import Mixture
from vitssl.schedule import Schedule

OFFICIAL = Golden("data2vec")
CONFIG = OFFICIAL.config
IMAGES, MASKS = OFFICIAL.inputs["imgs"].double(), OFFICIAL.inputs["masks"].flatten(2)
NOT_OURS = ("relative_position_index", "teacher.mask_token", "teacher.lm_head.weight", "teacher.lm_head.bias")
HEAD = {"mask_token": "student.mask_token", "predict.weight": "student.lm_head.weight", "predict.bias": "student.lm_head.bias"}


def official() -> tuple[Mixture, Data2Vec]:
    """The tiny official model with its weights, in float64."""
    encoder = beit(CONFIG, bias=False)
    assert CONFIG["target_layers"] == [1, 2] and CONFIG["layer_results"] == "end"
    settings = {"blocks": 2, "norm_average": False, "beta": CONFIG["l1_beta"], "mask_ratio": 0.5, "min_block": 1}
    objective = create("data2vec", settings, encoder.spec)
    task = Mixture(encoder, {"data2vec": objective}, mean=(0.5,) * 3, std=(0.5,) * 3)
    own = parameters(task)
    for name, value in OFFICIAL.weights.items():
        if not name.endswith(NOT_OURS):
            own.pop(name).data.copy_(value)
    assert not own
    return task.double(), objective


def parameters(task: Mixture) -> dict[str, torch.nn.Parameter]:
    """By their official names."""
    found = {f"student.{name}": p for name, p in task.encoder.vit.named_parameters()}
    found |= {f"teacher.{name}": p for name, p in task.teacher.average.vit.named_parameters()}
    return found | {HEAD[name]: p for name, p in task.objectives["data2vec"].named_parameters()}


def compared(task: Mixture, step: int) -> tuple[Tensor, Tensor]:
    return task.objectives["data2vec"].compared(Nets(task.encoder, task.teacher), IMAGES[step], MASKS[step])


def test_blocks_targets_predictions_and_every_gradient():
    task, objective = official()
    for index, block in enumerate(task.teacher(IMAGES[0], last_blocks=3).blocks):
        close(block.patches, OFFICIAL.outputs[f"step0.teacher_block{index}"], 1e-9)
    pred, target = compared(task, 0)
    close(target.flatten(0, 1), OFFICIAL.outputs["step0.targets"], 1e-9)
    close(pred.flatten(0, 1), OFFICIAL.outputs["step0.predictions"], 1e-9)
    loss = smooth_l1(pred, target, beta=objective.config.beta)
    close(loss, OFFICIAL.outputs["losses"][0], 1e-9)
    loss.backward()
    own = parameters(task)
    for name, expected in OFFICIAL.below("step0_grad/").items():
        close(own[f"student.{name}"].grad, expected, 1e-9)
    assert all(p.grad is None for p in task.teacher.parameters())


def test_three_steps():
    """AdamW with one group of parameters, as the official run of these numbers; the teacher moves after each step."""
    task, objective = official()
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=CONFIG["lr"], weight_decay=CONFIG["wd"])
    ema = CONFIG["ema"]
    rising = Schedule(ema["decay_init"], final=ema["decay"], total=ema["start_at"], shape="linear")
    for step in range(CONFIG["steps"]):
        loss = smooth_l1(*compared(task, step), beta=objective.config.beta)
        close(loss, OFFICIAL.outputs["losses"][step], 1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.teacher.update(rising.at(min(step, ema["start_at"] - 1)))  # the end itself comes with the next epoch
    own = parameters(task)
    for name, expected in OFFICIAL.below("final_teacher/").items():
        if not f"teacher.{name}".endswith(NOT_OURS):
            close(own[f"teacher.{name}"], expected, 1e-9)


def test_the_average_is_normalised_once_more():
    task, objective = official()
    nets = Nets(task.encoder, task.teacher)
    plain = objective.features(nets, IMAGES[0])
    objective.config = objective.config.model_copy(update={"norm_average": True})
    close(objective.features(nets, IMAGES[0]), F.layer_norm(plain, (CONFIG["dim"],)), 1e-12)


def test_masks_have_the_paper_s_number():
    """120 of 196, always: the official generator's are shorter at times (tests/masks/test_blocks.py)."""
    objective, seen = create("data2vec", {"blocks": 1}, Encoder.create("test_vit", image_size=56, patch_size=4).spec), []
    objective.compared = lambda nets, images, mask: (seen.append(mask), (torch.zeros(1), torch.zeros(1)))[1]
    objective(None, {"image": torch.empty(0)}, None, lambda name, num, host: torch.rand(64, num, dtype=torch.float64))
    assert set(seen[0].sum(dim=1).tolist()) == {120}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"blocks": 9}, "objectives.data2vec.blocks=9: the encoder has 6"),
        ({"mask_ratio": 0.01, "blocks": 1}, "mask_ratio=0.01 masks 0 of 16 patches; some must be masked and some be left"),
        ({"mask_ratio": 0.99, "blocks": 1}, "mask_ratio=0.99 masks 16 of 16 patches"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str):
    spec = Encoder.create("test_vit", image_size=16, patch_size=4, arguments={"depth": 6}).spec
    with pytest.raises(ConfigError, match=re.escape(message)):
        create("data2vec", settings, spec)
