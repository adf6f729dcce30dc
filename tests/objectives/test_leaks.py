"""An encoder whose patches overlap shows what is masked: objectives that hide patches refuse it, the others train on it."""

import copy
from typing import Any

import pytest
import torch
from contract import CASES, CLOCK, batch, teacher_of

from vitssl.errors import ConfigError
from vitssl.models.encoder import Encoder
from vitssl.objectives import create, find
from vitssl.objectives.mixture import Mixture

STEMS = {
    "t2t": {"name": "vit_tiny_patch16_224", "stem": "t2t", "image_size": 32},
    "hybrid": {"name": "vit_tiny_r_s16_p8_224", "image_size": 32},
}


def fitting(settings: Any, *, side: int) -> Any:
    """Settings of a case, its small crops of the size of a patch."""
    if not isinstance(settings, dict):
        return settings
    return {key: side if key == "local_size" else fitting(value, side=side) for key, value in settings.items()}


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("case", CASES)
def test_masks_are_refused_and_nothing_else(case: str, stem: str) -> None:
    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = Encoder.create(**copy.deepcopy(STEMS[stem]), arguments=arguments)
    chosen = fitting(CASES[case].objectives, side=encoder.spec.patch[0])
    hiding = [name for name in chosen if find(name).hides]
    if hiding:
        with pytest.raises(ConfigError, match=rf"objectives.{hiding[0]} masks patches, and this encoder's stem") as caught:
            create(hiding[0], chosen[hiding[0]], encoder.spec)
        assert "\n" not in str(caught.value)
        return
    parts = {name: create(name, own, encoder.spec, teacher=teacher_of(own)) for name, own in chosen.items()}
    task = Mixture(encoder, parts, mean=(0.5,) * 3, std=(0.25,) * 3).train()
    loss, _ = task(batch(task, num=4), CLOCK)
    loss.backward()
    stems = [parameter.grad for parameter in encoder.vit.patch_embed.parameters()]
    assert torch.isfinite(loss) and all(grad is not None and torch.isfinite(grad).all() for grad in stems)


def test_both_kinds_of_method_are_there() -> None:
    hides = {name: find(name).hides for case in CASES.values() for name in case.objectives}
    assert hides["mae"] and hides["can"] and hides["ibot"] and not hides["dino"] and not hides["simclr"]
