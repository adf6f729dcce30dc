"""iBOT against the official implementation, DINOv2's centres, and the masks of both; and what they refuse."""

from pathlib import Path

import pytest
import torch
from official_crops import SPEC, START, Golden, close, of_logits, official_task, ours, temperature, views_of
from torch import Tensor

from vitssl import dist
from vitssl.draws import uniform
from vitssl.errors import ConfigError
from vitssl.interop.official import import_official
from vitssl.models.spec import EncoderSpec
from vitssl.objectives import create
from vitssl.views import purpose

GOLDEN, DINOV2 = Golden("ibot"), Golden("dinov2")
EPOCH = GOLDEN.config["epoch"]
WARMTH = {
    "teacher_temperature": temperature(float(GOLDEN.outputs["teacher_temp_schedule"][EPOCH])),
    "patch_teacher_temperature": temperature(float(GOLDEN.outputs["teacher_temp2_schedule"][EPOCH])),
}
MASKS = GOLDEN.inputs["masks"].flatten(2)  # [crop, B, N]


def two_steps(rows: slice) -> list[dict[str, Tensor]]:
    """What the official loss says, takes back and remembers in two steps of these samples; large crops crop by crop."""
    objective, found = of_logits("ibot", 18, WARMTH), []
    mask = MASKS[:, rows].flatten(0, 1)
    places = mask.flatten().nonzero()[:, 0]
    for step in range(2):
        inputs = {name: GOLDEN.given(f"l_{name}", step) for name in ("s_cls", "s_patch", "t_cls", "t_patch")}
        inputs = {name: value.unflatten(0, (2, 4))[:, rows].flatten(0, 1) for name, value in inputs.items()}
        local = GOLDEN.given("l_s_local", step).unflatten(0, (3, 4))[:, rows].flatten(0, 1).requires_grad_()
        large, patches = inputs["s_cls"].requires_grad_(), inputs["s_patch"].requires_grad_()
        crops = torch.cat([large.unflatten(0, (2, -1)), local.unflatten(0, (3, -1))]).transpose(0, 1)
        targets = {
            "teacher": inputs["t_cls"].unflatten(0, (2, -1)).transpose(0, 1),
            "teacher_patches": inputs["t_patch"].flatten(0, 1)[places],
            "weights": 1 / mask.sum(dim=1)[places // 16].double(),
            "seen": inputs["t_patch"].mean(dim=1),
        }
        loss, metrics = objective.compare({"crops": crops, "patches": patches.flatten(0, 1)[places]}, targets, START)
        loss.backward()
        objective.after_step(START, 1.0)
        found.append({"loss": loss.detach(), "cls": metrics["class"], "patch": metrics["patch"]})
        found[-1] |= {"grad_cls": large.grad, "grad_patch": patches.grad, "grad_local": local.grad}
        found[-1] |= {
            "center": objective.centre.centre.clone()[None],
            "center2": objective.patch_centre.centre.clone()[None, None],
        }
    return found


def half() -> list[dict[str, Tensor]]:
    return two_steps(slice(2 * dist.rank(), 2 * dist.rank() + 2))


@pytest.mark.parametrize("processes", [1, 2])
def test_losses_gradients_and_centres_of_two_steps(processes: int, gang):
    answers = [two_steps(slice(None))] if processes == 1 else gang(2)(half)
    compared = 0
    for rank, answer in enumerate(answers):
        for step, found in enumerate(answer):
            name = f"loss.step{step}" if processes == 1 else f"loss_2proc.rank{rank}.step{step}"
            for kind, expected in GOLDEN.under(f"{name}.").items():
                close(found[kind], expected, 1e-12)
                compared += 1
    assert compared == (16 if processes == 1 else 20)


def test_a_whole_pass_and_every_gradient():
    task = official_task(GOLDEN, "ibot", WARMTH | {"head": {"fixed_norm": False}})
    objective = task.objectives["ibot"]
    mask = MASKS.flatten(0, 1)
    places = mask.flatten().nonzero()[:, 0]
    objective._masks = lambda draw, device: (mask, places)
    views = views_of(GOLDEN, GOLDEN.inputs["global_crops"], GOLDEN.inputs["local_crops"])
    embedded, targets = objective.embed(task._nets, views, None), objective.targets(task._nets, views, None)
    prototypes, teacher = objective.head.last_layer(), objective.teacher_head.average.last_layer()
    crops = (embedded["crops"] @ prototypes.T).transpose(0, 1).flatten(0, 1)
    close(crops, torch.cat([GOLDEN.outputs["model.student_cls"], GOLDEN.outputs["model.student_local"]]))
    close(embedded["patches"] @ prototypes.T, GOLDEN.outputs["model.student_patch"].flatten(0, 1)[places])
    close((targets["teacher"] @ teacher.T).transpose(0, 1).flatten(0, 1), GOLDEN.outputs["model.teacher_cls"])
    close(targets["teacher_patches"] @ teacher.T, GOLDEN.outputs["model.teacher_patch"].flatten(0, 1)[places])
    close(targets["seen"] @ teacher.T, GOLDEN.outputs["model.teacher_patch"].mean(dim=1))
    loss, metrics = objective(task._nets, views, START, None)
    loss.backward()
    for kind, value in {"loss": loss, "cls": metrics["class"], "patch": metrics["patch"]}.items():
        close(value, GOLDEN.outputs[f"model.{kind}"])
    own = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.requires_grad}
    for name, expected in GOLDEN.under("model_grad/").items():
        close(own.pop(ours(name, "ibot")), expected)
    assert not own


