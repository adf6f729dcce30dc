"""iBOT: DINO whose student sees its large crops masked, and says of those patches what the teacher sees (Zhou et al. 2022).

DINOv2 (Oquab et al. 2024) is this file under other settings: Sinkhorn's centring, KoLeo, a head of its own for patches. The
surprising decision: a crop whose mask is empty counts in the mean of the patches' loss, so with half of them it is halved.
"""

import weakref
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor, nn

from vitssl.config import Count, Section
from vitssl.errors import ConfigError
from vitssl.losses.clusters import row_cross_entropy
from vitssl.masks.blocks import block_masks, block_noise
from vitssl.masks.random import random_mask
from vitssl.models.spec import EncoderSpec
from vitssl.models.twin import Twin
from vitssl.objectives.base import Nets
from vitssl.objectives.crops import LARGE, MultiCropConfig, by_sample, joined
from vitssl.objectives.dino import DINO, HeadConfig, TemperatureConfig
from vitssl.schedule import Clock
from vitssl.sections import Area, Fraction, ascending
from vitssl.task import Draw, Embeddings


class MaskConfig(Section):
    """Which patches of a large crop the student does not see; the defaults are those of iBOT's and DINOv2's official codes."""

    probability: Fraction = Field(0.5, description="that a crop is masked at all")
    ratio: Annotated[tuple[Fraction, Fraction], AfterValidator(ascending)] = Field(
        (0.1, 0.5), description="of its patches, uniform between the two"
    )
    shape: Literal["blocks", "random"] = Field("blocks", description="rectangles as in BEiT, or single patches")
    min_area: Count | None = Field(None, description="patches of a block (DINOv2: 4); null: a ninth of the grid (iBOT)")


class CropsConfig(MultiCropConfig):
    """The official code's for ViTs."""

    scale: Area = Field((0.25, 1.0), description="area of a large crop, as a fraction of the image")
    local_scale: Area = Field((0.05, 0.25), description="area of a small crop, as a fraction of the image")
    num_local: NonNegativeInt = Field(10, description="small crops of each image")


class SharedHeadConfig(HeadConfig):
    prototypes: Count = Field(8192, description="outputs (DINO: 65,536)")


