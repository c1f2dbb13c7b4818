"""Direct feedback alignment: its formula, and the two cases in which it is backpropagation."""

import pytest
import torch
from moves import (
    Recorded,
    backprop,
    batch,
    conv_blocks,
    counting_forwards,
    moves,
    relative,
    same_bits,
    tanh_blocks,
)
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import plywise as pw


def feedback_of(learner):
    return [trainer.component.feedback for trainer in learner.trainers]


def test_the_formula():
    """∇W = ((e B) ⊙ φ'(z)) sᵀ for blocks tanh(W s + b), e the gradient of the mean loss."""
    modules, (x, y), recorded = tanh_blocks(), batch(9, 5), Recorded()
    learner = pw.DirectFeedback(pw.Blocks(modules, x), optimizer=recorded)
    s = [x]
    for block in modules:
        s.append(block(s[-1]).detach())
    e = (s[-1].softmax(1) - nn.functional.one_hot(y, 3)) / len(y)
    for number, (block, B) in enumerate(zip(modules[:-1], feedback_of(learner)[:-1], strict=True)):
        assert B.abs().max() <= B.shape[1] ** -0.5
        delta = (e @ B) * (1 - s[number + 1] ** 2)
        block.wanted = delta.T @ s[number], delta.sum(0)
    losses = learner.step(x, y)
    assert torch.equal(losses, losses[:1].expand(4))
    for block in modules[:-1]:
        assert relative(recorded.of([block]), block.wanted) < 1e-12
    last = e.T @ s[-2], e.sum(0)
    assert relative(recorded.of(modules[-1:]), last) < 1e-12


def test_with_the_weights_above_as_feedback_it_is_backpropagation():
    """Of a linear network, where the product of all weights above is the true way back."""
    torch.manual_seed(0)
    modules = [nn.Linear(m, n).double() for m, n in ((5, 7), (7, 6), (6, 3))]
    x, y = batch(9, 5)
    wanted, recorded = backprop(modules, cross_entropy, x, y), Recorded()
    learner = pw.DirectFeedback(pw.Blocks(modules, x), optimizer=recorded)
    first, second, _ = feedback_of(learner)
    with torch.no_grad():
        second.copy_(modules[2].weight)
        first.copy_(modules[2].weight @ modules[1].weight)
    learner.step(x, y)
    assert relative(recorded.of(modules), wanted) < 1e-12


def test_one_block_is_backpropagation_and_any_loss_will_do():
    network, (x, _) = [nn.Sequential(*tanh_blocks())], batch(9, 5)
    y = torch.randn(9, 3, dtype=torch.float64)
    wanted = backprop(network, mse_loss, x, y)
    assert same_bits(moves(pw.DirectFeedback, network, x, y, loss=mse_loss), wanted)


def test_feedback_never_changes_and_is_saved():
    modules, (x, y) = conv_blocks(), batch(8, 2, 8, 8)
    learner = pw.DirectFeedback(pw.Blocks(modules, x), optimizer=Recorded())
    before = [None if B is None else B.clone() for B in feedback_of(learner)]
    with counting_forwards(modules) as counts:
        for _ in range(3):
            learner.step(x, y)
    assert list(counts.values()) == [3] * len(modules)
    assert before[-1] is None
    assert same_bits(feedback_of(learner)[:-1], before[:-1])
    other = pw.DirectFeedback(pw.Blocks(conv_blocks(), x), optimizer=Recorded())
    other.load_state_dict(learner.state_dict())
    assert same_bits(feedback_of(other)[:-1], before[:-1])


def test_weights_align_with_the_feedback():
    """Trained, the hidden gradient agrees with backpropagation's: its cosine grows to above 0.5."""
    torch.manual_seed(1)
    x = torch.randn(200, 10, dtype=torch.float64)
    y = (x[:, :3] @ torch.randn(3, 3, dtype=torch.float64)).argmax(1)
    modules = tanh_blocks((10, 30, 3))

    def cosine():
        true = backprop(modules, cross_entropy, x, y)[0]
        return torch.cosine_similarity(true.flatten(), recorded.of(modules)[0].flatten(), 0).item()

    recorded = Recorded(rate=0.3)
    learner = pw.DirectFeedback(pw.Blocks(modules, x), optimizer=recorded)
    true = backprop(modules, cross_entropy, x, y)[0]
    learner.step(x, y)
    before = torch.cosine_similarity(true.flatten(), recorded.of(modules)[0].flatten(), 0).item()
    for _ in range(300):
        learner.step(x, y)
    assert cosine() > max(0.5, before)


def test_scores_that_are_no_row_of_classes_are_refused():
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    with pytest.raises(pw.BlockError, match="one score for each class"):
        pw.DirectFeedback(pw.Blocks(conv_blocks()[:2], x), optimizer=Recorded())
