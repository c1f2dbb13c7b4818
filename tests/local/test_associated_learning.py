"""Associated Learning, property by property (A1-A14 of the method's check list), in float64."""

import copy
import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plywise as pw
from plywise.local.associated_learning import AssociatedComponent
from plywise.local.associated_maps import (
    apart_encoder,
    mean_decoder,
    paper_encoder,
    pooled_bridge,
    sigmoid_decoder,
    wide_bridge,
)
from plywise.local.associated_networks import (
    cnn_blocks,
    he_normal_,
    mlp_blocks,
    resnet_blocks,
    vgg_blocks,
)
from plywise.local.component import Signal

CLASSES = 3


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def adam(groups) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=1e-2)


def make(depth: int = 3, seed: int = 1, optimizer=adam) -> pw.AssociatedLearning:
    torch.manual_seed(seed)
    widths = [6] + [8] * depth
    body = [nn.Sequential(nn.Linear(a, b), nn.ELU()) for a, b in pairwise(widths)]
    parts = pw.AssociatedLearning(pw.Blocks(body, torch.zeros(2, 6)), CLASSES, code=5, optimizer=optimizer)
    for number, trainer in enumerate(parts.trainers):  # the same draws, whatever the depth
        torch.manual_seed(seed + number)
        for parameter in trainer.component.parameters():
            nn.init.normal_(parameter, std=0.4)
    return parts


