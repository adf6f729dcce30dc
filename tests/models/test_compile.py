"""Compiled blocks: the same names, the same numbers, and nothing compiled after the first step."""

import copy
import shutil

import pytest
import torch

from vitssl.models.encoder import Encoder
from vitssl.models.predictor import Decoder

pytestmark = pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler():
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def network(name: str = "vit_tiny_patch16_224", depth: int = 2, **settings) -> torch.nn.ModuleList:
    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "depth": depth, "num_heads": 2}
    encoder = Encoder.create(name, image_size=16, patch_size=4, arguments=arguments, **settings)
    return torch.nn.ModuleList([encoder, Decoder(encoder.spec, dim=16, depth=1, heads=2, out=48)])


def step(net: torch.nn.ModuleList, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    keep = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(2)])
    encoder, decoder = net
    return decoder(encoder(images, keep=keep), keep).square().mean() + encoder(images).patches.square().mean()


def test_compiled_blocks_keep_names_and_numbers_and_compile_once():
    net = network()
    plain = copy.deepcopy(net)
    for part in net:
        part.compile_blocks()
    assert list(net.state_dict()) == list(plain.state_dict())
    frames = []
    for seed in range(3):
        pairs = []
        for candidate in (net, plain):
            candidate.zero_grad()
            loss = step(candidate, seed)
            loss.backward()
            pairs.append([loss, *(p.grad for p in candidate.parameters())])
            with torch.no_grad():
                for parameter in candidate.parameters():
                    parameter -= 0.1 * parameter.grad
        for compiled, expected in zip(*pairs):
            torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-6)
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[0] > 0
    assert frames == frames[:1] * 3


def test_deep_networks_with_drop_path_stay_compiled():
    """Each drop-path rate is one entry of a shared cache, whose usual limit of 8 would leave later blocks uncompiled."""
    (encoder, _) = network(depth=11, drop_path=0.2)
    encoder.compile_blocks()
    assert torch._dynamo.config.recompile_limit >= 11
    for block in encoder.vit.blocks:  # that limit, a quick backend
        block.compile(backend="eager", dynamic=False)
    images = torch.randn(2, 3, 16, 16)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        encoder(images)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    encoder(images)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224", "beit_base_patch16_224"])
def test_blocks_with_relative_positions_are_traced_once_for_each_door(name: str):
    encoder, _ = network(name)
    plain = copy.deepcopy(encoder)
    for block in encoder.vit.blocks:  # a quick backend: what is compiled anew shows in it too
        block.compile(backend="eager", dynamic=False, fullgraph=True)
    graphs = []
    for seed in range(3):
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        keep = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(seed + n))[:4] for n in (5, 9)])
        for doors in [{}] if "beit" in name else [{}, {"keep": keep}]:
            torch.testing.assert_close(encoder(images, **doors).patches, plain(images, **doors).patches, rtol=1e-5, atol=1e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == graphs[:1] * 3
