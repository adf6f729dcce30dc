"""DINO against the official implementation: losses, gradients, centres, a multi-crop pass, two epochs; and what it refuses."""

import pytest
import torch
from official_crops import SPEC, START, Golden, close, of_logits, official_task, ours, restart, temperature, views_of
from torch import Tensor

from vitssl import dist
from vitssl.errors import ConfigError
from vitssl.models.spec import EncoderSpec
from vitssl.objectives import create
from vitssl.objectives.dino import DINO, TemperatureConfig
from vitssl.schedule import Clock
from vitssl.train.optim import group_parameters

GOLDEN = Golden("dino")
EPOCH = GOLDEN.config["epoch"]
WARMTH = temperature(float(GOLDEN.outputs["teacher_temp_schedule"][EPOCH]))


def by_sample(rows: Tensor, crops: int) -> Tensor:
    return rows.unflatten(0, (crops, -1)).transpose(0, 1)


def two_steps(rows: slice) -> list[list[Tensor]]:
    """[loss, gradient of the student, centre after it] of both steps, of these samples."""
    objective, found = of_logits("dino", 20, {"teacher_temperature": WARMTH}), []
    for step in range(2):
        student = by_sample(GOLDEN.given("loss_student", step), 6)[rows].requires_grad_()
        teacher = by_sample(GOLDEN.given("loss_teacher", step), 2)[rows]
        loss, _ = objective.compare({"crops": student}, {"teacher": teacher}, START)
        loss.backward()
        objective.after_step(START, 1.0)
        gradient = student.grad.transpose(0, 1).flatten(0, 1)
        found.append([loss.detach(), gradient, objective.centre.centre.clone()[None]])
    return found


def half() -> list[list[Tensor]]:
    return two_steps(slice(2 * dist.rank(), 2 * dist.rank() + 2))


@pytest.mark.parametrize("processes", [1, 2])
def test_losses_gradients_and_centres_of_two_steps(processes: int, gang):
    answers = [two_steps(slice(None))] if processes == 1 else gang(2)(half)
    for rank, answer in enumerate(answers):
        for step, found in enumerate(answer):
            name = f"loss.step{step}" if processes == 1 else f"loss_2proc.rank{rank}.step{step}"
            for value, kind in zip(found, ("loss", "grad_student", "center"), strict=True):
                close(value, GOLDEN.outputs[f"{name}.{kind}"], 1e-12)


def test_a_multi_crop_pass_and_every_gradient():
    task = official_task(GOLDEN, "dino", {"teacher_temperature": WARMTH})
    objective = task.objectives["dino"]
    views = views_of(GOLDEN, GOLDEN.inputs["global_crops"], GOLDEN.inputs["local_crops"])
    rows, teacher = objective.embed(task._nets, views, None)["crops"], objective.targets(task._nets, views, None)["teacher"]
    close((rows @ objective.head.last_layer().T).transpose(0, 1).flatten(0, 1), GOLDEN.outputs["model.student_out"])
    prototypes = objective.teacher_head.average.last_layer()
    close((teacher @ prototypes.T).transpose(0, 1).flatten(0, 1), GOLDEN.outputs["model.teacher_out"])
    loss, metrics = objective(task._nets, views, START, None)
    close(loss, GOLDEN.outputs["model.loss"])
    loss.backward()
    objective.after_step(START, 1.0)
    close(objective.centre.centre[None], GOLDEN.outputs["model.center"])
    own = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.requires_grad}
    for name, expected in GOLDEN.under("model_grad/").items():
        close(own.pop(ours(name, "dino")), expected)
    assert not own and torch.equal(metrics["loss"], loss.detach())


def test_all_crops_go_through_the_encoder_together():
    task = official_task(GOLDEN, "dino", {})
    seen = []

    def see(module, given, doors):
        seen.append([tuple(images.shape) for images in (*given, *doors.get("others", ()))])

    for encoder in (task.encoder, task.teacher.average):
        encoder.vit.register_forward_pre_hook(see, with_kwargs=True)
    views = views_of(GOLDEN, GOLDEN.inputs["global_crops"], GOLDEN.inputs["local_crops"])
    task.objectives["dino"](task._nets, views, START, None)
    assert seen == [[(8, 3, 16, 16), (16, 3, 8, 8)], [(8, 3, 16, 16)]]


