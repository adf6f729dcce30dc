"""``python -m tests.multicrop --batch 64``: tokens a second of a multi-crop step, packed into one pass, beside a pass per size.

Forward and backward of the encoder alone, two crops of 224 and ten of 96 pixels unless told, both ways by turns in one run; the
median of each is told, as JSON. On a CPU the clock is processor time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from vitssl.models.adapters.timm_vit import fuse_attention
from vitssl.models.encoder import Encoder


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4, help="images, of which every crop is one sequence")
    parser.add_argument("--large", type=int, nargs=2, default=(2, 224), help="number and pixels")
    parser.add_argument("--small", type=int, nargs=2, default=(10, 96), help="number and pixels")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    encoder = Encoder.create(options.model, image_size=options.large[1]).to(device)
    fuse_attention(encoder, device == "cuda" or options.precision == "fp32")  # as the engine chooses
    if options.compile:
        encoder.compile_blocks()
    crops = [torch.randn(options.batch * num, 3, side, side, device=device) for num, side in (options.large, options.small)]
    tokens = sum(len(each) * (encoder.spec.prefix + (each.shape[-1] // encoder.spec.patch[0]) ** 2) for each in crops)
    found: dict[bool, list[float]] = {False: [], True: []}
    peaks: dict[bool, float] = {}
    for number in range(options.rounds + 2):
        for packing in (False, True):
            seconds, peak = step(encoder, crops, packing, options.precision == "bf16")
            if number >= 2:  # the first ones warm up
                found[packing].append(seconds)
                peaks[packing] = peak
    apart, packed = (statistics.median(found[packing]) for packing in (False, True))
    told = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__, **vars(options)}
    told |= {"tokens": tokens, "tokens_per_s_apart": round(tokens / apart), "tokens_per_s_packed": round(tokens / packed)}
    told |= {"packed_over_apart": round(apart / packed, 3)}
    if device == "cuda":
        told |= {"peak_gib_apart": peaks[False], "peak_gib_packed": peaks[True]}
    print(json.dumps(told))
    return 0


def step(encoder: Encoder, crops: Sequence[torch.Tensor], packing: bool, half: bool) -> tuple[float, float]:
    """(seconds, peak GiB on a GPU)."""
    encoder.packing, device = packing, crops[0].device.type
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = clock()
    with torch.autocast(device, torch.bfloat16, enabled=half):
        loss = sum(tokens.cls.float().pow(2).mean() for tokens in encoder.together(crops))
    loss.backward()
    encoder.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
