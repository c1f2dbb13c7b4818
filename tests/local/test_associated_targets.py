"""Associated Learning beyond its default: kinds of maps, targets, codes that learn, decay, text."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from moves import Recorded, relative
from torch import nn

import plywise as pw
from plywise.local.associated_maps import (
    find_output_range,
    linear_decoder,
    sigmoid_decoder,
    tanh_bridge,
    tanh_decoder,
    tanh_encoder,
    wide_bridge,
)
from plywise.local.associated_networks import BasicBlock
from plywise.local.associated_text import StatefulLSTM, lstm_text, transformer_text

TANH = {"bridge": tanh_bridge, "encoder": tanh_encoder, "decoder": tanh_decoder}


def body(depth=3):
    widths = [6] + [8] * depth
    return pw.Blocks(
        [nn.Sequential(nn.Linear(a, b), nn.ELU()) for a, b in pairwise(widths)], torch.zeros(2, 6)
    )


def learner_of(outputs=3, blocks=None, optimizer=None, **settings):
    optimizer = optimizer or (lambda groups: torch.optim.Adam(groups, lr=1e-2))
    return pw.AssociatedLearning(blocks or body(), outputs, code=5, optimizer=optimizer, **settings)


# ---- maps of a kind ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"encoder": tanh_encoder}, r"The bridge of component 0 makes numbers in 0 … 1, .* in -1 … 1"),
        ({**TANH, "decoder": sigmoid_decoder}, "The decoder of component 1"),
        ({**TANH, "bridge": wide_bridge}, "The bridge of component 0"),
        ({"encoder": lambda codes, width: nn.Linear(codes.shape[1], width)}, r"component 0 .* -inf … inf"),
    ],
)
def test_maps_that_cannot_meet_are_refused(wrong, part):
    with pytest.raises(pw.BlockError, match=part):
        learner_of(**wrong)


def test_wider_ranges_and_unknown_ones_pass():
    class Own(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer = nn.Linear(5, width)

        def forward(self, x):
            return self.layer(x).sigmoid()

    learner_of(decoder=linear_decoder)
    learner_of(decoder=lambda codes, below: Own(below.shape[1]))
    assert find_output_range(Own(3)) is None
    assert find_output_range(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == (0, torch.inf)


# ---- targets -------------------------------------------------------------------------------------


def test_every_sample_has_its_own_codes_of_labels():
    """As classes do, if they are written as labels: the same gradients, one row a sample."""
    x, y, found, state = torch.randn(9, 6), torch.arange(9) % 3, [], None
    for targets in ("classes", "labels"):
        recorded = Recorded()
        learner = learner_of(optimizer=recorded, targets=targets)
        state = state or copy.deepcopy(learner.state_dict())
        learner.load_state_dict(state)
        learner.step(x, y if targets == "classes" else F.one_hot(y, 3))
        found.append(recorded.of(t.component for t in learner.trainers))
    assert relative(*found) < 1e-5


def test_several_labels_at_once():
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    y = (x[:, :4] > 0).float()
    learner = learner_of(4, targets="labels")
    for _ in range(300):
        learner.step(x, y)
    assert ((learner.predict(x) > 0.5) == y.bool()).float().mean() > 0.85
    with pytest.raises(pw.PlywiseError, match="0 or 1"):
        learner.step(x, 2 * y)
    with pytest.raises(pw.PlywiseError, match=r"4 labels a sample, not of shape \(200, 3\)"):
        learner.step(x, y[:, :3])


def test_numbers():
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    y = torch.stack([x[:, 0] + x[:, 1], x[:, 2] * 2], 1)
    learner = learner_of(2, targets="numbers")
    for _ in range(400):
        learner.step(x, y)
    assert F.mse_loss(learner.predict(x), y) < 0.3 * y.var()
    assert learner.predict(x).min() < -0.5


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="targets must be one of 'classes', 'labels', 'numbers', not 'words'"
    ):
        learner_of(targets="words")
    with pytest.raises(ValueError, match="a name in decay must be one of 'block', 'bridge', 'encoder'"):
        learner_of(decay={"f": 0.1})


# ---- what learns from what -----------------------------------------------------------------------


@pytest.mark.parametrize("detach", [True, False])
def test_codes_may_learn_from_the_bridge(detach):
    recorded, x, y = Recorded(), torch.randn(9, 6), torch.arange(9) % 3
    learner = learner_of(optimizer=recorded, detach_target=detach)
    component = learner.trainers[0].component
    codes = component.encoder(torch.eye(3))
    decoded = F.mse_loss(component.decoder(codes)[y], F.one_hot(y, 3).float())
    bridge = component.bridge(component.block(x))
    associated = F.mse_loss(bridge, (codes.detach() if detach else codes)[y])
    wanted = torch.autograd.grad(associated + decoded, component.parameters())
    learner.step(x, y)
    assert relative(recorded.of([component]), wanted) < 1e-5


def test_the_first_decoder_may_follow_a_loss_of_its_own():
    recorded, x, y = Recorded(), torch.randn(9, 6), torch.arange(9) % 3
    learner = learner_of(optimizer=recorded, loss=F.cross_entropy, decoder=linear_decoder)
    first, second = (trainer.component for trainer in learner.trainers[:2])
    codes = first.encoder(torch.eye(3))
    wanted = torch.autograd.grad(F.cross_entropy(first.decoder(codes)[y], y), first.decoder.parameters())
    again = second.encoder(codes.detach())
    rebuilt = F.mse_loss(second.decoder(again)[y], codes.detach()[y])
    wanted += torch.autograd.grad(rebuilt, second.decoder.parameters())
    learner.step(x, y)
    assert relative(recorded.of([first.decoder, second.decoder]), wanted) < 1e-5


def test_each_map_has_its_own_decay():
    """SGD without gradients (a frozen loss) shows the decay alone: it shrinks weights by rate times decay."""
    learner = learner_of(
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), decay={"block": 0.5, "decoder": 0.25}
    )
    component, optimizer = learner.trainers[0].component, learner.trainers[0].optimizer
    before = {name: p.detach().clone() for name, p in component.named_parameters()}
    for p in component.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    factors = {"block": 1 - 0.1 * 0.5, "bridge": 1.0, "encoder": 1.0, "decoder": 1 - 2 * 0.1 * 0.25}
    for name, p in component.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * factors[name.partition(".")[0]])


# ---- the authors' networks -----------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "stride"), [((4, 4), 1), ((4, 8), 2)])
def test_the_residual_block_is_the_authors_equation(channels, stride):
    """elu(elu(bn(conv(elu(bn(conv(x)))))) + skip(x)), each step written out."""
    torch.manual_seed(0)
    block, x = BasicBlock(*channels, stride).double(), torch.randn(3, 4, 8, 8).double()
    body_, skip = dict(block.body.named_children()), block.skip

    def normal(z, norm):
        mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), keepdim=True, unbiased=False)
        return (z - mean) / (var + 1e-3).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    def elu(z):
        return torch.where(z > 0, z, z.clamp(max=0).exp() - 1)

    first = elu(normal(F.conv2d(x, body_["0"].weight, body_["0"].bias, stride, 1), body_["1"]))
    second = elu(normal(F.conv2d(first, body_["3"].weight, body_["3"].bias, 1, 1), body_["4"]))
    shortcut = x if stride == 1 else F.conv2d(x, skip.weight, skip.bias, stride)
    torch.testing.assert_close(block(x), elu(second + shortcut), rtol=1e-12, atol=1e-12)


def test_an_lstm_begins_where_the_one_before_ended():
    """Two blocks are torch's two LSTMs with the state handed over by hand."""
    torch.manual_seed(0)
    first, second = StatefulLSTM(5, 4, first=True), StatefulLSTM(8, 4, first=False)
    x = torch.randn(3, 7, 5)
    one, state = first.lstm(x)
    two, (hidden, cell) = second.lstm(one, state)
    found = second(first(x))
    assert torch.equal(found[:, :-2], two)
    assert torch.equal(found[:, -2].view(3, 2, 4).transpose(0, 1), hidden)
    assert torch.equal(found[:, -1].view(3, 2, 4).transpose(0, 1), cell)


@pytest.mark.parametrize("make", [lstm_text, transformer_text])
def test_text_is_learned(make):
    """Which of two words is in a text; as the authors have it: tanh, cross-entropy, codes that learn."""
    torch.manual_seed(0)
    sizes = {"hidden": 8} if make is lstm_text else {"heads": 2, "dim_feedforward": 16, "dropout": 0.0}
    modules, bridges = make(20, width=8, **sizes)
    x = torch.randint(5, 20, (60, 9))
    x[:, 7:] = 0
    y = torch.arange(60) % 2
    x[torch.arange(60), torch.randint(7, (60,))] = 1 + y
    settings = {**TANH, "bridge": bridges, "loss": F.cross_entropy, "detach_target": False}
    learner = learner_of(2, pw.Blocks(modules, x[:2]), **settings)
    for _ in range(150):
        learner.step(x, y)
    for depth in (1, 3):
        assert (learner.as_module(depth).eval()(x).argmax(1) == y).float().mean() > 0.9
