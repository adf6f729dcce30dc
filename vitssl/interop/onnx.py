"""ONNX: an encoder's tokens and features, or a classifier's logits, for any batch size and, where that can be, any image size.

Positions are resampled inside the graph, by the rules of timm and MAE; DINO's rule and DINOv3's rotations need numbers that
are known only once the size is, and a Beit has one size anyway, so their files are for one. Attention is written as two
products and a softmax, since torch's exporter fails on the fused one with a bias (torch 2.15). onnxruntime runs the file and
must give what torch gives before it takes its name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitssl.card import write_card
from vitssl.errors import CheckpointError
from vitssl.interop.folder import new_folder
from vitssl.interop.ours import Classifier, classifier_of, encoder_of
from vitssl.interop.parity import require_parity, trial_images
from vitssl.models.adapters.timm_vit import fuse_attention
from vitssl.models.encoder import Encoder
from vitssl.models.spec import Pooling

try:
    import onnxruntime
    import onnxscript  # noqa: F401 - torch's exporter needs it and says so late
except ImportError as error:
    raise CheckpointError(f"{error.name} is not installed: pip install 'vitssl[onnx]'") from None

TOLERANCE = 5e-5  # in float32, relative to the largest value: two ways to sum the same products
OPSET = 20
SAID = ("architecture", "image_size", "mean", "std", "pooling", "classes", "labels", "tested_size", "crop_pct", "decoding")


class Pooled(nn.Module):
    """images [B, C, H, W] -> (tokens [B, R + N, D], features [B, D])."""

    def __init__(self, encoder: Encoder, pooling: Pooling) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder(images)
        return torch.cat([tokens.prefix, tokens.patches], dim=1), tokens.pool(self.pooling)


def export_onnx(
    folder: Path,
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    run: Path | None = None,
    images: Tensor | None = None,
) -> float:
    """Write ``model.onnx``, ``config.json`` (what it takes and gives, the names of classes) and ``README.md``.

    Returns the largest difference over batch sizes and image sizes. Raises CheckpointError; ``folder`` is then not there.
    """
    ours: Classifier | Pooled
    ours = classifier_of(state, facts) if "classes" in facts else Pooled(encoder_of(state, facts), facts["pooling"])
    outputs = ["logits"] if "classes" in facts else ["tokens", "features"]
    encoder = ours.encoder
    fuse_attention(encoder, False)
    own, (height, width) = encoder.spec.image_size, encoder.spec.patch
    any_size = encoder.vit.any_size_in_a_graph
    other = (own[0] + height, own[1] + 2 * width)
    with new_folder(folder) as unfinished:
        file = unfinished / "model.onnx"
        _write(ours.eval(), file, trial_images(facts, size=other if any_size else own).float(), outputs, any_size=any_size)
        session = _session(file)
        sizes = [own, other, (own[0] + 2 * height, own[1])] if any_size else [own]
        reached = max(
            _compare(session, ours, trial_images(facts, num=num, size=size), what=f"{folder}, {num} images of {size}")
            for num, size in zip((1, 3, 2), sizes * 3)
        )
        if images is not None:
            reached = max(reached, _compare(session, ours, images, what=f"{folder}, on the given images"))
        said = {key: facts[key] for key in SAID if key in facts}
        said |= {"outputs": outputs, "any_image_size": any_size, "patch": list(encoder.spec.patch)}
        (unfinished / "config.json").write_text(json.dumps(said, indent=2) + "\n")
        usage = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{folder.name}/model.onnx")\n'
        usage += f'{", ".join(outputs)}{"," if len(outputs) == 1 else ""} = session.run(None, {{"images": images}})  # float32'
        sized = f"any size that patches of {height} x {width} divide" if any_size else f"{own[0]} x {own[1]} pixels alone"
        notes = f"The graph takes any number of images, of {sized}."
        write_card(unfinished, facts, library="onnx", usage=usage, differs=reached, run=run, notes=notes)
    return reached


def _write(model: nn.Module, file: Path, images: Tensor, outputs: list[str], *, any_size: bool) -> None:
    dimensions = {0: "batch"} | ({2: "height", 3: "width"} if any_size else {})
    names = {"input_names": ["images"], "output_names": outputs, "dynamic_shapes": {"images": dimensions}}
    try:
        program = torch.onnx.export(model, (images,), dynamo=True, opset_version=OPSET, verbose=False, **names)
        program.save(str(file))
    except Exception as error:  # torch.export's, onnxscript's and the writer's own kinds
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise CheckpointError(f"torch {torch.__version__} cannot make ONNX of this network: {reason}") from error


def _session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it complains about is raised as well
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds, which have no common base
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"onnxruntime {onnxruntime.__version__} cannot read what was written: {reason}") from error


def _compare(session: onnxruntime.InferenceSession, ours: nn.Module, images: Tensor, *, what: str) -> float:
    """The largest difference of any output."""
    images = images.float()
    with torch.no_grad():
        expected = ours(images)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    try:
        found = session.run(None, {"images": np.ascontiguousarray(images.numpy())})
    except Exception as error:  # its own kinds, which have no common base
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{what}: onnxruntime cannot run what was written: {reason}; nothing was written") from error
    pairs = zip(found, expected, strict=True)
    return max(require_parity(torch.from_numpy(one), other, what=what, tolerance=TOLERANCE) for one, other in pairs)
