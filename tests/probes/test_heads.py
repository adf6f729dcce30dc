"""Linear heads against MAE's official LARS steps, against torch's own optimiser, and on features whose answer is known."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vitssl.probes.batches import Shuffled
from vitssl.probes.heads import LinearHeads, Recipe, best_head, train_heads
from vitssl.schedule import Schedule

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"
CONFIG = json.loads((GOLDEN / "meta.json").read_text())["config"]
INPUTS, OUTPUTS = (load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs"))


def test_maes_five_steps() -> None:
    """BatchNorm without parameters, LARS: losses, weights, biases, running statistics and test logits."""
    lars, classes = CONFIG["lars"], CONFIG["classes"]
    recipe = Recipe(rates=(lars["lr"], 0.0), epochs=1, batch_size=lars["batch"], lars=0.001, batch_norm=True)
    heads = LinearHeads(recipe, width=CONFIG["dim"], num_classes=classes, seed=0).to(torch.float64)
    heads.weights[:], heads.biases[:] = INPUTS["lars_weight"].double(), INPUTS["lars_bias"].double()
    features, labels, rates = INPUTS["train_features"].double(), INPUTS["train_labels"], torch.tensor(recipe.rates)
    for step in range(lars["steps"]):
        rows = slice(step * lars["batch"], (step + 1) * lars["batch"])
        losses = heads.step(features[rows], labels[rows], rates.double())
        expected = {"weights": heads.weights[0], "biases": heads.biases[0], "losses": losses[0]}
        for name, value in expected.items():
            torch.testing.assert_close(value, OUTPUTS[f"lars.{name}"][step], rtol=0, atol=1e-9)
    torch.testing.assert_close(heads.mean, OUTPUTS["lars.running_mean"], rtol=0, atol=1e-12)
    torch.testing.assert_close(heads.variance, OUTPUTS["lars.running_var"], rtol=0, atol=1e-12)
    logits = heads.logits(INPUTS["test_features"].double())
    torch.testing.assert_close(logits[0], OUTPUTS["lars.test_logits"], rtol=0, atol=1e-9)
    torch.testing.assert_close(heads.weights[1], INPUTS["lars_weight"].double()), "a head at rate 0 stays"


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_is_torchs(batch_norm: bool, weight_decay: float) -> None:
    draw = torch.Generator().manual_seed(0)
    recipe = Recipe((0.1, 0.01, 1.0), epochs=1, batch_size=16, weight_decay=weight_decay, batch_norm=batch_norm)
    heads = LinearHeads(recipe, width=5, num_classes=4, seed=1).to(torch.float64)
    oracles = []
    for rate in recipe.rates:
        linear = nn.Linear(5, 4).double()
        linear.weight.data[:], linear.bias.data[:] = heads.weights[0], 0
        model = nn.Sequential(nn.BatchNorm1d(5, affine=False, eps=1e-6).double(), linear) if batch_norm else linear
        oracles.append((model, linear, torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=weight_decay)))
    for _ in range(6):
        x, labels = torch.randn(16, 5, generator=draw, dtype=torch.float64), torch.randint(4, (16,), generator=draw)
        losses = heads.step(x, labels, torch.tensor(recipe.rates, dtype=torch.float64))
        for number, (model, linear, optimizer) in enumerate(oracles):
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert losses[number].item() == pytest.approx(loss.item(), rel=1e-12)
            torch.testing.assert_close(heads.weights[number], linear.weight.data, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(heads.biases[number], linear.bias.data, rtol=1e-10, atol=1e-12)
    x = torch.randn(7, 5, generator=draw, dtype=torch.float64)
    for number, (model, *_) in enumerate(oracles):
        torch.testing.assert_close(heads.logits(x)[number], model.eval()(x).data, rtol=1e-9, atol=1e-11)


def clusters(num: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes that a line tells apart, with a fourth feature of great size that says nothing."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=draw)
    centres = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]])[labels]
    return torch.cat([centres + torch.randn(num, 3, generator=draw), 100 + torch.randn(num, 1, generator=draw)], 1), labels


def test_a_grid_finds_the_rate_that_works() -> None:
    train, test = clusters(2000, seed=0), clusters(1000, seed=1)
    recipe = Recipe((1e-7, 1e-2, 1.0), epochs=20, batch_size=100, warmup=2, batch_norm=True)
    heads = train_heads(*train, recipe, num_classes=3)
    found = heads.accuracies(*test)
    number, accuracy = best_head(heads, *test)
    assert number in (1, 2) and accuracy == max(found) > 0.93 and found[0] < 0.8
    again = train_heads(*train, recipe, num_classes=3)
    assert torch.equal(again.weights, heads.weights), "the same seed, the same heads"
    assert not torch.equal(train_heads(*train, recipe, num_classes=3, seed=1).weights, heads.weights)


def test_fewer_samples_than_a_batch() -> None:
    train = clusters(10, seed=0)
    heads = train_heads(*train, Recipe((0.1,), epochs=30, batch_size=100, batch_norm=True), num_classes=3)
    assert heads.accuracies(*train)[0] >= 0.9


def test_the_shape_of_a_run() -> None:
    """As many steps as epochs hold, the first at no rate where it warms up."""
    train, rates = clusters(100, seed=0), []
    step = LinearHeads.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearHeads, "step", lambda self, x, y, rate: (rates.append(rate.tolist()), step(self, x, y, rate))[1])
        train_heads(*train, Recipe((2.0, 1.0), epochs=5, batch_size=32, warmup=1), num_classes=3)
    assert len(rates) == 15 and rates[0] == [0.0, 0.0] and rates[3] == [2.0, 1.0] and 0 < rates[-1][0] < 0.05


@pytest.mark.parametrize("num_views", [1, 3])
def test_an_epoch_is_shown_its_view(num_views: int) -> None:
    """Against heads stepped by hand; one view is what no view is."""
    draw = torch.Generator().manual_seed(0)
    views = [torch.randn(50, 6, generator=draw) for _ in range(num_views)]
    labels = torch.randint(3, (50,), generator=draw)
    recipe = Recipe((0.1, 0.5), epochs=5, batch_size=16, warmup=1)
    found = train_heads(views, labels, recipe, num_classes=3, seed=4)
    expected = LinearHeads(recipe, width=6, num_classes=3, seed=4)
    batches = list(Shuffled(50, epochs=5, batch_size=16, seed=4, device=torch.device("cpu")))
    schedule = Schedule(peak=1.0, final=0.0, warmup=3, total=15)
    assert len(batches) == 15
    for epoch in range(5):
        for step in range(3 * epoch, 3 * epoch + 3):
            rates = torch.tensor(recipe.rates) * schedule.at(step)
            expected.step(views[epoch % num_views][batches[step]], labels[batches[step]], rates)
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=0)
    if num_views == 1:
        alone = train_heads(views[0], labels, recipe, num_classes=3, seed=4)
        torch.testing.assert_close(alone.weights, found.weights, rtol=0, atol=0)
