"""The mixture: weights, shared views, draws by name, rules, and what it refuses; the table of methods."""

import re

import pytest
import torch
from contract import CASES, Case, build, teacher_of
from contract import batch as whole
from torch import nn

from vitssl.data.augment import Normalize
from vitssl.errors import ConfigError
from vitssl.models.encoder import Encoder
from vitssl.objectives import TABLE, configure, create, find, names
from vitssl.objectives.base import Objective
from vitssl.objectives.health import tokens_of
from vitssl.objectives.mixture import Mixture
from vitssl.schedule import Clock, Schedule
from vitssl.task import Batch, Rule
from vitssl.views import View

VIEW = View(size=(16, 16), scale=(0.2, 1.0))
CLOCK = Clock(step=3, total=10, samples=12, seed=5)


class Probe(Objective):
    """Remembers what it was given; its loss is its own scale."""

    def __init__(self, config, spec, view: View = VIEW):
        super().__init__(config, spec)
        self.view = view
        self.scale = nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))

    def views(self):
        return {"it": self.view}

    def forward(self, nets, views, clock, draw):
        self.seen, self.noise = views["it"], draw("noise", 5)
        return self.scale.mean() + 0 * nets.student(views["it"]).patches.sum(), {"scale": self.scale.detach().mean()}


class RuledProbe(Probe):
    def param_rules(self):
        return [Rule("all", "scale|bias", lr_scale=0.5, weight_decay=0.0)]


class TaughtProbe(Probe):
    momentum = Schedule(0.9, final=1.0)


class OtherTaughtProbe(Probe):
    momentum = Schedule(0.99, final=1.0)


def encoder() -> Encoder:
    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    return Encoder.create("vit_tiny_patch16_224", image_size=16, patch_size=8, arguments=arguments)


def mixture(momentum: Schedule | None = None, **objectives: Objective) -> Mixture:
    return Mixture(encoder(), objectives, momentum=momentum, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def probe(kind: type[Probe] = Probe, *, weight: float = 1.0, view: View = VIEW) -> Probe:
    return kind(Probe.Config(weight=weight), encoder().spec, view)


def batch(*views: View, positions: tuple[int, ...] = (9, 2)) -> Batch:
    images = torch.arange(len(positions) * 3 * 256).reshape(len(positions), 3, 16, 16).to(torch.uint8)
    return Batch(dict.fromkeys(views, images), torch.tensor(positions))


def test_losses_are_weighted_and_metrics_named():
    task = mixture(a=probe(weight=2.0), b=probe(weight=0.25))
    loss, metrics = task(batch(VIEW), CLOCK)
    assert loss.item() == pytest.approx(2.25)
    assert set(metrics) == {"a/scale", "b/scale"}
    loss.backward()
    torch.testing.assert_close(task.objectives["b"].scale.grad, torch.full((2, 2), 0.0625))


def test_a_weight_can_change_along_the_run():
    """Linear from start to peak, then by half a cosine to final; held-out losses are of the peak throughout."""
    moving = {"start": 0.5, "peak": 2.0, "warmup": "20%", "final": 1.0}
    task = mixture(a=Probe(configure("mae", {"weight": moving}), encoder().spec))
    expected = {0: 0.5, 1: 1.25, 2: 2.0, 6: 1.5, 10: 1.0}
    found = {step: task(batch(VIEW), Clock(step, 10, 0, 5))[0].item() for step in expected}
    assert found == pytest.approx(expected)
    assert task.eval()(batch(VIEW), Clock(0, 1, 0, 5))[0].item() == pytest.approx(2.0)
    constant = configure("mae", {"weight": {"peak": 3, "warmup": "4"}}).weight
    assert [constant.at(Clock(step, 100, 0, 0)) for step in (0, 2, 4, 99)] == [0, 1.5, 3, 3]
    assert configure("mae", {"weight": 0.25}).weight.at(CLOCK) == 0.25


@pytest.mark.parametrize(
    "weight, message",
    [
        ("much", r"objectives.mae.weight.peak='much': input should be a valid number"),
        (-1, r"objectives.mae.weight.peak=-1: input should be greater than or equal to 0"),
        ({"paek": 1}, r"objectives.mae.weight.paek: unknown key; did you mean weight.peak"),
        ({"warmup": "3ep"}, r"objectives.mae.weight=.*is a share of the run \(10%\) or steps, and warmup=3ep counts epochs"),
        ({"start": 0.5}, r"start=0.5 is for a warm-up, and warmup is 0; give it, as warmup=10%"),
        ({"shape": "linear"}, r"shape is of the way to final, which is not given"),
    ],
)
def test_weights_that_say_nothing_are_refused(weight, message: str):
    with pytest.raises(ConfigError, match=message):
        configure("mae", {"weight": weight})


def test_equal_views_are_one_tensor():
    other = View(size=(16, 16), scale=(0.3, 1.0))
    task = mixture(a=probe(), b=probe(), c=probe(view=other))
    assert task.views == {VIEW, other}
    samples = batch(VIEW, other)
    task(samples, CLOCK)
    a, b, c = (task.objectives[name].seen for name in "abc")
    assert a is b
    assert c is not a
    torch.testing.assert_close(a, Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4], channels=3)(samples.views[VIEW]))


def test_draws_belong_to_the_objective_and_the_sample():
    alone, both = mixture(a=probe()), mixture(z=probe(), a=probe())
    alone(batch(VIEW), CLOCK)
    both(batch(VIEW, positions=(2, 50, 9)), CLOCK)
    first, second = alone.objectives["a"].noise, both.objectives["a"].noise
    assert torch.equal(first, second[[2, 0]])
    assert not torch.equal(second, both.objectives["z"].noise)


