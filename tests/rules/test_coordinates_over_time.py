"""How the bases of Coordinates follow the inputs: which steps gather and refresh, and what is kept."""

import pytest
import torch
from coordinates_cases import gradient, make_data, matrix_of, new_layer, train
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")

RATE = 0.05


def test_later_bases_follow_the_running_covariance() -> None:
    layer = new_layer()
    optimizer = SGD(layer.parameters(), RATE)
    rule = pw.Coordinates(stats_every=1, refresh_every=1, slowdown=1, decay=0.5).attach(layer, optimizer)
    total, count = torch.zeros(6, 6), 0.0
    for number in range(40):
        train(layer, optimizer, range(number % 3, number % 3 + 1))
        total, count = 0.5 * total + gradient(number % 3)[1] * 12, 0.5 * count + 12
    state = rule.statistics[""]
    assert torch.allclose(state["input"][0].tril(), total.tril(), rtol=1e-9)
    Q = state["input.vectors"][0]
    inside = Q.T @ (total / count) @ Q
    off = inside - torch.diag(inside.diagonal())
    assert off.norm() < 0.1 * inside.norm()


@pytest.mark.parametrize(
    ("slowdown", "gathered"),
    [
        (1, [*range(90)]),
        (3, [0, 1, *range(2, 8, 2), *range(9, 90, 3)]),
        (8, [0, 1, *range(2, 8, 2), *range(8, 32, 4), *range(32, 90, 8)]),
    ],
)
def test_intervals_grow_with_the_square_root_of_the_steps(slowdown: int, gathered: list[int]) -> None:
    layer = new_layer()
    optimizer = SGD(layer.parameters(), 0.0)
    rule = pw.Coordinates(stats_every=1, refresh_every=1, slowdown=slowdown).attach(layer, optimizer)
    seen, before = [], 0.0
    for number in range(90):
        train(layer, optimizer, range(number, number + 1))
        count = float(rule.statistics[""]["input.count"])
        seen += [number] if count != before else []
        before = count
    assert seen == gathered


def test_a_sample_takes_turns_when_intervals_have_grown() -> None:
    """A sequence whose even positions are ones and whose odd positions are zeros."""
    layer = nn.Linear(1, 2)
    optimizer = SGD(layer.parameters(), 0.0)
    rule = pw.Coordinates(stats_every=1, refresh_every=1, decay=0.5, sample=2).attach(layer, optimizer)
    x = torch.tensor([1.0, 0.0]).repeat(4).reshape(1, 8, 1)
    energies, before = [], 0.0
    for _ in range(40):
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()
        energy = float(rule.statistics[""]["input"][0, 0, 0])
        energies += [energy - 0.5 * before] if energy != before else []
        before = energy
    assert energies[-5:] in ([0.0, 4.0, 0.0, 4.0, 0.0], [4.0, 0.0, 4.0, 0.0, 4.0])


@pytest.mark.parametrize("number", [1, 2, 5, 8, 13, 21])
def test_a_run_goes_on_after_a_resume_while_intervals_grow(number: int) -> None:
    def make() -> tuple[nn.Linear, torch.optim.Optimizer]:
        layer = new_layer()
        optimizer = AdamW(layer.parameters(), RATE)
        pw.Coordinates(stats_every=1, refresh_every=1, tolerance=0).attach(layer, optimizer)
        return layer, optimizer

    (whole, made), (first, stopped), (second, resumed) = make(), make(), make()
    train(whole, made, range(30))
    train(first, stopped, range(number))
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    train(second, resumed, range(number, 30))
    assert torch.equal(matrix_of(second), matrix_of(whole))


@pytest.mark.parametrize("rank", [None, 3])
def test_vectors_are_kept_while_they_have_not_drifted(rank: int | None) -> None:
    """Their scales follow the running covariance all the same."""
    layer = nn.Linear(9, 4)
    optimizer = SGD(layer.parameters(), 0.0)
    settings = {"rank": rank, "stats_every": 1, "refresh_every": 1, "slowdown": 1, "decay": 0.5}
    rule = pw.Coordinates(tolerance=0.3, **settings).attach(layer, optimizer)

    def take_step(scale: Tensor | float) -> dict[str, Tensor]:
        optimizer.zero_grad()
        x, delta = make_data(0, 9)
        ((layer(x * scale) * delta).sum()).backward()
        optimizer.step()
        return {name: value.clone() for name, value in rule.statistics[""].items()}

    first = [take_step(1.0) for _ in range(3)][-1]
    alike = take_step(torch.linspace(1.02, 1, 9))
    other = take_step(torch.linspace(9, 0.1, 9))
    moved = [name for name in first if name.startswith("input.") and name != "input.vectors"]
    assert torch.equal(first["input.vectors"], alike["input.vectors"])
    assert any(not torch.equal(first[name], alike[name]) for name in moved)
    assert not torch.allclose(other["input.vectors"], alike["input.vectors"], atol=1e-3)


@pytest.mark.parametrize("width", [4, 600])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_whose_rate_is_zero_stays(name: str, width: int) -> None:
    """Turned back, a step moves all of its layer: the column of the bias is turned with the others."""
    layer = nn.Linear(300, width)
    others = [p for key, p in layer.named_parameters() if key != name]
    groups = [{"params": others}, {"params": [getattr(layer, name)], "lr": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    pw.Coordinates(stats_every=1, refresh_every=1).attach(layer, optimizer)
    before = {key: p.detach().clone() for key, p in layer.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 300) + 1).square().sum().backward()
        optimizer.step()
    assert {key for key, p in layer.named_parameters() if torch.equal(p, before[key])} == {name}