def test_two_epochs_of_the_official_loop():
    """With its schedules, clipping of each tensor, and a last layer that waits for an epoch."""
    own = GOLDEN.config["train"]
    task = official_task(GOLDEN, "dino", {"head": {"fixed_norm": False}})
    restart(task)
    objective, named = task.objectives["dino"], {n: p for n, p in task.named_parameters() if p.requires_grad}
    matrices = [p for n, p in named.items() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": [p for p in named.values() if p.ndim <= 1]}])
    for step in range(4):
        epoch, groups = step // own["iters"], optimizer.param_groups
        groups[0]["weight_decay"], groups[1]["weight_decay"] = float(GOLDEN.outputs["train.wd"][step]), 0.0
        for group in groups:
            group["lr"] = float(GOLDEN.outputs["train.lr"][step])
        warmth = TemperatureConfig(**temperature(float(GOLDEN.outputs["teacher_temp_schedule"][epoch])))
        objective.config = objective.config.model_copy(update={"teacher_temperature": warmth})
        views = views_of(GOLDEN, GOLDEN.inputs["train_global"][step], GOLDEN.inputs["train_local"][step])
        loss, _ = objective(task._nets, views, START, None)
        close(loss, GOLDEN.outputs["train.loss"][step], 1e-9)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in named.items():
            parameter.grad *= min(1.0, GOLDEN.config["clip"] / (float(parameter.grad.norm()) + 1e-6))
            if "last_layer" in name and epoch < GOLDEN.config["freeze_last_layer"]:
                parameter.grad = None
        optimizer.step()
        momentum = float(GOLDEN.outputs["train.m"][step])
        task.teacher.update(momentum)
        objective.after_step(START, momentum)
    close(objective.centre.centre[None], GOLDEN.outputs["train.center"], 1e-9)
    found = dict(task.named_parameters())
    for who in ("student", "teacher"):
        for name, expected in GOLDEN.under(f"train_{who}/").items():
            close(found[ours(f"{who}.{name}", "dino")], expected, 1e-8)


def test_temperatures_are_the_official_tables():
    """DINO's table has a number an epoch and reaches its peak in the last of the warm-up, DINOv2's one an iteration: one
    epoch or iteration sooner than ours, which has the peak when the warm-up is over."""
    dino, dinov2 = GOLDEN.config["loss"], Golden("dinov2")
    settings = {"start": dino["warmup_teacher_temp"], "peak": dino["teacher_temp"]}
    ours = TemperatureConfig(**settings, warmup=10 * (dino["warmup_teacher_temp_epochs"] - 1))
    found = [ours.at(Clock(10 * epoch, 10 * dino["nepochs"], 0, 0)) for epoch in range(dino["nepochs"])]
    assert found == pytest.approx(GOLDEN.outputs["teacher_temp_schedule"].tolist(), rel=1e-12)
    per_epoch, teacher = dinov2.config["sched"]["train"]["OFFICIAL_EPOCH_LENGTH"], dinov2.config["sched"]["teacher"]
    settings = {"start": teacher["warmup_teacher_temp"], "peak": teacher["teacher_temp"]}
    ours = TemperatureConfig(**settings, warmup=per_epoch * teacher["warmup_teacher_temp_epochs"] - 1)
    table = dinov2.outputs["sched.teacher_temp"].tolist()
    assert [ours.at(Clock(step, len(table), 0, 0)) for step in range(len(table))] == pytest.approx(table, rel=1e-12)
    share = TemperatureConfig(start=0.04, peak=0.07, warmup="10%")
    assert share.at(Clock(15, 300, 0, 0)) == pytest.approx(0.055) and share.at(Clock(30, 300, 0, 0)) == 0.07


def test_momentum_is_the_official_table():
    table = GOLDEN.outputs["sched.momentum_official_defaults"].tolist()
    schedule = DINO.momentum.over(len(table))
    assert [schedule.at(step) for step in range(len(table))] == pytest.approx(table, rel=1e-12)


def test_parameter_groups_are_the_official_ones():
    task = official_task(GOLDEN, "dino", {"head": {"fixed_norm": False}})
    decays = {name: p.ndim > 1 for name, p in task.named_parameters() if p.requires_grad}
    groups = GOLDEN.tables["param_groups"]
    expected = {ours(name, "dino"): kind == "regularised" for kind in groups for name in groups[kind]}
    assert decays == expected
    found = {group.rule.name: (group.names, group.rule) for group in group_parameters(task)}
    for name, (names, rule) in found.items():
        assert rule.weight_decay == float(decays[names[0]]), name
    frozen = [name for names, rule in found.values() if rule.waits for name in names]
    assert sorted(frozen) == sorted(ours(name, "dino") for name in GOLDEN.tables["parameters_without_gradient_after_cancel"])
    assert {str(rule.waits) for _, rule in found.values() if rule.waits} == {"1ep"}


def test_the_losses_of_held_out_images_are_of_one_temperature():
    objective = of_logits("dino", 6, {"teacher_temperature": {"start": 0.04, "peak": 0.07, "warmup": 8}})
    rows = torch.randn(2, 3, 6).double()
    losses = [objective.compare({"crops": rows}, {"teacher": rows[:, :2]}, Clock(step, 10, 0, 0))[0] for step in (0, 8)]
    assert losses[0] != losses[1]
    objective.eval()
    found = [objective.compare({"crops": rows}, {"teacher": rows[:, :2]}, Clock(step, 10, 0, 0))[0] for step in (0, 8)]
    assert torch.equal(*found)


def test_metrics_tell_a_collapsed_teacher():
    """One prototype for all; no choice at all; and each image its own."""
    objective, crops = of_logits("dino", 6, {}), torch.randn(6, 3, 6).double()
    same, even, own = (
        torch.zeros(6, 2, 6).double(),
        torch.zeros(6, 2, 6).double(),
        torch.eye(6).double()[:, None].repeat(1, 2, 1),
    )
    same[..., 3] = 5.0
    found = [objective.compare({"crops": crops}, {"teacher": teacher}, START)[1] for teacher in (same, even, own)]
    assert [float(metrics["entropy"]) for metrics in found] == pytest.approx([0, 1, 0], abs=1e-6)
    assert [float(metrics["usage"]) for metrics in found] == pytest.approx([1, 6, 6], abs=1e-6)


def test_views_differ_as_the_official_ones():
    views = create("dino", {}, EncoderSpec(16, 2, 2, (16, 16), (14, 14), 1)).views()
    assert list(views) == ["first", "second", *(f"local_{index}" for index in range(8))]
    assert [views[name].photometric.blur for name in ("first", "second", "local_3")] == [1.0, 0.1, 0.5]
    assert [views[name].photometric.solarize for name in ("first", "second", "local_3")] == [0.0, 0.2, 0.0]
    assert views["second"].scale == (0.4, 1.0) and views["local_7"].scale == (0.05, 0.4) and views["local_7"].size == (96, 96)
    assert len({view.purpose for view in views.values()}) == 10


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"koleo_group": 4}, "objectives.dino.koleo_group=4 would change nothing: koleo is 0"),
        (
            {"centre_momentum": 0.5, "centring": "sinkhorn"},
            "objectives.dino.centre_momentum=0.5 would change nothing: centring",
        ),
        ({"crops": {"local_size": 10}}, "objectives.dino.crops.local_size: images of 10x10 is not divisible"),
        ({"teacher_temperature": {"warmup": "30ep"}}, "does not know how long an epoch is; write a share of the run"),
        ({"crops": {"num_local": -1}}, "objectives.dino.crops.num_local"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        create("dino", {"head": {"prototypes": 4}} | settings, SPEC)


def test_an_encoder_without_a_class_token_is_refused():
    with pytest.raises(ConfigError, match=r"dino is about the class token, .* has none; set encoder.class_token=true"):
        create("dino", {}, EncoderSpec(16, 2, 2, (4, 4), (4, 4), 0, class_token=False))


def test_groups_that_do_not_divide_a_batch_are_refused():
    objective = of_logits("dino", 6, {"koleo": 0.1, "koleo_group": 4})
    objective.check_batch(8)
    with pytest.raises(ConfigError, match="koleo_group=4 does not divide a batch of 6 images"):
        objective.check_batch(6)
    rows, tokens = torch.randn(6, 3, 6).double(), torch.randn(6, 2, 16).double()
    objective.eval().compare({"crops": rows, "tokens": tokens}, {"teacher": rows[:, :2]}, START)


def test_small_crops_that_an_encoder_does_not_serve_are_refused():
    fixed = EncoderSpec(16, 2, 2, (4, 4), (4, 4), 1, any_size=False)
    with pytest.raises(ConfigError, match=r"crops.local_size: images of 8x8, and this Beit's .* are laid out for 16x16 alone"):
        create("dino", {"crops": {"local_size": 8}}, fixed)
    create("dino", {"crops": {"local_size": 16}}, fixed)
    create("dino", {"crops": {"num_local": 0}}, fixed)
