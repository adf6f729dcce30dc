"""What the shared sections refuse beyond the kind of a value: settings that would be passed over."""

from typing import Any

import pytest

from vitssl.config import build
from vitssl.errors import ConfigError
from vitssl.sections import OptimConfig

REFUSED = {
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
