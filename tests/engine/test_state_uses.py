"""A statistic belongs to one way of using a weight: others share it, or the weight is left alone."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from state_runs import OPTIMIZERS, RULES, Run
from torch import Tensor, nn
from torch.optim import SGD

from plywise import AttachError, Coordinates, Rule
from plywise.testing.contract.memories import list_layers, select_layer
from plywise.testing.contract.models import have_same_bits


class Used(nn.Module):
    """Weights that are used in several ways.

    Args:
        use: what is done with the hidden layer, whose weight is 6×6, and its activations.
        head: inputs of the last layer.
    """

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor], head: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.hidden, self.head, self.use = nn.Linear(6, 6), nn.Linear(head, 3), use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(self.hidden, x)))


WITH_AND_WITHOUT = "some of its calls add its bias and others do not"

WAYS: dict[str, tuple[Callable[[nn.Linear, Tensor], Tensor], str]] = {
    "transposed too": (lambda w, x: F.linear(torch.tanh(w(x)), w.weight.t()), "in several ways"),
    "from the other side": (lambda w, x: torch.addmm(w.bias, torch.tanh(w(x)), w.weight), "in several ways"),
    "a part too": (
        lambda w, x: w(x).index_add(1, torch.arange(4), F.linear(x, w.weight[2:])),
        "in several ways",
    ),
    "parts that overlap": (
        lambda w, x: torch.cat([F.linear(x, w.weight[:3]), F.linear(x, w.weight[2:5])], 1),
        "in several ways",
    ),
    "with its bias and without": (
        lambda w, x: F.linear(torch.tanh(w(x)), w.weight),
        WITH_AND_WITHOUT,
    ),
}


def wait_for_the_step() -> Rule:
    """A rule whose updates only the step can make."""
    return Coordinates(stats_every=1, refresh_every=1)


@pytest.mark.parametrize("rule", ["foof", "rls"])
@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][1] != WITH_AND_WITHOUT])
def test_each_way_of_using_a_weight_has_a_statistic_of_its_own(rule: str, way: str) -> None:
    run = Run(RULES[rule](), OPTIMIZERS["momentum"], model=Used(WAYS[way][0])).steps(0, 1)
    other = Run(RULES[rule](), OPTIMIZERS["momentum"], 9, model=Used(WAYS[way][0]))
    other.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for one in (run, other):
        one.steps(2, 3)
        learned = {key.partition("].")[0] for key in one.copy_memory() if key.endswith("/phase")}
        assert len([key for key in learned if "/hidden" in key]) == 2, one.copy_memory().keys()
    assert have_same_bits(run.copy_state(), other.copy_state())
    assert all(row.handled for row in run.rule.explain().rows if "bias" not in row.name)
    assert not run.rule.health.counts


class OneVector(nn.Module):
    """A linear layer, and two more whose weights are parts of one vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.vector = nn.Linear(6, 6), nn.Parameter(torch.randn(6 * 6 + 3 * 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        second, third = self.vector.split([6 * 6, 3 * 6])
        return F.linear(torch.tanh(F.linear(self.first(x), second.view(6, 6))), third.view(3, 6))


@pytest.mark.parametrize("rule", ["foof", "rls", "adabk", "back_matching-mean"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_parts_of_a_vector_keep_their_statistics(rule: str, optimizer: str) -> None:
    run = Run(RULES[rule](), OPTIMIZERS[optimizer], model=OneVector()).steps(0, 1, 2)
    other = Run(RULES[rule](), OPTIMIZERS[optimizer], 9, model=OneVector())
    other.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for one in (run, other):
        one.steps(3, 4, 5)
    assert have_same_bits(run.copy_state(), other.copy_state())
    assert all(row.handled for row in run.rule.explain().rows if "bias" not in row.name)
    run.rule.detach()
    assert not [key for own in run.optimizer.state.values() for key in own if key.startswith("plywise")]


class VectorAlone(OneVector):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()


@pytest.mark.parametrize("rule", ["nlms", "foof", "rls"])
def test_a_model_of_one_vector_is_taken_as_its_layers_are(rule: str) -> None:
    ends, layers = [], nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    for model in (VectorAlone(), layers):
        if model is layers:
            second, third = VectorAlone().vector.detach().split([36, 18])
            model[0].weight.data, model[2].weight.data = second.view(6, 6).clone(), third.view(3, 6).clone()
        run = Run(RULES[rule](), OPTIMIZERS["sgd"], model=model).steps(0, 1, 2, 3)
        assert run.rule.explain().share == 1.0
        ends.append(nn.utils.parameters_to_vector(run.model.parameters()))
    torch.testing.assert_close(*ends)


def test_a_model_of_biases_is_refused_with_the_reason() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(6))

    with pytest.raises(AttachError, match="its parameters are biases"):
        Run(RULES["foof"](), OPTIMIZERS["sgd"], model=Shift())


def test_a_model_of_scales_alone_says_that_the_rule_has_no_part() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return x.abs() ** self.scale

    run = Run(RULES["nlms"](), OPTIMIZERS["sgd"], model=Scale())
    with pytest.warns(RuntimeWarning, match="functions that use its parameters are of other kinds"):
        run.steps(0, 1, 2, 3)


LEFT = [("foof", "with its bias and without"), ("rls", "with its bias and without")]


@pytest.mark.parametrize(("rule", "way"), LEFT + [("turns", way) for way in WAYS])
def test_a_weight_that_needs_one_statistic_for_several_uses_is_left_alone(rule: str, way: str) -> None:
    use, reason = WAYS[way]
    make = wait_for_the_step if rule == "turns" else RULES[rule]
    run = Run(make(), OPTIMIZERS["sgd"], model=Used(use))
    plain = copy.deepcopy(run.model)
    for number in range(4):
        plain.load_state_dict(run.model.state_dict())
        x, y = torch.randn(4, 6), torch.arange(4) % 3
        F.cross_entropy(plain(x), y).backward()
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        assert torch.allclose(run.model.hidden.weight.grad, plain.hidden.weight.grad, rtol=1e-5, atol=1e-7)
        plain.zero_grad()
        if number == 1:  # a resumed run does not know yet, and nothing says otherwise
            other = Run(make(), OPTIMIZERS["sgd"], model=Used(use))
            other.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
            other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert list_layers(run.copy_memory()) == {"head"}
    rows = [
        row for row in run.rule.explain().rows if row.name.startswith("hidden") and "bias" not in row.name
    ]
    assert rows
    for row in rows:
        assert not row.handled
        assert reason in row.reason
    assert not run.rule.health.counts
    other.step(2)
    assert list_layers(other.copy_memory()) == {"head"}


class Strided(nn.Module):
    """A convolution's weight used at two strides: the same map from patches to channels."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.head, self.apart = nn.Conv1d(1, 4, 2), nn.Linear(4, 3), apart

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.unsqueeze(1).split(3, 2)
        if self.apart:
            found = [self.conv(first)[..., ::2], F.conv1d(second, self.conv.weight, self.conv.bias, 2)]
        else:
            found = [self.conv(first), self.conv(second)]
        return self.head(torch.tanh(torch.cat(found, 2)).mean(2))


def test_calls_that_differ_in_their_stride_share_a_statistic() -> None:
    rows = []
    for apart in (True, False):
        run = Run(RULES["adabk"](), OPTIMIZERS["momentum"], model=Strided(apart)).steps(0, 1, 2)
        assert list_layers(run.copy_memory()) == {"conv", "head"}
        rows.append(int(select_layer(run.copy_memory(), "conv")["AdaBK/conv/rows"]))
    assert rows == [12, 16]  # patches of four samples: two and one of each, two and two


class Wrapper(SGD):
    """Shares everything with another optimizer, as trainers' wrappers do, but not what is replaced later."""

    def __init__(self, inside: SGD) -> None:
        self.__dict__ = dict(inside.__dict__)
        self.inside = inside

    def step(self, closure: None = None) -> None:
        self.inside.step()


def test_statistics_are_with_the_optimizer_that_steps() -> None:
    def make(seed: int) -> tuple[Run, Wrapper]:
        run = Run(RULES["foof"](), OPTIMIZERS["momentum"], seed, attach=False)
        wrapper = Wrapper(run.optimizer)
        run.rule.attach(run.model, wrapper)
        return run, wrapper

    run, _ = make(1)
    run.steps(0, 1, 2)
    other, wrapper = make(9)
    other.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert wrapper.state is not other.optimizer.state
    for one in (run, other):
        one.steps(3, 4, 5)
    assert have_same_bits(run.copy_state(), other.copy_state())