def test_masked_tokens_with_registers_and_layerscale_are_dinov2s(tmp_path: Path):
    """As its importer makes the encoder, which keeps the class token and its position as one float32 number."""
    weights = {name.removeprefix("vit."): value for name, value in DINOV2.weights.items() if name.startswith("vit.")}
    torch.save(weights, tmp_path / "dinov2.pth")
    encoder = import_official(tmp_path / "dinov2.pth", heads=DINOV2.config["model"]["heads"]).encoder.double().eval()
    mask_token = DINOV2.weights["vit.mask_token"][0].double()
    tokens = encoder(DINOV2.given("img"), mask=DINOV2.inputs["vit_mask"], mask_token=mask_token)
    for which, found in (("cls", tokens.cls), ("reg", tokens.prefix[:, 1:]), ("patch", tokens.patches)):
        close(found, DINOV2.outputs[f"vit_masked.x_norm_{which}{'tokens' if which != 'cls' else 'token'}"], 1e-6)


def centres_of(dino: list[Tensor], ibot: list[Tensor]) -> list[list[Tensor]]:
    """DINOv2's two centres after each step of these teacher's logits: of class tokens, and of masked patches alone."""
    objective, found = of_logits("ibot", 16, {"centred_on": "masked"}), []
    for cls, patches in zip(dino, ibot, strict=True):
        crops = cls.unflatten(0, (2, -1)).transpose(0, 1)
        weights = torch.full((len(patches),), 0.5).double()
        targets = {"teacher": crops, "teacher_patches": patches, "weights": weights}
        objective.compare({"crops": crops, "patches": patches}, targets, START)
        objective.after_step(START, 1.0)
        found.append([objective.centre.centre.clone()[None], objective.patch_centre.centre.clone()[None, None]])
    return found


def shared() -> list[list[Tensor]]:
    """A process's part of DINOv2's two: class tokens in halves, 4 masked patches and 10."""
    rank = dist.rank()
    dino = [DINOV2.given("t_cls", step)[4 * rank : 4 * rank + 4] for step in (1, 2)]
    return centres_of(dino, [DINOV2.given("t_patch", step)[slice(4) if rank == 0 else slice(4, 14)] for step in (1, 2)])


def test_centres_of_dinov2_and_where_ours_differ(gang):
    """Ours of two processes are those of one. The official patch centre of two processes is a mean of their means, though one
    has 4 masked patches and the other 10; that number is the mean of ours of each process alone."""
    alone = centres_of(*([DINOV2.given(name, step) for step in (1, 2)] for name in ("t_cls", "t_patch")))
    both = gang(2)(shared)
    ranks = [centres_of([DINOV2.given("t_cls", s) for s in (1, 2)], [DINOV2.given("t_patch", s)[part] for s in (1, 2)])
             for part in (slice(4), slice(4, 14))]  # fmt: skip
    for step in range(2):
        for kind, number in (("dino", 0), ("ibot", 1)):
            close(alone[step][number], DINOV2.outputs[f"one.{kind}_center{step + 1}"], 1e-12)
            for answer in both:
                close(answer[step][number], alone[step][number], 1e-12)
        theirs = DINOV2.outputs[f"two.rank0.ibot_center{step + 1}"]
        close((ranks[0][step][1] + ranks[1][step][1]) / 2, theirs, 1e-12)
        assert not torch.allclose(alone[step][1], theirs, rtol=0.01)


def masks_of(settings: dict, num: int, grid: tuple[int, int] = (14, 14)) -> Tensor:
    """[2, num, N]: of both large crops of so many images."""
    spec = EncoderSpec(dim=16, depth=2, heads=2, patch=(16, 16), grid=grid, prefix=1)
    objective = create("ibot", {"head": {"prototypes": 4}, "masks": settings}, spec)

    def draw(name: str, count: int, *, host: bool = False) -> Tensor:
        assert host, "counting masks must not wait for a GPU"
        return uniform(3, purpose(name), torch.arange(num), count)

    mask, places = objective.masks(draw, torch.device("cpu"))
    assert torch.equal(places, mask.flatten().nonzero()[:, 0])
    return mask.unflatten(0, (2, num))


