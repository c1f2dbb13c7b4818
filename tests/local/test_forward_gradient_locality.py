"""Forward gradients with losses of patches and groups: who gets which, exact in a sweep, and less noise."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from closeness import close
from estimates import CLASSES, components, gradients
from test_forward_gradient import Sweep
from torch import nn

import plywise as pw
from plywise.local.component import Signal
from plywise.local.forward_locality import Locality, find_localities
from plywise.local.local_mixer import MixerBlock, NormedMap, average_head, local_mixer
from plywise.local.scpl import contrastive_loss, mlp_projection


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mixer(**more):
    sizes = {"patches": 2, "channels": 8, "groups": 2, "blocks": 3}
    return local_mixer((1, 4, 4), CLASSES, **{**sizes, **more})


def flat_head(shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), num_classes))


def test_localities_are_seen_in_the_layers_gradients():
    first, block, *_ = mixer()
    x = torch.randn(2, 1, 4, 4)
    layers = [m for m in first.modules() if isinstance(m, NormedMap)]
    found = find_localities(first, layers, x, patches=True, groups=2)
    # the second one's norm mixes groups inside the layer; what comes after the push does not
    assert [found[layer] for layer in layers] == [Locality(patch=True), Locality(patch=True, group=True)]
    parts = [block.tokens[0], block.channels[0], block.groups]
    found = find_localities(block, parts, first(x), patches=True, groups=2)
    assert [found[part] for part in parts] == [Locality(True), Locality(True), Locality(True, True)]
    found = find_localities(block, parts, first(x), patches=False, groups=2)
    assert [found[part] for part in parts] == [Locality(), Locality(), Locality(group=True)]


def test_what_mixes_patches_behind_a_layer_is_seen():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    found = find_localities(conv, [conv[0], conv[2]], torch.randn(2, 1, 5, 5), patches=True, groups=2)
    assert found == {conv[0]: Locality(), conv[2]: Locality(True, True)}
    twice = nn.Linear(4, 4)
    found = find_localities(nn.Sequential(twice, twice), [twice], torch.randn(2, 4), patches=True, groups=2)
    assert found[twice] == Locality()


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_sweep_over_the_units_gives_the_exact_gradient(patches, groups):
    """Units one after another: taking losses apart leaves no gradient out."""
    x, y = torch.randn(3, 1, 4, 4), torch.arange(3) % CLASSES
    modules = mixer(groups=4)
    signal = Signal(modules[0](x).detach(), y)
    sweep = Sweep()
    settings = {"draw": sweep, "patches": patches, "groups": groups, "head": flat_head}
    component = components(modules, x, **settings)[1]
    total = None
    while True:
        sweep.passed = 0
        found = gradients(component, signal)
        if sweep.unit >= sweep.passed:
            break
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        sweep.unit += 1
    heads = {id(p) for p in component.head.parameters()}
    learning = [p for p in component.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(F.cross_entropy(component.head(component.block(signal.s)), y), learning)
    by_parameter = dict(zip(component.parameters(), total, strict=True))
    for parameter, expected in zip(learning, wanted, strict=True):
        times = sweep.unit if id(parameter) in heads else 1
        if expected.norm() < 1e-12:  # a constant over a patch's channels, which the norm takes out
            assert by_parameter[parameter].norm() < 1e-12
            continue
        assert close(by_parameter[parameter] / times, expected, 1e-10)


DRAWS = 2000
CHANNELS, SIDE = 64, 4  # 1,024 units: 16 patches, 8 groups of 8 channels


class Spread(nn.Module):
    """A layer of 1,024 units whose weight's column i gets the gradient of sample i at its outputs.

    Sample i has its own input e_i and all columns are the same, so that the rows are draws of one sample.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DRAWS, CHANNELS * SIDE * SIDE, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(CHANNELS * SIDE * SIDE, 1).expand(-1, DRAWS))
        self.weight_ = [self.layer.weight]

    def forward(self, x):
        return self.layer(x).view(-1, CHANNELS, SIDE * SIDE)


def relative_error(activation: nn.Module, **settings) -> tuple[float, float]:
    """Mean squared error of one sample's estimate, relative to its gradient; share of units that are on."""

    class Layer(nn.Module):
        """One layer for the learner: its output has the positions."""

        def __init__(self) -> None:
            super().__init__()
            self.inside = Spread()
            self.mark = nn.Parameter(torch.zeros(()), requires_grad=False)

        def forward(self, x):
            return self.inside(x)

    x, y = torch.eye(DRAWS), torch.zeros(DRAWS, dtype=torch.long)
    layer = Layer()
    top = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * SIDE * SIDE, CLASSES))
    blocks = [nn.Sequential(layer, activation), top]
    component = components(blocks, x, head=flat_head, **settings)[0]
    signal = Signal(x, y)
    learning = [p for p in component.parameters() if p.requires_grad]
    loss = F.cross_entropy(component.head(component.block(x)), y)
    g = DRAWS * torch.autograd.grad(loss, learning)[0].T[0]
    found = DRAWS * gradients(component, signal)[learning_index(component)].T
    on = (layer(x[:1]) > 0).double().mean().item()
    return ((found - g).square().sum(1).mean() / g.square().sum()).item(), on


