"""What cannot be cut: the error says where and why, and the model stays as it is."""

import itertools

import pytest
import torch
from split_models import Doubles, chain, mlp, nested_noise, owners
from torch import nn

import plywise as pw


def net(forward, **children):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

    Net.forward = forward
    return Net()


def pair(forward, **more):
    return net(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8), **more)


def data_dependent(self, x):
    if x.sum() > 0:
        x = self.a(x)
    return self.b(self.a(x))


def without_autograd(self, x):
    with torch.no_grad():
        x = self.a(x)
    return self.b(x)


def remembers(self, x):
    self.hidden = self.a(x)
    return self.b(self.hidden)


def replaced():
    model = pair(lambda self, x: self.b(self.a(x)))
    model.forward = model.a.forward
    return model


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


def hooked():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_forward_hook(lambda *_: None)
    return model


def uncopyable():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].stream = (_ for _ in ())
    return model


COUNTER = itertools.count(1)


def transposed():
    turn = net(lambda self, x: x.transpose(0, 1))
    return nn.Sequential(nn.Linear(8, 8), turn, nn.Linear(6, 6), nn.Linear(6, 6), turn, nn.Linear(8, 8))


REFUSALS = {
    "writes": (
        lambda: nn.Sequential(nn.Linear(8, 8), Doubles(), nn.Linear(8, 8)),
        3,
        r"into 2 at most \('0', '2'\), .* '1' writes into what it gets",
    ),
    "no block": (mlp, 0, "1 block or more, a whole number, not 0"),
    "less than none": (mlp, -2, "1 block or more, a whole number, not -2"),
    "more than units": (
        mlp,
        6,
        r"Sequential can be cut into 5 at most \('0', '1', '4', '5', '6'\), and 6",
    ),
    "one layer": (lambda: nn.Linear(8, 8), 2, "Linear cannot be cut: it is a layer of torch's own"),
    "no parameters": (lambda: nn.Sequential(nn.ReLU(), nn.Tanh()), 2, "into 1 at most"),
    "nothing": (nn.Sequential, 2, "into 0 at most"),
    "skip": (
        lambda: net(lambda self, x: (y := self.a(x)) + self.b(y), a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
        3,
        "into 2 at most",
    ),
    "long skip": (
        lambda: pair(lambda self, x: self.b((y := self.a(x)) + x) + y, c=nn.ReLU()),
        2,
        r"in the model \(Net\) more than one tensor crosses after 'a': the input, 'a'",
    ),
    "nested": (nested_noise, 4, r"'1.0' \(Noisy\) stays whole: its forward does different things in train"),
    "control flow": (
        lambda: pair(data_dependent),
        2,
        r"control flow \(at 'if x.sum\(\) > 0:', line \d+ of test_split",
    ),
    "two inputs": (lambda: pair(lambda self, x, y: self.b(self.a(x) + y)), 2, "argument: 'y'"),
    "two outputs": (
        lambda: pair(lambda self, x: (self.a(x), self.b(x))),
        2,
        "returns a tuple, not one tensor",
    ),
    "a tuple inside": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8)), 2, "hands on a tuple"),
    "rows": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Flatten(0)),
        2,
        r"\(12,\) for 6 samples",
    ),
    "rows inside": (transposed, 4, r"into 3 at most .* '2' hands on \(8, 6\) for 6 samples"),
    "noise": (
        lambda: pair(lambda self, x: self.b(self.a(x) + torch.randn(8))),
        2,
        "makes a tensor from no input",
    ),
    "no autograd": (lambda: pair(without_autograd), 2, r"switches autograd .* \(at 'x = self.a\(x\)'"),
    "attribute": (lambda: pair(remembers), 2, "sets the attribute 'hidden'"),
    "unused": (lambda: pair(lambda self, x: self.b(x)), 2, "does not use its parameter 'a.weight'"),
    "a clock": (lambda: pair(lambda self, x: self.b(self.a(x) * next(COUNTER))), 2, "different things"),
    "a type": (
        lambda: pair(lambda self, x: self.b(self.a(x) * isinstance(x, torch.Tensor))),
        2,
        "does not do what torch.fx traced",
    ),
    "tied": (tied, 2, "'2.weight' and '0.weight' are one tensor"),
    "hooks": (hooked, 2, "it has hooks"),
    "replaced": (replaced, 2, "its forward has been replaced"),
    "uncopyable": (uncopyable, 2, "cannot be copied"),
    "example": (
        lambda: nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)),
        2,
        "fails on the example in train mode",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_where_and_why_and_leave_the_model(name):
    build, k, reason = REFUSALS[name]
    model = build()
    attributes = {part: dict(vars(part)) for part in model.modules()}
    random = torch.get_rng_state()
    with pytest.raises(pw.BlockError, match=reason):
        pw.split(model, k, torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    assert {part: dict(vars(part)) for part in model.modules()} == attributes
    assert torch.equal(torch.get_rng_state(), random)


def test_refusals_show_the_way_out():
    with pytest.raises(pw.BlockError, match=r"blocks of your own: Blocks\(\[...\], example\)"):
        pw.split(tied(), 2, torch.randn(6, 8))


def test_uses_of_a_tied_parameter_stay_together():
    model = nn.Sequential(nn.Linear(8, 8), tied(), nn.Linear(8, 8))
    owner = owners(pw.split(model, 3, torch.randn(6, 8)))
    assert owner == {
        "0.weight": 0,
        "0.bias": 0,
        "1.0.weight": 1,
        "1.0.bias": 1,
        "1.2.bias": 1,
        "2.weight": 2,
        "2.bias": 2,
    }


def test_a_hooked_module_stays_whole_and_its_hooks_run():
    model, x, seen = nn.Sequential(nn.Linear(8, 8), hooked()), torch.randn(6, 8), []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(pw.BlockError, match=r"'1' \(Sequential\) stays whole: it has hooks"):
        pw.split(model, 3, x)
    blocks = pw.split(model, 2, x)
    seen.clear()
    chain(blocks, x)
    assert seen == [1]
