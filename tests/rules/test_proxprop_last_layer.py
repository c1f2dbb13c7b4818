"""The paper's last layer by one argument, and conjugate gradients on a layer as one vector."""

import pytest
import torch
from algebra import move_of, relative
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")


def find_updates(model: nn.Module, x: Tensor, y: Tensor, rule: pw.Rule | None, **attach: str) -> dict:
    model.zero_grad()
    if rule is not None:
        rule.attach(model, **attach)
    cross_entropy(model(x), y).backward()
    if rule is not None:
        rule.detach()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def chain() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4))
    return model, torch.randn(11, 7), torch.randint(4, (11,))


@pytest.mark.parametrize("solver", ["exact", "cg", "cg_flat", "cg_official"])
def test_the_explicit_last_layer_is_the_excluded_one(solver):
    model, x, y = chain()
    excluded = find_updates(model, x, y, pw.ProxProp(0.3, solver), exclude="4")
    explicit = find_updates(model, x, y, pw.ProxProp(0.3, solver, last_layer="explicit"))
    implicit = find_updates(model, x, y, pw.ProxProp(0.3, solver))
    assert all(torch.equal(excluded[name], explicit[name]) for name in excluded)
    assert not torch.equal(implicit["4.weight"], explicit["4.weight"])
    assert torch.equal(implicit["0.weight"], explicit["0.weight"])


class Reader(nn.Module):
    """The layer that is last in the model's order is the first one of the network; the head runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.body = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        return self.head(h) + self.head(h.square())


def test_the_last_layer_is_the_one_that_backward_meets_first_in_all_its_calls():
    model, x, y = Reader(), torch.randn(8, 7), torch.randint(3, (8,))
    plain = find_updates(model, x, y, None)
    excluded = find_updates(model, x, y, pw.ProxProp(), exclude="head")
    explicit = find_updates(model, x, y, pw.ProxProp(last_layer="explicit"))
    assert relative(explicit["head.weight"], plain["head.weight"]) < 1e-14
    assert torch.equal(explicit["body.weight"], excluded["body.weight"])
    assert relative(explicit["body.weight"], plain["body.weight"]) > 0.1


def test_the_table_says_where_the_step_is_explicit():
    model, x, y = chain()
    rule = pw.ProxProp(last_layer="explicit").attach(model)
    cross_entropy(model(x), y).backward()
    rows = rule.explain(11).rows
    assert [row.treatment for row in rows] == ["ProxProp", "ProxProp", "ProxProp: explicit step"]
    assert rows[2].cost == 0 < rows[1].cost
    rule.detach()


LAYERS = {
    "linear": lambda: (nn.Linear(6, 4), torch.randn(15, 6)),
    "wide linear": lambda: (nn.Linear(12, 4), torch.randn(5, 12)),
    "conv": lambda: (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(3, 4, 6, 7)),
    "one image": lambda: (nn.Conv2d(8, 2, 3, bias=False), torch.randn(1, 8, 4, 5)),
}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("make", LAYERS)
def test_flat_conjugate_gradients_are_the_textbooks_on_one_vector(make, steps):
    """Without matrices, as the paper has it: the layer's forward, and its backward for parameters."""
    layer, x = LAYERS[make]()
    delta = torch.randn_like(layer(x))
    parameters = list(layer.parameters())
    sizes = [p.numel() for p in parameters]

    def transpose(image: Tensor) -> Tensor:
        slopes = torch.autograd.grad((layer(x) * image).sum(), parameters)
        return torch.cat([slope.flatten() for slope in slopes])

    def apply(vector: Tensor) -> Tensor:
        parts = [v.reshape(p.shape) for v, p in zip(vector.split(sizes), parameters, strict=True)]
        state = dict(zip([name for name, _ in layer.named_parameters()], parts, strict=True))
        with torch.no_grad():
            image = torch.func.functional_call(layer, state, (x,))
        return transpose(image) + vector / 0.7

    residual = transpose(delta)
    solution, direction = torch.zeros_like(residual), residual.clone()
    for _ in range(steps):
        curved = apply(direction)
        alpha = residual @ residual / (direction @ curved)
        solution = solution + alpha * direction
        before, residual = residual, residual - alpha * curved
        direction = residual + residual @ residual / (before @ before) * direction
    weight, *bias = solution.split(sizes)
    expected = torch.cat([weight.reshape(len(parameters[0]), -1), *(b[:, None] for b in bias)], 1)
    assert relative(move_of(pw.ProxProp(0.7, "cg_flat", steps), layer, x, delta), expected) < 1e-10


def test_flat_steps_get_there_later():
    """The objective falls in each step, but never below that of steps with scalars for each output."""
    layer, x = nn.Linear(12, 3), torch.randn(40, 12)
    delta = torch.randn(40, 3) * torch.tensor([1.0, 10.0, 0.1])
    A = torch.cat([x, torch.ones(40, 1)], 1)
    M, G = A.T @ A + torch.eye(13) / 2, delta.T @ A

    def objective(solver: str, steps: int) -> float:
        v = move_of(pw.ProxProp(2.0, solver, steps), layer, x, delta)
        return (0.5 * (v @ M * v).sum() - (v * G).sum()).item()

    flat = [objective("cg_flat", steps) for steps in range(1, 7)]
    assert flat == sorted(flat, reverse=True)
    assert all(objective("cg", steps + 1) < value for steps, value in enumerate(flat))
