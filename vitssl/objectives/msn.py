"""MSN: a view with patches left out shall choose the prototypes that the whole of another view does (Assran et al. 2022).

The surprising decision: nothing is predicted where patches are missing; that they may not matter for the choice is all that is
learnt. And no prototype may be left without images: the entropy of the mean choice is made large (me-max).
"""

import math
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from vitssl.config import Count
from vitssl.losses.clusters import mean_entropy, pair_cross_entropy, sinkhorn_centre
from vitssl.masks.random import num_kept, random_keep
from vitssl.models.prototypes import PrototypeHead, on_sphere
from vitssl.models.spec import EncoderSpec
from vitssl.models.twin import Twin
from vitssl.objectives.base import Nets, Objective
from vitssl.objectives.crops import MultiCropConfig, by_sample, joined
from vitssl.objectives.pairs import HALF
from vitssl.plan import Stack
from vitssl.schedule import Clock, Schedule
from vitssl.sections import Positive, Strength
from vitssl.task import Draw, Embeddings, Rule, decay_rules
from vitssl.views import View

CROPS = MultiCropConfig(
    scale=(0.3, 1.0),
    local_scale=(0.05, 0.3),
    num_local=10,
    interpolation="bilinear",
    first=HALF,
    second=HALF,
    local=HALF,
)
"""``first`` is the target, ``second`` the anchor that is masked, the small ones are the focal anchors, which are not."""


class MSN(Objective):
    """Cross entropy of every anchor's choice with the target's + ``me_max`` x (ln P - entropy of the anchors' mean choice).

    Numbers are those of the official code. There a GPU leaves out the same patches of all its images; here each image has a
    draw of its own. As there, anchors of one size share the BatchNorms' statistics, and the target's projector has its own.
    Metrics beside the losses: ``entropy`` of a target's choice as a share of ln P, and ``usage``, how many prototypes the
    anchors' choices of a batch are spread over.
    """

    class Config(Objective.Config):
        mask_ratio: float = Field(0.15, gt=0, lt=1, description="fraction of the large anchor's patches left out (ViT-S)")
        prototypes: Count = Field(1024, description="to choose from")
        temperature: Positive = Field(0.1, description="of the cosines that anchors choose by")
        sharpening: Positive = Field(0.25, description="the targets' temperature, as a share of the anchors'")
        sinkhorn: bool = Field(True, description="whether the targets of a batch use all prototypes alike")
        me_max: Strength = Field(1.0, description="weight of what the mean choice lacks of the largest entropy")
        hidden: Count = Field(2048, description="width of the projector's two hidden layers")
        out: Count = Field(256, description="width of the projection")
        crops: MultiCropConfig = CROPS

    momentum = Schedule(0.996, final=1.0, shape="linear")
    judges_teacher = True
    hides = True
    couples_samples = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        spec.require_class_token(f"objectives.{self.name}")
        spec.refuse_drops("objectives.msn")
        self.num_keep = num_kept(spec.num_patches, config.mask_ratio, key="objectives.msn.mask_ratio")
        _, anchor, *focal = config.crops.stacks(spec, where="objectives.msn.crops")
        self._stacks = [replace(anchor, tokens=spec.prefix + self.num_keep), *focal]
        sizes = {"prototypes": config.prototypes, "hidden": config.hidden, "bottleneck": config.out, "layers": 3}
        self.head = PrototypeHead(spec.dim, **sizes, fixed_norm=True, norm=True)
        self.goals = Twin(self.head.mlp, trains=True)

    def views(self) -> dict[str, View]:
        return self.config.crops.views(self.spec)

    def stacks(self) -> list[Stack]:
        return self._stacks

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """Class tokens: ``anchor`` [B, D] of the masked crop, ``focal`` [B, V, D] of the small ones, if there are any."""
        keep, _ = random_keep(draw("mask", self.spec.num_patches), self.num_keep)
        small = self.config.crops.small
        crops = [joined(views, names) for names in (["second"], small) if names]
        anchor, *focal = (tokens.cls for tokens in nets.student.together(crops, keep=keep))
        return {"anchor": anchor} | ({"focal": by_sample(focal[0], len(small))} if small else {})

    def targets(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """``target`` [B, D]: the teacher's class tokens of the other large crop, all of it."""
        return {"target": nets.teacher(views["first"]).cls}

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        config, prototypes = self.config, self.head.last_layer()
        anchors = self.head(embeddings["anchor"])[:, None]
        if "focal" in embeddings:
            focal = embeddings["focal"]
            anchors = torch.cat([anchors, self.head(focal.flatten(0, 1)).unflatten(0, focal.shape[:2])], dim=1)  # [B, V, E]
        goals, warmth = on_sphere(self.goals(targets["target"])), config.temperature * config.sharpening
        centre = prototypes.new_zeros(len(prototypes))
        if config.sinkhorn:
            centre = sinkhorn_centre(goals, prototypes, temperature=warmth, rows_first=True, gather=self.all_rows)
        options = {"temperature": config.temperature, "teacher_temperature": warmth, "shared": False}
        prediction, entropy, _ = pair_cross_entropy(anchors, goals[:, None], prototypes, prototypes, centre, **options)
        used = mean_entropy(anchors.flatten(0, 1), prototypes, temperature=config.temperature, total=self.total)
        most = math.log(config.prototypes)
        terms = {"prediction": prediction, "me_max": most - used}
        loss = prediction + config.me_max * terms["me_max"]
        metrics = {"loss": loss, **terms, "entropy": entropy / most, "usage": used.exp()}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def param_rules(self) -> list[Rule]:
        """Prototypes do not decay (official code)."""
        own = r"head\.last_layer\..*"
        return [*decay_rules(rf"(?!{own}).*"), Rule("prototypes", own, weight_decay=0.0)]
