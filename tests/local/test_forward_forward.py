"""Forward-Forward: its two passes written out, its labels, its predictions."""

import pytest
import torch
from moves import Recorded, batch, relative, tanh_blocks
from torch.nn.functional import softplus

import plywise as pw
from plywise.local.forward_forward import goodness, normalize, write_label

C, THRESHOLD = 3, 0.7


def put(x, y, num_classes):
    """Labels over the last numbers."""
    return torch.cat([x[:, :-num_classes], torch.eye(num_classes, dtype=x.dtype)[y]], 1)


def learner_of(modules, x, recorded=None, **settings):
    settings = {"put": put, "threshold": THRESHOLD, **settings}
    return pw.ForwardForward(pw.Blocks(modules, x), C, optimizer=recorded or Recorded(), **settings)


def test_each_block_follows_the_loss_of_its_goodness():
    """With the wrong labels that the first component draws, seen in its input."""
    modules, (x, y), recorded = tanh_blocks((8, 7, 6, 5)), batch(9, 8), Recorded()
    learner = learner_of(modules, x, recorded)
    seen = []
    modules[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    losses = learner.step(x, y)
    s, wanted, expected = seen[0], [], []
    right, wrong = s[:, -C:].argmax(1).chunk(2)
    assert torch.equal(right, y)
    assert (wrong != y).all()
    for block in modules:
        state = {key: value.clone() for key, value in block.state_dict().items()}
        with torch.no_grad():  # back to the weights before the step
            for p, g in zip(block.parameters(), recorded.of([block]), strict=True):
                p.add_(g, alpha=recorded.rate)
        s = block(s.detach())
        g = (s**2).mean(1)
        expected.append((softplus(THRESHOLD - g[:9]) + softplus(g[9:] - THRESHOLD)).mean())
        wanted += torch.autograd.grad(expected[-1], block.parameters(), retain_graph=True)
        s = s / ((s**2).mean(1, keepdim=True) + 1e-8).sqrt()
        block.load_state_dict(state)
    torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=1e-9, atol=0)
    assert relative(recorded.of(modules), wanted) < 1e-9


@pytest.mark.parametrize("skip", [0, 1, 9])
def test_the_label_with_the_most_goodness_is_predicted(skip):
    modules, (x, _) = tanh_blocks((8, 7, 6, 5)), batch(4, 8)
    scores = learner_of(modules, x, skip=skip).predict(x)
    for label in range(C):
        s, total = normalize(put(x, torch.full((4,), label), C)), 0
        for number, block in enumerate(modules):
            s = block(s)
            total = total + (goodness(s) if number >= min(skip, 2) else 0)
            s = normalize(s)
        torch.testing.assert_close(scores[:, label], total)


def test_the_next_block_sees_nothing_of_the_goodness():
    s = torch.randn(5, 2, 3, 3, dtype=torch.float64) * torch.arange(1.0, 6).view(5, 1, 1, 1)
    torch.testing.assert_close(goodness(normalize(s)), torch.ones(5, dtype=torch.float64))
    assert torch.equal(normalize(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_hintons_labels_stand_in_the_first_numbers():
    x = torch.rand(2, 1, 4, 4) + 1
    labelled = write_label(x, torch.tensor([1, 0]), C).flatten(1)
    assert labelled[:, :C].tolist() == [[0, x[0].max(), 0], [x[1].max(), 0, 0]]
    assert torch.equal(labelled[:, C:], x.flatten(1)[:, C:])
    assert (x >= 1).all()


def test_it_tells_classes_apart():
    torch.manual_seed(0)
    x, y = torch.randn(90, 8), torch.arange(90) % C
    x[torch.arange(90), 3 + y] += 4
    layers = [torch.nn.Sequential(torch.nn.Linear(n, 64), torch.nn.ReLU()) for n in (8, 64)]
    learner = pw.ForwardForward(pw.Blocks(layers, x), C, optimizer=lambda p: torch.optim.Adam(p, 0.01))
    for _ in range(150):
        learner.step(x, y)
    assert (learner.predict(x).argmax(1) == y).float().mean() > 0.8


def test_what_it_refuses():
    modules, (x, _) = tanh_blocks(), batch(4, 5)
    blocks = pw.Blocks(modules, x)
    with pytest.raises(pw.PlywiseError, match="2 classes"):
        pw.ForwardForward(blocks, 1, optimizer=Recorded())
    with pytest.raises(ValueError, match="threshold"):
        pw.ForwardForward(blocks, 3, threshold=0.0, optimizer=Recorded())
    with pytest.raises(ValueError, match="skip"):
        pw.ForwardForward(blocks, 3, skip=-1, optimizer=Recorded())