def learning_index(component) -> int:
    return next(i for i, p in enumerate(component.parameters()) if p.requires_grad)


def test_a_loss_for_each_patch_and_group_takes_the_noise_from_1025_to_9():
    """``E‖ĝ-g‖² / ‖g‖² = q + 1``, q the units that share a loss."""
    whole, _ = relative_error(nn.Tanh())
    by_patch, _ = relative_error(nn.Tanh(), patches=True)
    by_both, _ = relative_error(nn.Tanh(), patches=True, groups=8)
    assert whole == pytest.approx(1025, rel=0.1)
    assert by_patch == pytest.approx(65, rel=0.1)
    assert by_both == pytest.approx(9, rel=0.1)


def test_units_that_a_relu_turns_off_make_no_noise():
    """q then counts those that are on: about half."""
    whole, on = relative_error(nn.ReLU())
    by_both, _ = relative_error(nn.ReLU(), patches=True, groups=8)
    assert 0.45 < on < 0.55
    assert whole == pytest.approx(1024 * on + 1, rel=0.1)
    assert by_both == pytest.approx(8 * on + 1, rel=0.35)  # a group has 8 units: how many are on varies
    assert by_both < 7


# ---- losses, the network -------------------------------------------------------------------------


def test_any_loss_and_another_one_for_the_blocks():
    """Their exact gradients reach the heads."""
    x, y = torch.randn(9, 6), torch.arange(9) % CLASSES
    modules = [nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, CLASSES)]
    settings = {"local_loss": contrastive_loss, "head": mlp_projection}
    first, last = components(modules, x, **settings)
    heads = list(first.head.parameters())
    found = gradients(first, Signal(x, y))[-len(heads) :]
    wanted = torch.autograd.grad(contrastive_loss(first.head(first.block(x)), y), heads)
    assert all(close(a, b, 1e-12) for a, b in zip(found, wanted, strict=True))
    s = first.block(x).detach()
    assert close(last(Signal(s, y))[1], F.cross_entropy(modules[1](s), y), 1e-12)
    numbers = torch.randn(9, CLASSES)
    learner = pw.LocalForwardGradient(
        pw.Blocks(modules, x), CLASSES, loss=F.mse_loss, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    losses = learner.step(x, numbers)
    assert torch.isfinite(losses).all()


def test_a_local_mixer_learns_with_losses_of_patches_and_groups():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    x, y = torch.randn(300, 1, 4, 4), torch.arange(300) % CLASSES
    x[torch.arange(300), 0, 1 + y % 2, y] += 3
    modules = mixer(channels=32, groups=8)
    learner = pw.LocalForwardGradient(
        pw.Blocks(modules, x[:2]),
        CLASSES,
        patches=True,
        groups=8,
        head=average_head,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    )

    def score_after_an_epoch():
        for batch in torch.randperm(300).split(50):
            learner.step(x[batch], y[batch])
        return (learner.predict(x).argmax(1) == y).float().mean()

    assert any(score_after_an_epoch() > 0.85 for _ in range(40))


def test_the_mixer_is_made_of_what_the_paper_has():
    modules = local_mixer((3, 32, 32), 10, patches=8, channels=64, groups=16, blocks=3)
    assert [type(module) for module in modules] == [nn.Sequential, MixerBlock, MixerBlock, nn.Sequential]
    shapes = pw.Blocks(modules, torch.randn(2, 3, 32, 32)).shapes
    assert shapes == ((3, 32, 32), (64, 64), (64, 64), (64, 64), (10,))
    z = NormedMap(8, 6)(torch.randn(5, 8, 3))
    assert close(z.mean(1) + 1, torch.ones(5, 3), 1e-12)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert modules[0][0].__class__(2)(image)[0, :, 1].tolist() == [2, 3, 6, 7]
    with pytest.raises(ValueError, match="must divide"):
        local_mixer((1, 5, 5), 10, patches=2)


def test_channels_that_are_no_whole_groups_are_refused():
    x, y = torch.randn(4, 6), torch.arange(4) % CLASSES
    component = components([nn.Linear(6, 8), nn.Linear(8, CLASSES)], x, groups=3)[0]
    with pytest.raises(pw.BlockError, match="8 channels, which groups=3 does not divide"):
        component(Signal(x, y))
    with pytest.raises(ValueError, match="groups"):
        components([nn.Linear(6, CLASSES)], x, groups=0)