def test_draws_on_the_host_ask_for_no_position_on_a_device():
    shown = batch(VIEW, positions=(9, 50))
    there = Batch(shown.views, torch.empty(2, dtype=torch.int64, device="meta"), host=shown.positions)
    found = Mixture.draw("a", there, CLOCK)("noise", 5, host=True)
    assert torch.equal(found, Mixture.draw("a", shown, CLOCK)("noise", 5))


def test_what_is_embedded_twice_is_the_same_under_stochastic_depth(monkeypatch: pytest.MonkeyPatch):
    """Whichever objectives stand before it: the gradients are carried through the passes that were compared."""
    parts = {name: CASES[name].objectives[name] for name in ("mae", "simclr")}
    monkeypatch.setitem(CASES, "dropped", Case(parts, encoder={"drop_path": 0.5}))
    task = build("dropped").train()
    torch.manual_seed(1)
    with torch.no_grad():
        embedded, _ = task(whole(task), CLOCK, phase="embed")
    given = {key: torch.zeros_like(rows, requires_grad=True) for key, rows in embedded.items()}
    torch.manual_seed(1)
    task(whole(task), CLOCK, phase="carry", given=given)[0].backward()
    for key, rows in embedded.items():
        torch.testing.assert_close(given[key].grad, rows, msg=key)
    torch.manual_seed(2)
    with torch.no_grad():
        others, _ = task(whole(task), CLOCK, phase="embed")
    assert any(not torch.allclose(others[key], rows) for key, rows in embedded.items())


def test_every_parameter_has_one_rule():
    task = mixture(plain=probe(), ruled=probe(RuledProbe))
    for name, parameter in task.named_parameters():
        vector = parameter.ndim <= 1 or name.endswith(".bias")
        rules = [rule for rule in task.param_rules() if re.fullmatch(rule.pattern, name) and rule.vectors in (None, vector)]
        assert len(rules) == 1, (name, rules)
        ruled = name.startswith("objectives.ruled.")
        assert (rules[0].name, rules[0].lr_scale) == (("ruled.all", 0.5) if ruled else (rules[0].name, 1.0))
    names = [rule.name for rule in task.param_rules()]
    assert len(names) == len(set(names))


def test_features_come_through_the_same_door():
    task, other = mixture(a=probe()), View(size=(16, 16))
    features, metrics = task(batch(other), CLOCK, features="mean")
    assert (features.shape, metrics) == ((2, 16), {})


def test_statistics_are_not_part_of_the_state():
    assert not {"mean", "std"} & set(mixture(a=probe()).state_dict())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mixture(), "needs at least one"),
        (
            lambda: mixture(a=probe(TaughtProbe), b=probe(OtherTaughtProbe)),
            r"one teacher serves the run.*objectives.a 0.9 to 1, objectives.b 0.99 to 1\); set teacher.momentum",
        ),
        (lambda: mixture(Schedule(0.9), a=probe()), "teacher: none of a looks at one; leave it out"),
        (lambda: Mixture(encoder(), {"a": probe()}, mean=(0.5,), std=(0.5,)), "1 and data.std 1 values for encoder.channels=3"),
        (lambda: find("mea"), "objectives.mea: no such objective; did you mean mae"),
        (lambda: create("qqq", {}, encoder().spec), "known are .*mae"),
    ],
)
def test_what_cannot_run_is_refused(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", names())
def test_the_table_holds_objectives_with_working_defaults(name: str):
    kind = find(name)
    assert issubclass(kind, Objective)
    settings = {"teacher": {"name": "tokens"}} if kind.taught else {}
    assert kind.Config(**settings).weight.peak == 1.0
    assert TABLE[name].startswith("vitssl.objectives.")
    teacher = teacher_of(settings)
    with torch.device("meta"):
        spec = Encoder.create("vit_small_patch16_224", image_size=224).spec
        objective = create(name, settings, spec, teacher=teacher)
    assert all(isinstance(view, View) for view in objective.views().values())


def test_one_teacher_serves_the_run_and_follows_its_schedule():
    task = mixture(Schedule(0.5, final=1.0), a=probe(TaughtProbe), b=probe(OtherTaughtProbe))
    assert task.judged is task.encoder
    with torch.no_grad():
        before = {name: value.clone() for name, value in task.encoder.named_parameters()}
        for parameter in task.encoder.parameters():
            parameter += 1.0
    task.after_step(Clock(step=5, total=10, samples=0, seed=0))
    for name, value in task.teacher.average.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.25)  # momentum 0.75 half way
    task.restart()
    assert all(torch.equal(value, dict(task.encoder.named_parameters())[name]) for name, value in
               task.teacher.average.named_parameters())  # fmt: skip


def test_health_keeps_nothing_of_the_encoder_for_a_backward_pass():
    own, images = encoder(), torch.randn(2, 3, 16, 16)
    kept = []
    with torch.no_grad(), tokens_of(own) as tokens:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            found = [*own.together([images, images[..., :8, :8]]), own(images, last_blocks=1)]
        assert kept == [] and torch.is_grad_enabled()
        sum(each.patches.square().sum() for each in found).backward()
        assert len(tokens) == 4 and all(each.is_leaf for each in tokens)
    assert not any(parameter.grad is not None for parameter in own.parameters())
    assert [each.grad is not None for each in tokens] == [True, True, True, False]  # nobody asked for the block
    assert own(images).patches.requires_grad
