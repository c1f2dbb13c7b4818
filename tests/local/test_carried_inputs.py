"""Learners on blocks that carry a model's inputs (ids, masks): the same blocks by hand, and padding."""

import pytest
import torch
import torch.nn.functional as F
from looped_models import BATCH, IDS, MASK, Looped

import plywise as pw
from plywise import BlockError, PlywiseError
from plywise.data.models import call_model, find_scores
from plywise.local.cascaded_forward import GradientHead

Y = torch.tensor([0, 2, 1, 1])
TOKENS = torch.where(MASK > 0, IDS.roll(-1, 1), -100)


def adam(groups):
    return torch.optim.Adam(groups, lr=0.01)


def make_blocks(per_token=False, drop=0.0):
    torch.manual_seed(0)
    model = Looped(classes=11 if per_token else 3, per_token=per_token)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = drop
    return model, pw.split(model, 5, BATCH)  # as many blocks as there can be: no cut depends on a clock


LEARNERS = {
    "LocalNextToken": lambda blocks: pw.LocalNextToken(blocks, 11, optimizer=adam),
    "AssociatedLearning": lambda blocks: pw.AssociatedLearning(blocks, 3, code=8, optimizer=adam),
    "CascadedForward": lambda blocks: pw.CascadedForward(blocks, 3),
    "CascadedForward, gradient": lambda blocks: pw.CascadedForward(
        blocks, 3, head=GradientHead, optimizer=adam
    ),
    "LocalForwardGradient": lambda blocks: pw.LocalForwardGradient(blocks, 3, passes=3, optimizer=adam),
    "SCPL": lambda blocks: pw.SCPL(blocks, 3, optimizer=adam),
    "MonoForward": lambda blocks: pw.MonoForward(blocks, 3, optimizer=adam),
    "DirectFeedback": lambda blocks: pw.DirectFeedback(blocks, optimizer=adam),
}


def make(name):
    is_text = name == "LocalNextToken"
    _, blocks = make_blocks(per_token=is_text, drop=0.1)
    torch.manual_seed(1)
    return LEARNERS[name](blocks), TOKENS if is_text else Y


@pytest.mark.parametrize("name", LEARNERS)
def test_it_learns(name):
    learner, y = make(name)
    losses = torch.stack([learner.step(BATCH, y).mean() for _ in range(80)])
    assert losses.isfinite().all()
    assert losses[-10:].mean() < 0.9 * losses[:10].mean()
    assert learner.predict(BATCH).shape == ((4, 6, 11) if name == "LocalNextToken" else (4, 3))


@pytest.mark.parametrize("name", LEARNERS)
def test_what_the_padding_holds_changes_nothing(name):
    """Neither the training nor a prediction, where the model's own forward does not look at it."""
    found = []
    for filler in (0, 7):
        learner, y = make(name)
        batch = {**BATCH, "input_ids": torch.where(MASK > 0, IDS, filler)}
        for _ in range(3):
            learner.step(batch, y)
        prediction = learner.predict(batch)
        found.append(prediction[MASK > 0] if name == "LocalNextToken" else prediction)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_forward_gradient_is_right_on_average():
    """The mean over many directions is near the exact gradient of the block's own loss."""
    _, blocks = make_blocks()
    learner = pw.LocalForwardGradient(blocks, 3, passes=20000, optimizer=lambda g: torch.optim.SGD(g, lr=1.0))
    component = learner.trainers[2].component
    s = blocks[1](blocks[0](IDS, BATCH), BATCH).detach()
    weights = [component.block.get_submodule(f"layers.1.{name}").weight for name in ("feed", "mixer")]
    exact = torch.autograd.grad(component.judge(component.block(s, BATCH), Y, BATCH), weights)
    before = [weight.detach().clone() for weight in weights]
    learner.step(BATCH, Y)
    for old, new, gradient in zip(before, weights, exact, strict=True):
        moved = (old - new.detach()).flatten()
        assert F.cosine_similarity(moved, gradient.flatten(), dim=0) > 0.9
        assert moved.norm().item() == pytest.approx(gradient.norm().item(), rel=0.4)


def test_next_token_losses_are_those_of_the_targets_that_count():
    """Each block's loss, and its gradient, with -100 for targets that do not count; against torch's own."""
    model, blocks = make_blocks(per_token=True)
    learner = pw.LocalNextToken(blocks, 11, pieces=3, optimizer=lambda g: torch.optim.SGD(g, lr=1.0))
    s, wanted, gradients = None, [], []
    for trainer in learner.trainers:
        component = trainer.component
        signal = BATCH["input_ids"] if s is None else s.detach()
        s = component.block(signal, BATCH)
        scores = s if component.readout is None else component.readout(s, None)
        loss = F.cross_entropy(scores.flatten(0, 1), TOKENS.flatten(), ignore_index=-100)
        parameters = list(component.parameters())
        gradients += list(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
        wanted.append(loss.detach())
    before = [p.detach().clone() for p, _ in gradients]
    torch.testing.assert_close(learner.step(BATCH, TOKENS), torch.stack(wanted))
    for (parameter, gradient), old in zip(gradients, before, strict=True):
        torch.testing.assert_close(old - parameter.detach(), gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(learner.predict(BATCH), find_scores(call_model(model.eval(), BATCH)))


def test_targets_that_do_not_count_on_plain_blocks():
    """A rule in the heads sees the rows that count only; a batch without any moves nothing."""
    x = torch.randint(5, (6, 7), generator=torch.Generator().manual_seed(0))
    y = x.roll(-1, 1)
    y[:, 4:] = -100
    found = []
    for inputs, targets in ((x, y), (x[:, :4], y[:, :4])):
        torch.manual_seed(0)
        layers = [torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5)]
        blocks = pw.Blocks(layers, inputs)
        learner = pw.LocalNextToken(
            blocks, 5, optimizer=lambda g: torch.optim.SGD(g, lr=0.1), rule=pw.ProxProp
        )
        learner.step(inputs, targets)
        found.append([p.detach().clone() for p in learner.trainers[0].component.readout.parameters()])
        before = [p.detach().clone() for t in learner.trainers for p in t.component.parameters()]
        assert learner.step(inputs, torch.full_like(targets, -100)).eq(0).all()
        after = [p.detach() for t in learner.trainers for p in t.component.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(PlywiseError, match="must lie in"):
        learner.step(x[:, :4], y[:, :4] - 1)


@pytest.mark.parametrize(
    ("make_learner", "reason"),
    [
        (lambda b: pw.ForwardForward(b, 3, optimizer=adam), "labels are written into the inputs"),
        (lambda b: pw.MomentumAuxiliary(b, 3, optimizer=adam), "the beginning of the next block"),
        (lambda b: pw.LocalForwardGradient(b, 3, patches=True, optimizer=adam), "of each patch or group"),
    ],
)
def test_the_others_say_why_not(make_learner, reason):
    with pytest.raises(BlockError, match=reason):
        make_learner(make_blocks()[1])