class IBOT(DINO):
    """DINO's loss, and the same cross entropy between the student's and the teacher's masked patches."""

    class Config(DINO.Config):
        head: SharedHeadConfig = SharedHeadConfig()
        patch_head: HeadConfig | None = Field(None, description="of the patches alone; null: they share the class token's")
        patch_weight: NonNegativeFloat = Field(1.0, description="of the patches' loss")
        patch_teacher_temperature: TemperatureConfig | None = Field(None, description="for patches; null: as for class tokens")
        centred_on: Literal["all", "masked"] | None = Field(None, description="patches of the mean (DINOv2: masked); null: all")
        masks: MaskConfig = MaskConfig()
        crops: CropsConfig = CropsConfig()

    hides = True

    def __init__(self, config: Config, spec: EncoderSpec) -> None:
        super().__init__(config, spec)
        self._refuse_unused("centred_on", unless=config.centring == "mean", why="centring=sinkhorn keeps no mean")
        if config.masks.shape == "random" and config.masks.min_area is not None:
            raise ConfigError("objectives.ibot.masks.min_area is of blocks, and masks.shape=random; leave it out")
        self._drawn: tuple[Callable[[], Draw | None], tuple[Tensor, Tensor]] | None = None
        self.mask_token = nn.Parameter(torch.zeros(1, spec.dim))  # 2-D as in the official codes, where it is weight-decayed
        self.patch_head = None if config.patch_head is None else config.patch_head.build(spec.dim)
        self.teacher_patch_head = None if self.patch_head is None else Twin(self.patch_head)
        self.patch_centre = self._new_centre(config.patch_head or config.head)

    def embed(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """As DINO's, and ``patches`` [M, E]: rows of the masked patches of all large crops."""
        crops = self.config.crops.joined(views)
        mask, masked = self._masks(draw, crops[0].device)
        tokens = nets.student.together(crops, mask=mask, mask_token=self.mask_token[0])
        rows = (self.patch_head or self.head)(tokens[0].patches.flatten(0, 1)[masked])
        return self._embedded(tokens) | {"patches": rows}

    def targets(self, nets: Nets, views: dict[str, Tensor], draw: Draw) -> Embeddings:
        """The teacher's rows of what :meth:`embed` has, and ``weights`` [M]: one over the masked patches of a row's crop.

        With a centre of all patches also ``seen`` [2B, E]: each crop's mean row.
        """
        images = joined(views, LARGE)
        mask, masked = self._masks(draw, images.device)
        tokens, head = nets.teacher(images), self.teacher_patch_head or self.teacher_head
        found = {"teacher": by_sample(self.teacher_head(tokens.cls), 2)}
        if self.patch_centre is not None and self.config.centred_on != "masked":
            rows = head(tokens.patches)  # [2B, N, E]
            found |= {"teacher_patches": rows.flatten(0, 1)[masked], "seen": rows.mean(dim=1)}
        else:
            found["teacher_patches"] = head(tokens.patches.flatten(0, 1)[masked])
        found["weights"] = 1 / mask.sum(dim=1)[masked // mask.shape[1]].to(found["teacher_patches"].dtype)
        return found

    def compare(self, embeddings: Embeddings, targets: Embeddings, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().compare(embeddings, targets, clock)
        warmth = self._warmth(self.config.patch_teacher_temperature or self.config.teacher_temperature, clock)
        prototypes = (
            (self.patch_head or self.head).last_layer(),
            (self.teacher_patch_head or self.teacher_head).average.last_layer(),
        )
        rows = targets["teacher_patches"]
        centre = self._centre(self.patch_centre, rows, prototypes[1], warmth, shown=targets.get("seen"))
        options = {"temperature": self.config.temperature, "teacher_temperature": warmth}
        patches = row_cross_entropy(embeddings["patches"], rows, targets["weights"], *prototypes, centre, **options)
        patches = patches / (len(LARGE) * len(embeddings["crops"]))
        loss = loss + self.config.patch_weight * patches
        return loss, metrics | {"loss": loss.detach(), "class": metrics["loss"], "patch": patches.detach()}

    def _masks(self, draw: Draw, device: torch.device) -> tuple[Tensor, Tensor]:
        """:meth:`masks`, once for a draw: student and teacher ask for the same, one after the other."""
        if self._drawn is None or self._drawn[0]() is not draw:
            self._drawn = weakref.ref(draw), self.masks(draw, device)
        return self._drawn[1]

    def masks(self, draw: Draw, device: torch.device) -> tuple[Tensor, Tensor]:
        """(mask [2B, N] bool, places [M] int64 of what it masks among 2B x N), in the order of :func:`joined`.

        Made on the host, where they can be counted without waiting for a GPU.
        """
        grid, settings = self.spec.grid, self.config.masks
        num = self.spec.num_patches
        wanted = torch.cat([draw(f"{crop}.ratio", 2, host=True) for crop in LARGE])  # [2B, 2]
        noise = torch.cat([draw(f"{crop}.mask", block_noise(grid), host=True) for crop in LARGE])
        low, high = settings.ratio
        ratio = (low + (high - low) * wanted[:, 1]) * (wanted[:, 0] < settings.probability)
        if settings.shape == "blocks":
            smallest = settings.min_area or (min(grid) // 3) ** 2
            mask = block_masks(noise, grid, ratio * num, min_area=smallest)
        else:
            mask = random_mask(noise[:, :num], (ratio * num).floor())
        return mask.to(device, non_blocking=True), mask.flatten().nonzero()[:, 0].to(device, non_blocking=True)
