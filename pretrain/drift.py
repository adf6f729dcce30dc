"""Drift: how far the features of a continued pretraining have moved from those of the weights it began with, as linear CKA.

The features of the beginning are kept in the run's folder, so a run that goes on compares with the same ones, wherever the
weights are by then.
"""

import json
import shutil

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vitssl.data.feed import evaluation_samples, share
from vitssl.data.samples import Samples
from vitssl.data.sources import Source, same_samples
from vitssl.probes.similarity import linear_cka
from vitssl.train.features import extract
from vitssl.train.loop import Event
from vitssl.train.session import Session
from vitssl.views import View

FILE = "start_features.safetensors"


class Drift:
    """The features that a run began with, and how alike later ones of the same images are."""

    def __init__(self, session: Session) -> None:
        self.session, self.path, self._told = session, session.folder / FILE, False
        resumed = session.config.init.resume
        if session.engine.main and session.start and not self.path.exists() and resumed and (resumed / FILE).exists():
            shutil.copy(resumed / FILE, self.path)

    def measure(self, step: int, features: Tensor, source: Source, samples: Samples) -> dict[str, float]:
        """{"cka": value} on the first process: of ``features`` [N, D] of these samples of ``source``, beside those of step 0.

        {} where those are of other images or gone, which is told once.
        """
        if not self.session.engine.main:
            return {}
        images = json.dumps([len(samples), repr(samples.views), len(features)])
        if step == 0:
            words = {"fingerprint": source.fingerprint, "images": images}
            unfinished = self.path.with_name(f".{self.path.name}")
            unfinished.write_bytes(save({"features": features.cpu().contiguous()}, words))
            unfinished.replace(self.path)
        found = None
        if self.path.exists():
            with safe_open(self.path, "pt") as file:
                then = file.metadata()
                same = same_samples(then["fingerprint"], source.fingerprint) and then["images"] == images
                found = file.get_tensor("features") if same else None
        if found is None:
            if not self._told:
                self.session.report.say(f"{self.path} is of other images or not there: drift is not measured", style="yellow")
            self._told = True
            return {}
        return {"cka": linear_cka(found.to(features.device), features)}


def unlabelled_drift(session: Session, drift: Drift, source: Source) -> Event:
    """Drift on images without labels, for a run that has no probe; ``source`` is held out, or what is trained on."""
    spec, config, report = session.engine.task.encoder.spec, session.config, session.report
    view = View(size=spec.image_size, resize=round(min(spec.image_size) / config.probe.crop_pct))
    options = {"channels": spec.channels, "limit": config.heldout.samples}
    samples = evaluation_samples(source, config.data, [view], **options)

    def act(step: int) -> None:
        features, _ = extract(session.engine, share(samples, tell=report.say), pooling=config.pooling)
        if values := drift.measure(step, features, source, samples):
            report.scalars({f"probe/{key}": value for key, value in values.items()}, step)
            report.rows("probes.jsonl", [{"step": step, **values, "queries": len(features)}])
            report.say(f"step {step:,}  CKA {values['cka']:.3f} with the weights it started from ({len(features):,} images)")

    if session.start == 0:
        act(0)
    return Event(every=session.steps(config.probe.every), act=act)
