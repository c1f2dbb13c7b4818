"""SOAP and KL-SOAP: their definitions step by step in float64, which sides have bases, turns of refreshes."""

import math

import pytest
import torch
from torch import nn

from plywise.optim import KLSOAP, SOAP

SHAPES = ((5, 5), (5, 4), (5, 5), (4, 5), (3, 2, 2), (4,))
"""Of a first gradient with no more than one dimension of null space: eigenvectors there are arbitrary."""


def draw(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(optimizer, params, steps):
    path = []
    for step in range(steps):
        for param, gradient in zip(params, draw([p.shape for p in params], step + 1), strict=True):
            param.grad = gradient.to(param.dtype)
        optimizer.step()
        path.append([param.detach().clone() for param in params])
    return path


def along(x, matrix, side):
    """The product of a tensor with a matrix along one dimension."""
    return torch.tensordot(x, matrix, dims=[[side], [0]]).movedim(-1, side)


def outer(x, side):
    others = [other for other in range(x.dim()) if other != side]
    return torch.tensordot(x, x, dims=[others, others])


def into(x, bases):
    for side, basis in bases.items():
        x = along(x, basis, side)
    return x


def back(x, bases):
    return into(x, {side: basis.T for side, basis in bases.items()})


def first_bases(grams):
    return {side: torch.linalg.eigh(gram).eigenvectors.flip(1) for side, gram in grams.items()}


def define_soap(weight, gradients, sides, lr, b1, b2, decay, every, eps=1e-8):
    """The paper's algorithm 3 as its code has it: a weight at a time, momentum outside of the bases."""
    w, mean, square, grams, path = weight, torch.zeros_like(weight), torch.zeros_like(weight), {}, []
    for t, g in enumerate(gradients):
        if t == 0:
            grams = {side: (1 - b2) * outer(g, side) for side in sides}
            bases = first_bases(grams)
            path.append(w)
            continue
        mean = b1 * mean + (1 - b1) * g
        square = b2 * square + (1 - b2) * into(g, bases) ** 2
        step = back(into(mean, bases) / (square.sqrt() + eps), bases)
        w = w - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * step
        w = w - lr * decay * w
        grams = {side: b2 * gram + (1 - b2) * outer(g, side) for side, gram in grams.items()}
        if t % every == 0:
            for side, gram in grams.items():
                values = torch.diag(bases[side].T @ gram @ bases[side])
                order = values.argsort(descending=True)
                square = square.index_select(side, order)
                bases[side] = torch.linalg.qr(gram @ bases[side][:, order]).Q
        path.append(w)
    return path


def define_kl_soap(weight, gradients, lr, b1, b2, decay, every, eps=1e-8):
    """The authors' code for a matrix."""
    w, mean, square, path = weight, torch.zeros_like(weight), torch.zeros_like(weight), []
    m, n = weight.shape
    for t, g in enumerate(gradients):
        if t == 0:
            left, right = (1 - b2) * g @ g.T / n, (1 - b2) * g.T @ g / m
            bases = first_bases({0: left, 1: right})
            rows, columns = (torch.full((size,), 0.1, dtype=g.dtype) for size in (m, n))
            path.append(w)
            continue
        mean = b1 * mean + (1 - b1) * g
        x = into(g, bases)
        square = b2 * square + (1 - b2) * x**2
        w = w - lr * back(into(mean, bases) / (square.sqrt() + eps), bases)
        w = w - lr * decay * w
        right_inverse = bases[1] @ torch.diag(1 / columns) @ bases[1].T
        left_inverse = bases[0] @ torch.diag(1 / rows) @ bases[0].T
        left = b2 * left + (1 - b2) * g @ right_inverse @ g.T / n
        right = b2 * right + (1 - b2) * g.T @ left_inverse @ g / m
        fresh = (x**2 / columns).mean(1), (x**2 / rows[:, None]).mean(0)
        # inverse roots of at most 10
        rows, columns = (
            (b2 * old + (1 - b2) * new).clamp(min=1e-2)
            for old, new in zip((rows, columns), fresh, strict=True)
        )
        if t % every == 0:
            bases = {0: torch.linalg.qr(left @ bases[0]).Q, 1: torch.linalg.qr(right @ bases[1]).Q}
        path.append(w)
    return path


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, lambda shape: range(len(shape))),
        ({"one_sided": True}, lambda shape: [0] if shape[0] <= shape[1] else [1]),
        ({"max_precondition_dim": 4}, lambda shape: [side for side, size in enumerate(shape) if size <= 4]),
        ({"max_precondition_dim": 1}, lambda shape: []),
    ],
    ids=["both sides", "one side", "small sides", "no side"],
)
def test_soap_equals_its_definition_step_by_step(settings, chosen):
    params = [nn.Parameter(value) for value in draw(SHAPES, 0)]
    optimizer = SOAP(params, 0.02, (0.9, 0.8), weight_decay=0.3, precondition_frequency=3, **settings)
    path = run(optimizer, params, 14)
    for place, weight in enumerate(draw(SHAPES, 0)):
        gradients = [draw(SHAPES, step + 1)[place] for step in range(14)]
        sides = list(chosen(weight.shape)) if weight.dim() > 1 else []
        wanted = define_soap(weight, gradients, sides, 0.02, 0.9, 0.8, 0.3, 3)
        for step, value in enumerate(wanted):
            torch.testing.assert_close(path[step][place], value, rtol=0, atol=1e-9)


