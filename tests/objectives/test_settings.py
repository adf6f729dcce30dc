"""What a method is told: a default that is written out is still that default, and presets are what they say."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.config import PretrainConfig
from vitssl.config import build, flat, load
from vitssl.objectives import find, names

NEEDED = {"distill": {"teacher": {"name": "vit_tiny_patch16_224"}}}
SMALL = Path(__file__).parents[2] / "configs/pretrain/small"
UNBLURRED = [path for path in sorted(SMALL.glob("*.yaml")) if "no blur" in path.read_text().replace("\n# ", " ")]


def nested(key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: nested(rest, value) if rest else value}


@pytest.mark.parametrize("name", names())
def test_it_is_called_as_configs_call_it(name: str) -> None:
    assert find(name).name == name


@pytest.mark.parametrize("name", names())
def test_a_key_given_as_it_is_changes_nothing(name: str) -> None:
    model, needed = find(name).Config, NEEDED.get(name, {})
    plain = build(model, needed, where="here").model_dump()
    keys = {key: value for key, value in flat(plain).items() if key != "weight.shape" and key.partition(".")[0] not in needed}
    assert keys
    for key, value in keys.items():
        assert build(model, needed | nested(key, value), where="here").model_dump() == plain, key


@pytest.mark.parametrize("path", UNBLURRED, ids=lambda path: path.stem)
def test_a_small_preset_that_says_so_blurs_nothing(path: Path) -> None:
    config = load(PretrainConfig, path)
    (name,) = config.objectives
    settings = flat(build(find(name).Config, config.objectives[name], where=str(path)).model_dump())
    blurs = {key: value for key, value in settings.items() if key.endswith(".blur")}
    assert blurs and not any(blurs.values()), blurs
