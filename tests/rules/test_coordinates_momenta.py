"""Momenta under Coordinates are in other coordinates, so every step is turned back, whatever led to it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plywise import Coordinates

INPUTS = torch.randn(16, 5, generator=torch.Generator().manual_seed(1)) * torch.tensor([4.0, 2, 1, 1, 0.3])
FACTORS = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
OFTEN = {"stats_every": 1, "refresh_every": 1, "slowdown": 1}
SELDOM = {"stats_every": 5, "refresh_every": 5, "slowdown": 1}


class Layer(nn.Linear):
    """A layer that can use its weight in a way that rules leave to the optimizer."""

    is_odd = False

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight[:1].expand(4, 5) if self.is_odd else self.weight
        return F.linear(x, weight, self.bias)


class Training:
    """A layer in training; the gradient of its loss does not depend on its weights."""

    def __init__(self, settings: dict[str, int], steps: int, **options: float) -> None:
        torch.manual_seed(0)
        self.model = Layer(5, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})
        self.rule = Coordinates(power=0.25, **settings).attach(self.model, self.optimizer)
        for _ in range(steps):
            self.step()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        (self.model(INPUTS) * FACTORS).sum().backward()

    def step(self) -> Tensor:
        self.backward()
        return self.move()

    def move(self) -> Tensor:
        """Take the optimizer's step alone; return how the weights moved."""
        before = self.read()
        self.optimizer.step()
        return self.read() - before

    def read(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def clear(run: Training) -> None:
    run.optimizer.zero_grad(set_to_none=False)


def clear_and_freeze(run: Training) -> None:
    clear(run)
    run.model.requires_grad_(False)


def clear_and_train_paused(run: Training) -> None:
    clear(run)
    with run.rule.paused():
        (0 * run.model(INPUTS)).sum().backward()


def assign_zeros(run: Training) -> None:
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("settings", [OFTEN, SELDOM])
@pytest.mark.parametrize("prepare", [clear, clear_and_freeze, clear_and_train_paused, assign_zeros])
def test_momentum_alone_goes_on_in_its_direction(
    settings: dict[str, int], prepare: Callable[[Training], None]
) -> None:
    run = Training(settings, 7)
    last = run.step()
    prepare(run)
    for _ in range(2):
        move = run.move()
        torch.testing.assert_close(move, 0.9 * last, rtol=1e-3, atol=1e-3)  # the basis may be a newer one
        last = move


@pytest.mark.parametrize("settings", [OFTEN, SELDOM])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_two_steps_on_one_gradient(settings: dict[str, int], decay: float) -> None:
    run, other = (Training(settings, 7, weight_decay=decay) for _ in range(2))
    run.backward()
    plain = [p.grad.clone() for p in run.model.parameters()]
    run.move()
    assert all(map(torch.equal, plain, (p.grad for p in run.model.parameters())))
    other.step()
    other.backward()
    torch.testing.assert_close(run.move(), other.move(), rtol=1e-3, atol=1e-5)


def test_a_step_that_fails_leaves_the_gradient() -> None:
    run, other = (Training(SELDOM, 7) for _ in range(2))
    for one in (run, other):
        one.backward()

    def fail(*args: object) -> None:
        raise KeyError

    handle = run.optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyError):
        run.move()
    handle.remove()
    assert torch.equal(run.move(), other.move())


def test_the_momentum_of_a_layer_that_is_left_alone_is_turned_back() -> None:
    run, other = (Training(OFTEN, 7) for _ in range(2))
    for one in (run, other):
        one.model.is_odd = True
        if one is run:
            one.step()
        else:
            with one.rule.paused():
                one.step()
            one.rule.detach()
    torch.testing.assert_close(run.step(), other.step())
    assert not run.rule.explain().rows[0].handled
    assert not any(run.rule.statistics.values())