def test_kl_soap_equals_its_definition_step_by_step():
    shapes = ((5, 5), (5, 4), (5, 5), (4, 5))
    params = [nn.Parameter(value) for value in draw(shapes, 0)]
    optimizer = KLSOAP(params, 0.02, (0.9, 0.8), weight_decay=0.3, precondition_frequency=3)
    path = run(optimizer, params, 14)
    for place, weight in enumerate(draw(shapes, 0)):
        gradients = [draw(shapes, step + 1)[place] for step in range(14)]
        for step, value in enumerate(define_kl_soap(weight, gradients, 0.02, 0.9, 0.8, 0.3, 3)):
            torch.testing.assert_close(path[step][place], value, rtol=0, atol=1e-8)


def test_soap_is_adam_where_nothing_has_a_basis():
    ours, theirs = ([nn.Parameter(value) for value in draw(SHAPES, 0)] for _ in range(2))
    run(SOAP(ours, 0.01, (0.9, 0.99), eps=0, weight_decay=0, max_precondition_dim=1), ours, 9)
    adam = torch.optim.Adam(theirs, 0.01, (0.9, 0.99), eps=0)
    for step in range(1, 9):  # SOAP's first step only looks
        for param, gradient in zip(theirs, draw(SHAPES, step + 1), strict=True):
            param.grad = gradient
        adam.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_float32_is_near_float64():
    shapes = ((6, 6), (6, 6))
    wide = [nn.Parameter(value) for value in draw(shapes, 0)]
    narrow = [nn.Parameter(value.float()) for value in draw(shapes, 0)]
    paths = [run(SOAP(params, 0.01), params, 12) for params in (wide, narrow)]
    for one, other in zip(paths[0][-1], paths[1][-1], strict=True):
        torch.testing.assert_close(one, other.double(), rtol=0, atol=1e-3)


def renewals(stagger, steps):
    """In which steps each side's basis changed."""
    shapes = ((6, 4), (6, 4), (6, 3))
    params = [nn.Parameter(value) for value in draw(shapes, 0)]
    optimizer = SOAP(params, 0.01, precondition_frequency=4, stagger=stagger)
    changed, before = {}, {}
    for step in range(steps):
        for param, gradient in zip(params, draw(shapes, step + 1), strict=True):
            param.grad = gradient
        optimizer.step()
        for place, param in enumerate(params):
            for name, value in optimizer.state[param].items():
                if name.startswith("basis"):
                    key = (place, name)
                    if step > 0 and not torch.equal(before[key], value):
                        changed.setdefault(key, []).append(step)
                    before[key] = value.clone()
    return changed


def test_staggered_sides_take_turns_as_often_as_the_others():
    together, apart = renewals(False, 13), renewals(True, 13)
    assert set(map(tuple, together.values())) == {(4, 8, 12)}
    assert together.keys() == apart.keys()
    assert all(
        len(steps) == 3 and steps[1] - steps[0] == steps[2] - steps[1] == 4 for steps in apart.values()
    )
    load = [sum(step in steps for steps in apart.values()) for step in range(5, 13)]
    assert max(load) == 2, "six sides in four steps"
    largest = [apart[key][0] % 4 for key in apart if key[1] == "basis_0"]
    assert len(set(largest)) == 3


def test_bases_stay_orthonormal_and_follow_the_statistics():
    generator = torch.Generator().manual_seed(5)
    weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    optimizer = SOAP([weight], 1e-3, precondition_frequency=1)
    sizes = torch.tensor([8.0, 4, 2, 1, 0.5, 0.25], dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn((6, 6), generator=generator, dtype=torch.float64)).Q
    for _ in range(400):
        noise = torch.randn((6, 8), generator=generator, dtype=torch.float64)
        weight.grad = turned @ (sizes[:, None] * noise)
        optimizer.step()
    state = optimizer.state[weight]
    basis = state["basis_0"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    inside = basis.T @ state["gram_0"] @ basis
    off = inside - torch.diag(torch.diag(inside))
    assert off.norm() < 0.1 * inside.norm()
    assert (torch.diag(inside).diff() <= 0).all()


def test_a_gradient_of_zeros_moves_nothing_but_by_decay():
    for kind in (SOAP, KLSOAP):
        weight = nn.Parameter(torch.ones(4, 3))
        optimizer = kind([weight], 0.1, weight_decay=0.5, precondition_frequency=2)
        for _ in range(5):
            weight.grad = torch.zeros(4, 3)
            optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((4, 3), 0.95**4))
