"""What the shared sections refuse beyond the kind of a value: settings that would be passed over."""

from typing import Any

import pytest

from vitssl.config import build
from vitssl.errors import ConfigError
from vitssl.sections import OptimConfig

REFUSED = {
    "steps without places": ({"shape": "multistep"}, r"shape='multistep': falls at optim.milestones, and there"),
    "places without steps": ({"milestones": ["7ep"]}, r"shape='cosine': has no steps, and optim.milestones"),
    "a factor of no steps": ({"gamma": 0.5, "shape": "linear"}, r"shape='linear': has no steps, and optim.gamma"),
    "an end of a constant": ({"final_lr": 1e-6, "shape": "constant"}, r"shape='constant': never comes to optim.final_lr"),
    "an end of steps": (
        {"final_lr": 1e-6, "shape": "multistep", "milestones": [3]},
        r"shape='multistep': never comes to optim",
    ),
    "a start of no warm-up": (
        {"start_lr": 1e-6, "warmup": 0},
        r"start_lr=1e-06: is where a warm-up begins, and optim.warmup=0",
    ),
    "a way to clip nothing": ({"clip_by": "parameter"}, r"clip_by=.parameter.: says whose norm is bounded, and optim.clip"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_passed_over(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        optim(values)
    assert "\n" not in str(caught.value)


def optim(values: dict[str, Any]) -> OptimConfig:
    return build(OptimConfig, values, where="here")


SERVED = [
    {"shape": "multistep", "milestones": ["700ep", "5%"], "gamma": 0.5, "start_lr": 5e-7, "warmup": "10ep"},
    {"shape": "linear", "final_lr": 1e-6},
    {"clip": 3.0, "clip_by": "parameter"},
    {},
]


@pytest.mark.parametrize("values", SERVED, ids=str)
def test_what_is_written_down_is_read_back(values: dict[str, Any]) -> None:
    """A run's config.yaml holds every key, also those that were never given."""
    config = optim(values)
    assert optim(config.model_dump(mode="json")) == config
