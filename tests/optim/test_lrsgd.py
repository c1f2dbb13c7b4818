"""LRSGD: its rule against a transcription, its lengths, and what it reduces to."""

import pytest
import torch

from plywise.optim import LRSGDC, LRSGDR, ProximalAnchor
from plywise.optim.lrsgd import draw_geometric

KINDS = {"random": (LRSGDR, {"stop": 0.2, "seed": 4}), "constant": (LRSGDC, {"inner_steps": 4})}


def start(shape=(5, 3)):
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))


def noise(steps, shape=(5, 3)):
    """The same noisy gradients of ½‖w − 1‖² for everyone."""
    generator = torch.Generator().manual_seed(1)
    offsets = torch.randn((steps, *shape), dtype=torch.float64, generator=generator)
    return [lambda w, offset=offset: (w - 1 + offset).detach() for offset in offsets]


def run(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient(weight)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_rule_written_out(kind):
    """w_ref ← w; for i < M: d = g + 2λ(w − w_ref) + wd w; buffer = μ buffer + d; w ← w − ηᵢ buffer."""
    make, settings = KINDS[kind]
    rate, strength, momentum, decay = 0.05, 0.02, 0.8, 1e-3
    weight, gradients = start(), noise(60)
    optimizer = make([weight], rate, strength, momentum, decay, **settings)
    found = run(optimizer, weight, gradients)

    w, buffer, given, loop = start().detach(), torch.zeros(5, 3, dtype=torch.float64), iter(gradients), 0
    left = len(gradients)
    while left:
        length = 4 if kind == "constant" else draw_geometric(0.2, 4, loop)
        reference, loop = w.clone(), loop + 1
        for i in range(min(length, left)):
            d = next(given)(w) + 2 * (strength / rate) * (w - reference) + decay * w
            buffer = momentum * buffer + d
            w = w - (rate / (i + 1) if kind == "constant" else rate) * buffer
            left -= 1
    torch.testing.assert_close(found, w, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (LRSGDR, {"strength": 0.0}),
        (LRSGDR, {"stop": 1.0, "strength": 0.5}),
        (LRSGDC, {"inner_steps": 1, "strength": 0.5}),
    ],
)
def test_without_a_pull_or_with_loops_of_one_step_it_is_sgd_bit_for_bit(make, settings):
    ours, theirs, gradients = start(), start(), noise(30)
    mine = make([ours], 0.05, momentum=0.9, weight_decay=1e-3, **settings)
    sgd = torch.optim.SGD([theirs], 0.05, momentum=0.9, weight_decay=1e-3)
    assert torch.equal(run(mine, ours, gradients), run(sgd, theirs, gradients))


def test_equals_sgd_with_a_proximal_anchor():
    ours, theirs, gradients = start(), start(), noise(24)
    mine = LRSGDR([ours], 0.05, 0.02, 0.9, 0.0, stop=0.2)
    found = run(mine, ours, gradients)
    sgd, anchor = torch.optim.SGD([theirs], 0.05, momentum=0.9), ProximalAnchor([theirs])
    ends = torch.tensor([draw_geometric(0.2, 0, loop) for loop in range(24)]).cumsum(0).tolist()
    for step, gradient in enumerate(gradients):
        if step in ends:
            anchor.refresh()
        theirs.grad = gradient(theirs)
        anchor.add_gradient(2 * 0.02 / 0.05)
        sgd.step()
    torch.testing.assert_close(found, theirs.detach(), rtol=1e-13, atol=1e-13)


def test_first_step_of_each_loop_has_no_penalty():
    """With a strength that throws weights far away, the first step of a loop is still the loss's own."""
    weight = start()
    optimizer = LRSGDC([weight], 0.1, strength=1.0, momentum=0.0, weight_decay=0.0, inner_steps=3)
    for step in range(9):
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved = weight.detach() - before
        without_penalty = torch.allclose(moved, torch.full_like(moved, -0.1), rtol=1e-9)
        assert without_penalty == (step % 3 == 0)


def test_in_one_long_loop_the_limit_is_between_anchor_and_minimum():
    """On ½‖w − t‖² with the anchor at 0 the limit is t / (1 + 2λ)."""
    weight, target = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)), torch.tensor([1.0, -2.0, 0.5])
    optimizer = LRSGDR([weight], 0.1, strength=0.05, momentum=0.9, weight_decay=0.0, stop=1e-9)
    run(optimizer, weight, [lambda w: (w - target).detach()] * 600)
    torch.testing.assert_close(weight.detach(), target.double() / (1 + 2 * 0.05 / 0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_over_many_loops_the_limit_is_the_minimum_itself(kind):
    make, settings = KINDS[kind]
    weight, target = start(), 0.7
    run(make([weight], 0.2, weight_decay=0.0, **settings), weight, [lambda w: (w - target).detach()] * 600)
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, target).detach())


def test_pull_does_not_depend_on_the_rate():
    """λ = strength / lr: on a flat loss a step without momentum takes 2·strength of the distance back."""
    for rate in (0.01, 0.5):
        weight = start()
        optimizer = LRSGDR([weight], rate, strength=0.05, momentum=0.0, weight_decay=0.0, stop=1e-9)
        anchor = weight.detach().clone()
        run(optimizer, weight, [torch.zeros_like])
        with torch.no_grad():
            weight.add_(1.0)
        run(optimizer, weight, [torch.zeros_like] * 3)
        torch.testing.assert_close(weight.detach() - anchor, torch.full_like(anchor, 0.9**3))


@pytest.mark.parametrize("stop", [0.05, 0.1, 0.5, 1.0])
def test_lengths_are_geometric(stop):
    lengths = torch.tensor(
        [draw_geometric(stop, seed=2, draw=draw) for draw in range(4000)], dtype=torch.float64
    )
    deviation = (1 - stop) ** 0.5 / stop
    assert abs(lengths.mean() - 1 / stop) <= 4 * deviation / 4000**0.5
    assert abs((lengths == 1).double().mean() - stop) <= 4 * (stop * (1 - stop) / 4000) ** 0.5
    assert lengths.min() == 1


def test_seeds_give_other_lengths_and_the_same_seed_the_same():
    by_seed = [[draw_geometric(0.1, seed, draw) for draw in range(20)] for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1] != by_seed[2]


def test_anchor_follows_a_parameter_that_got_no_gradient_when_its_loop_began():
    """Moved by hand meanwhile, it is not pulled back to where it was loops ago."""
    busy, rare = start(), start()
    optimizer = LRSGDC([busy, rare], 0.1, strength=0.2, momentum=0.0, weight_decay=0.0, inner_steps=2)
    for step in range(5):
        busy.grad = torch.zeros_like(busy)
        rare.grad = torch.zeros_like(rare) if step == 0 else None
        if step == 1:
            with torch.no_grad():
                rare.fill_(9.0)
        optimizer.step()
    rare.grad = torch.zeros_like(rare)
    optimizer.step()
    assert torch.equal(rare.detach(), torch.full_like(rare, 9.0))