def test_masks_are_as_many_and_as_large_as_the_official_ones():
    """iBOT's [0, 0.3 +- 0.2]: within four standard errors of the difference of two means of 2000."""
    masks, official = masks_of({}, 1000), GOLDEN.tables["mask_stats"]
    ratios = masks.double().mean(dim=-1).flatten()
    some = ratios[ratios > 0]
    error = (2 / 2000) ** 0.5
    assert abs(float(ratios.mean()) - official["mean_ratio"]) < 4 * error * official["std_ratio"]
    assert abs(float((ratios == 0).double().mean()) - official["fraction_empty"]) < 4 * error * 0.5
    assert abs(float(some.mean()) - official["mean_of_nonempty"]) < 4 * (2 / 1000) ** 0.5 * official["std_of_nonempty"]
    assert float(some.std()) == pytest.approx(official["std_of_nonempty"], rel=0.1)
    assert float(ratios.max()) <= 0.5 and float(some.min()) > 0.05
    cells, expected = masks.flatten(0, 1).double().mean(dim=0), GOLDEN.outputs["mask_stats.per_cell_frequency"].flatten()
    assert float((cells - expected).abs().max()) < 5 * error * float((expected * (1 - expected)).sqrt().max())
    assert not torch.equal(masks[0], masks[1]), "crops have masks of their own"


@pytest.mark.parametrize("probability, ratio", [(1.0, (0.3, 0.3)), (0.0, (0.1, 0.5)), (1.0, (0.0, 0.0))])
def test_single_patches_are_masked_as_many_as_asked(probability: float, ratio: tuple[float, float]):
    masks = masks_of({"shape": "random", "probability": probability, "ratio": ratio}, 50)
    assert set(masks.sum(dim=-1).flatten().tolist()) == {int(196 * ratio[1] * (probability > 0))}
    if probability and ratio[1]:
        rows = masks.flatten(0, 1).unflatten(1, (14, 14))
        assert float((rows[:, :, 1:] & rows[:, :, :-1]).double().mean()) == pytest.approx(0.09, abs=0.01), "by chance"


def test_blocks_of_one_patch_are_dinov2_s_smallest():
    assert masks_of({"min_area": 1, "ratio": [0.01, 0.02], "probability": 1.0}, 20).sum(dim=-1).max() <= 3
    assert masks_of({}, 3, grid=(2, 2)).shape == (2, 3, 4)


@pytest.mark.parametrize("centred", [{"centring": "mean", "centred_on": "masked"}, {"centring": "sinkhorn"}])
def test_a_batch_without_a_masked_patch_has_a_loss(centred: dict):
    task, made = official_task(GOLDEN, "ibot", centred | {"masks": {"probability": 0.0}}), []
    objective = task.objectives["ibot"]
    masks, objective.masks = objective.masks, lambda *given: made.append(given) or masks(*given)
    views = views_of(GOLDEN, GOLDEN.inputs["global_crops"], GOLDEN.inputs["local_crops"])
    loss, metrics = objective(task._nets, views, START, lambda name, num, host=False: torch.full((4, num), 0.5).double())
    loss.backward()
    objective.after_step(START, 0.9)
    assert float(metrics["patch"]) == 0 and torch.isfinite(loss)
    assert objective.mask_token.grad is not None and not objective.mask_token.grad.any()
    assert all(torch.isfinite(value).all() for value in task.state_dict().values())
    assert len(made) == 1, "masks are made once for student and teacher"


def test_a_head_of_its_own_serves_the_patches():
    head = {"prototypes": 6, "hidden": 8, "bottleneck": 4}
    objective = create(
        "ibot", {"head": head, "patch_head": head | {"prototypes": 9}}, EncoderSpec(16, 2, 2, (16, 16), (6, 6), 1)
    )
    assert len(objective.centre.centre) == 6 and len(objective.patch_centre.centre) == 9
    assert len(objective.patch_head.last_layer()) == 9


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"masks": {"ratio": [0.5, 0.1]}}, "is no range; write the smaller first"),
        ({"masks": {"min_area": 0}}, "objectives.ibot.masks.min_area"),
        ({"masks": {"min_area": 4, "shape": "random"}}, "masks.min_area is of blocks, and masks.shape=random"),
        ({"koleo_group": 4}, "objectives.ibot.koleo_group=4 would change nothing"),
        ({"crops": {"local_size": 10}}, "objectives.ibot.crops.local_size"),
        ({"centring": "sinkhorn", "centred_on": "all"}, "objectives.ibot.centred_on=all would change nothing"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        create("ibot", {"head": {"prototypes": 4}} | settings, SPEC)
