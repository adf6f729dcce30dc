"""LeJEPA against the official code: the statistic along one direction and many, the minimal example; and its own directions.

There the knots and their weights are kept in float32, here they are of the embeddings' precision: so to 3e-7 in float64.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitssl.errors import ConfigError
from vitssl.losses.agreement import squared_distance
from vitssl.losses.statistics import sigreg
from vitssl.models.spec import EncoderSpec
from vitssl.objectives import create
from vitssl.objectives.lejepa import LeJEPA, random_directions
from vitssl.schedule import Clock

GOLDEN = Path(__file__).parents[1] / "golden" / "lejepa"
META = json.loads((GOLDEN / "meta.json").read_text())["config"]
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs"))
SPEC = EncoderSpec(dim=8, depth=1, heads=2, patch=(4, 4), grid=(4, 4), prefix=1)
CLOCK = Clock(step=3, total=10, samples=0, seed=7)
INTEGRAL = {"reach": META["t_max"], "knots": META["n_points"]}


def given(name: str) -> Tensor:
    return INPUTS[name].double().requires_grad_()


def close(found: Tensor, expected: Tensor, tolerance: float = 3e-7) -> None:
    atol = tolerance * float(expected.abs().max())
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=atol)


def test_along_one_direction():
    rows = given("univariate")
    found = sigreg(rows[None], torch.eye(3), **INTEGRAL)
    close(found[0], OUTPUTS["univariate.stat"])
    found.sum().backward()
    close(rows.grad, OUTPUTS["univariate.grad"])


@pytest.mark.parametrize("step", [0, 1])
def test_along_many(step: int):
    rows = given("x")
    loss = sigreg(rows[None], OUTPUTS[f"sigreg.step{step}.directions"], **INTEGRAL).mean()
    close(loss, OUTPUTS[f"sigreg.step{step}.loss"])
    loss.backward()
    close(rows.grad, OUTPUTS[f"sigreg.step{step}.grad"])


def test_of_each_view_by_itself():
    close(sigreg(given("proj"), OUTPUTS["sigreg.step0.directions"], **INTEGRAL), OUTPUTS["sigreg.per_slice_3d"])


def test_the_minimal_example():
    views = given("proj")
    terms = {
        "sigreg": sigreg(views, OUTPUTS["minimal.directions"]).mean(),
        "invariance": squared_distance(views, views.mean(dim=0)),  # there all views are large
    }
    loss = META["lamb"] * terms["sigreg"] + (1 - META["lamb"]) * terms["invariance"]
    for name, found in (terms | {"loss": loss}).items():
        close(found, OUTPUTS[f"minimal.{name}"])
    loss.backward()
    close(views.grad, OUTPUTS["minimal.grad"])


def test_the_objective_is_the_example_with_small_views():
    """The centre is that of the large views, the directions are the step's."""
    config = LeJEPA.Config(directions=5, hidden=4, out=META["d"], crops={"num_local": 1, "local_size": 8})
    objective = LeJEPA(config, SPEC).train()
    objective.projector = nn.Identity()
    views = given("proj")
    loss, metrics = objective.compare(dict(zip(("first", "second", "local_0"), views)), {}, CLOCK)
    along = random_directions(META["d"], 5, CLOCK)
    prediction = ((views - (views[0] + views[1]) / 2) ** 2).mean()
    normality = sum(sigreg(view[None], along).mean() for view in views) / 3
    close(loss, (0.98 * prediction + 0.02 * normality).detach(), 1e-12)
    assert metrics.keys() == {"loss", "prediction", "sigreg"}


def test_directions_are_uniform_and_the_step_s():
    found = random_directions(4, 4000, CLOCK)
    torch.testing.assert_close(found.norm(dim=0), torch.ones(4000, dtype=torch.float64))
    assert found.mean(dim=1).abs().max() < 5 * 0.5 / 4000**0.5
    moments = found @ found.T / 4000  # the identity / 4, entries with a deviation below 0.25
    assert (moments - torch.eye(4) / 4).abs().max() < 5 * 0.25 / 4000**0.5
    assert (found**4).mean().item() == pytest.approx(3 / (4 * 6), rel=0.05)  # of a sphere, not of a cube
    assert torch.equal(found, random_directions(4, 4000, Clock(step=3, total=99, samples=5, seed=7)))
    for other in (Clock(step=4, total=10, samples=0, seed=7), Clock(step=3, total=10, samples=0, seed=8)):
        assert (random_directions(4, 4000, other) * found).sum(dim=0).abs().mean() < 0.5


def test_views_are_two_large_and_six_small():
    config = LeJEPA.Config(crops={"local_size": 8, "flip": 0.0})
    views = LeJEPA(config.model_copy(update={"hidden": 4}), SPEC).views()
    assert [view.size for view in views.values()] == [(16, 16)] * 2 + [(8, 8)] * 6
    assert {view.scale for view in views.values()} == {(0.3, 1.0), (0.05, 0.3)}
    assert {view.photometric.solarize for view in views.values()} == {0.2}, "what is not set stays LeJEPA's"
    assert len({view.purpose for view in views.values()}) == 8


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"crops": {"local_size": 10}}, r"objectives\.lejepa\.crops\.local_size: images of 10x10 is not divisible"),
        ({"knots": 1}, r"objectives\.lejepa\.knots.*greater than or equal to 2"),
        ({"normality": 1.5}, r"objectives\.lejepa\.normality.*less than or equal to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        create("lejepa", {"hidden": 4} | settings, SPEC)