def data(number: int = 0, rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(rows, 6, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def slow_losses(learner: pw.AssociatedLearning, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(associated, autoencoder) loss of each component, row by row, with every row's own code."""
    s, t, losses = x, F.one_hot(y, CLASSES).to(x), []
    for trainer in learner.trainers:
        c = trainer.component
        s_next, t_next = c.block(s.detach()), c.encoder(t.detach())
        associated = (c.bridge(s_next) - t_next.detach()).square().mean()
        losses.append((associated, (c.decoder(t_next) - t.detach()).square().mean()))
        s, t = s_next, t_next
    return losses


def parameters(learner: pw.AssociatedLearning) -> list[Tensor]:
    return [p for trainer in learner.trainers for p in trainer.component.parameters()]


def gradients(learner: pw.AssociatedLearning, x: Tensor, y: Tensor) -> list[Tensor]:
    """What one step hands to the optimizers."""
    found: list[Tensor] = []
    signal = learner.signal(x, y)
    for trainer in learner.trainers:
        signal, loss = trainer.component(signal)
        signal = signal.detached()
        found += torch.autograd.grad(loss, list(trainer.component.parameters()))
    return found


def test_a1_each_loss_moves_its_own_maps_only() -> None:
    learner = make()
    for i, (associated, autoencoder) in enumerate(slow_losses(learner, *data())):
        for loss, own in ((associated, ("block", "bridge")), (autoencoder, ("encoder", "decoder"))):
            for j, trainer in enumerate(learner.trainers):
                for name, parameter in trainer.component.named_parameters():
                    (g,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
                    mine = i == j and name.startswith(own)
                    assert (g is not None and bool(g.any())) == mine, (i, j, name)


def test_a2_a14_the_class_table_is_every_rows_own_code() -> None:
    """One loss a component, with codes by class and weights n_c/N, is the sum of 2L losses by row."""
    learner = make()
    x, y = data()
    total = sum(a + b for a, b in slow_losses(learner, x, y))
    expected = torch.autograd.grad(total, parameters(learner))
    for ours, theirs in zip(gradients(learner, x, y), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-14 * max(1, theirs.abs().max())


def test_a3_local_gradients_by_central_differences() -> None:
    learner = make(depth=2)
    x, y = data()
    found = gradients(learner, x, y)
    step = 1e-5
    for parameter, g in zip(parameters(learner), found, strict=True):
        component = next(
            i for i, t in enumerate(learner.trainers) for p in t.component.parameters() if p is parameter
        )
        names = dict(learner.trainers[component].component.named_parameters())
        name = next(n for n, p in names.items() if p is parameter)
        which = 0 if name.startswith(("block", "bridge")) else 1
        index = tuple(0 for _ in parameter.shape)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
                values.append(slow_losses(learner, x, y)[component][which])
                parameter[index] -= sign * step
        assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(
            float(g[index]), rel=1e-5, abs=1e-9
        )


def test_a4_one_adam_with_two_rates_is_an_adam_for_each_loss() -> None:
    one = make()
    many = copy.deepcopy([t.component for t in one.trainers])
    each = [
        torch.optim.Adam([p for part in parts for p in part.parameters()], lr=rate)
        for c in many
        for parts, rate in (((c.block, c.bridge), 1e-2), ((c.encoder, c.decoder), 2e-2))
    ]
    for number in range(5):
        x, y = data(number)
        one.step(x, y)
        signal = one.signal(x, y)
        for component in many:
            signal, loss = component(signal)
            signal = signal.detached()
            loss.backward()
        for optimizer in each:
            optimizer.step()
            optimizer.zero_grad()
    theirs = [p for component in many for p in component.parameters()]
    assert all(map(torch.equal, parameters(one), theirs))


def test_a5_the_order_of_updates_does_not_matter() -> None:
    stage_by_stage, at_the_end = make(), make()
    for number in range(4):
        stage_by_stage.step(*data(number))
        found = gradients(at_the_end, *data(number))
        for parameter, g in zip(parameters(at_the_end), found, strict=True):
            parameter.grad = g
        for trainer in at_the_end.trainers:
            trainer.apply()
    assert all(map(torch.equal, parameters(stage_by_stage), parameters(at_the_end)))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a6_the_path_and_its_shortcuts(depth: int) -> None:
    learner = make()
    x, _ = data()
    components = [t.component for t in learner.trainers[:depth]]
    value = x
    for component in components:
        value = component.block(value)
    value = components[-1].bridge(value)
    for component in reversed(components):
        value = component.decoder(value)
    module = learner.as_module(depth)
    assert torch.equal(module(x), value)
    used = {id(p) for p in module.parameters()}
    assert not used & {id(p) for t in learner.trainers[depth:] for p in t.component.parameters()}
    if depth == 3:
        assert torch.equal(learner.predict(x), value)


def test_a7_codes_belong_to_classes() -> None:
    learner = make()
    signal = learner.signal(*data())
    for trainer in learner.trainers:
        signal, _ = trainer.component(signal)
        assert signal.codes is not None
        assert len(signal.codes) == CLASSES


def test_a8_nothing_flows_upstream() -> None:
    whole, garbled = make(), make()
    with torch.no_grad():
        for parameter in garbled.trainers[2].component.parameters():
            parameter.normal_()
    for number in range(4):
        whole.step(*data(number))
        garbled.step(*data(number))
    for i in (0, 1):
        pairs = zip(*(one.trainers[i].component.parameters() for one in (whole, garbled)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a9_a_component_may_be_added_later() -> None:
    two, three = make(depth=2), make(depth=3)
    for number in range(4):
        two.step(*data(number))
        three.step(*data(number))
    ours, theirs = parameters(two), parameters(three)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))
    assert len(theirs) > len(ours)


@pytest.mark.parametrize("layer", [nn.Linear(800, 900), nn.Conv2d(40, 300, 5)])
def test_a11_initialisation(layer: nn.Module) -> None:
    torch.manual_seed(0)
    he_normal_(layer)
    weight = layer.weight.detach()
    sigma = math.sqrt(2 / weight[0].numel())
    assert float(weight.std()) == pytest.approx(sigma, rel=3 / math.sqrt(2 * weight.numel()) + 1e-3)
    assert float(weight.abs().max()) <= 2 * sigma / 0.8796
    assert not layer.bias.any()


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_codes_begin_apart_at_any_depth(classes: int) -> None:
    """What a sigmoid gets has mean 0 and mean square 1 over classes; the paper's layers shrink it."""
    kept, lost = torch.eye(classes), torch.eye(classes)
    for depth in range(8):
        torch.manual_seed(depth)
        ours = apart_encoder(kept, 32)
        torch.manual_seed(depth)
        papers = paper_encoder(lost, 32)
        got = ours[0](kept)
        assert got.mean(0).abs().max() < 1e-12
        assert got.square().mean().item() == pytest.approx(1.0)
        if depth == 0:  # the paper's draws, in another unit
            ratio = ours[0].weight / papers[0].weight
            assert torch.allclose(ratio, ratio[:1, :1])
        kept, lost = ours(kept), papers(lost)
        assert kept.std(0).mean() > 0.1
    assert lost.std(0).mean() < 0.01


@pytest.mark.parametrize("depth", [1, 3])
def test_decoders_begin_at_the_mean_of_what_they_rebuild(depth: int) -> None:
    torch.manual_seed(0)
    inputs, codes = [torch.eye(CLASSES)], torch.eye(CLASSES)
    for _ in range(depth):
        encoder = apart_encoder(codes, 32)
        with torch.no_grad():
            codes = encoder(codes)
        inputs.append(codes)
    below, above = inputs[-2:]
    decoder, papers = mean_decoder(above, below), sigmoid_decoder(above, below)
    torch.testing.assert_close(decoder(above.mean(0)), below.mean(0), rtol=1e-4, atol=1e-4)
    errors = [(made(above) - below).square().mean() for made in (decoder, papers)]
    assert errors[0] < errors[1]
    assert torch.isfinite(mean_decoder(torch.ones(1, 4), torch.eye(1))(torch.ones(1, 4))).all()


def test_a_learner_gives_its_decoders_what_they_rebuild() -> None:
    given: list[tuple[torch.Size, torch.Size]] = []

    def keep(codes: Tensor, below: Tensor) -> nn.Module:
        given.append((codes.shape, below.shape))
        return mean_decoder(codes, below)

    learner = pw.AssociatedLearning(
        pw.Blocks([nn.Linear(6, 6), nn.Linear(6, 6)], torch.zeros(2, 6)),
        CLASSES,
        code=5,
        decoder=keep,
        optimizer=torch.optim.Adam,
    )
    assert given == [((CLASSES, 5), (CLASSES, CLASSES)), ((CLASSES, 5), (CLASSES, 5))]
    codes = torch.eye(CLASSES)
    for trainer in learner.trainers:
        component = trainer.component
        above = component.encoder(codes)
        torch.testing.assert_close(component.decoder(above.mean(0)), codes.mean(0), rtol=1e-4, atol=1e-4)
        codes = above


def test_one_class_needs_no_distance() -> None:
    assert torch.isfinite(apart_encoder(torch.eye(1), 4)(torch.eye(1))).all()


def test_the_learner_chains_its_encoders() -> None:
    """By default each layer's codes of the classes are made from the codes of the one before."""
    torch.manual_seed(0)
    body = [nn.Linear(6, 6) for _ in range(5)]
    adams = {"code": 7, "optimizer": adam}
    learner = pw.AssociatedLearning(pw.Blocks(body, torch.zeros(2, 6)), CLASSES, **adams)
    codes = torch.eye(CLASSES)
    for trainer in learner.trainers:
        got = trainer.component.encoder[0](codes)
        assert got.square().mean().item() == pytest.approx(1.0)
        codes = trainer.component.encoder(codes)
    papers = pw.AssociatedLearning(
        pw.Blocks(body, torch.zeros(2, 6)), CLASSES, encoder=paper_encoder, **adams
    )
    assert not any(trainer.component.encoder[0].bias.any() for trainer in papers.trainers)


def test_a12_sizes_of_the_papers_mnist_mlp() -> None:
    torch.set_default_dtype(torch.float32)
    blocks = pw.Blocks(mlp_blocks(784, 1024), torch.zeros(2, 1, 28, 28))
    learner = pw.AssociatedLearning(blocks, 10, code=1024, optimizer=torch.optim.Adam)
    assert sum(p.numel() for p in learner.as_module().parameters()) == 13_405_194
    assert sum(p.numel() for p in parameters(learner)) == 24_957_962


NETWORKS = {
    "cnn": (cnn_blocks, 1, 28, [(32, 28, 28), (32, 14, 14), (64, 14, 14), (64, 7, 7)]),
    "vgg": (vgg_blocks, 3, 32, [(256, 16, 16), (512, 8, 8), (512, 2, 2), (1024,)]),
    "resnet": (resnet_blocks, 3, 32, [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_shapes_of_the_papers_networks(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    make_blocks, channels, size, shapes = NETWORKS[name]
    blocks = pw.Blocks(make_blocks(channels), torch.zeros(2, channels, size, size))
    assert [tuple(shape) for shape in blocks.shapes[1:]] == shapes


def test_a_depth_that_no_resnet_has() -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        resnet_blocks(depth=19)


@pytest.mark.parametrize("shape", [(16, 28, 28), (8, 3, 2), (40,)])
def test_a_pooled_bridge_is_a_wide_one_of_what_is_pooled(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    bridge = pooled_bridge(torch.Size(shape), 6)
    x = torch.randn(2, *shape)
    assert bridge(x).shape == (2, 6)
    linear = [layer for layer in bridge.modules() if isinstance(layer, nn.Linear)]
    positions = min(shape[1], 4) * min(shape[2], 4) if len(shape) == 3 else 1
    assert [layer.weight.shape for layer in linear] == [(30, shape[0] * positions), (6, 30)]


def test_wide_bridge_is_the_papers() -> None:
    layers = [type(layer) for layer in wide_bridge(torch.Size((4, 2, 2)), 6)]
    assert layers == [nn.Flatten, nn.Linear, nn.Sigmoid, nn.Linear, nn.Sigmoid]


def test_a_component_takes_its_blocks_dtype() -> None:
    bridge, encoder = wide_bridge(torch.Size((4,)), 3), paper_encoder(torch.eye(CLASSES), 3)
    decoder = sigmoid_decoder(torch.zeros(1, 3), torch.zeros(1, CLASSES))
    component = AssociatedComponent(nn.Linear(6, 4).half(), bridge, encoder, decoder)
    assert {p.dtype for p in component.parameters()} == {torch.float16}
    x, y = data()
    component.float()
    signal, _ = component(Signal(x.float(), y, torch.eye(CLASSES, dtype=torch.float32)))
    assert signal.s.dtype == torch.float32
