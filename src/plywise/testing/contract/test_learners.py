"""What every local learner promises: it learns, same bits, resume, clear refusals, no trace."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.engine.health import SKIPPED
from plywise.testing.cases import LearnerCase
from plywise.testing.contract.learners import CLASSES, copy_parameters, copy_state, format_numbers, make_data
from plywise.testing.contract.models import have_same_bits, save_and_load


def test_it_learns(learner_case: LearnerCase) -> None:
    """A learner must classify a simple set after 200 steps."""
    learner = learner_case.make(**({"scheduler": None} if learner_case.optimizes else {}))
    x, y = make_data(1000, 90)
    before, rows, right = copy_parameters(learner), [], 0.0
    for number in range(200):
        rows.append(learner.step(*make_data(number, 30)))
        if number % 20 == 19:
            right = (learner.predict(x).argmax(1) == y).float().mean().item()
            if right > 0.7:
                return
    still = [name for name, value in copy_parameters(learner).items() if torch.equal(value, before[name])]
    unmoved = f" Parameters that never changed: {', '.join(still[:4])}." if still else ""
    pytest.fail(
        f"It is right about {right:.0%} of new samples, and must be of more than 70 %; the losses of its "
        f"components went from {format_numbers(rows[0])} to {format_numbers(rows[-1])}.{unmoved}"
    )


def test_same_seed_same_bits(learner_case: LearnerCase) -> None:
    """The same seed must give the same numbers, bit for bit."""
    results = []
    for noise in (0, 1):
        learner = learner_case.make()
        torch.manual_seed(noise)  # the caller's random numbers are nobody's business
        for number in range(4):
            learner.step(*make_data(number))
        results.append(copy_state(learner))
    same = have_same_bits(*results)
    assert same, (
        f"Two learners of one seed are not alike after 4 steps: {same}. Draw all random numbers by torch in "
        "a component's forward."
    )


@pytest.mark.parametrize("other", ["seed", "step"])
def test_another_seed_or_step_draws_other_numbers(learner_case: LearnerCase, other: str) -> None:
    """The random numbers of a component must depend on the seed and on the step."""
    if learner_case.draws_nothing:
        pytest.skip(learner_case.draws_nothing)
    results = []
    for value in (0, 1):
        learner = learner_case.make(seed=value if other == "seed" else 0)
        learner.steps = value if other == "step" else 0
        learner.step(*make_data(0))
        results.append(copy_parameters(learner))
    assert not have_same_bits(*results), (
        f"With another {other} the same batch gave the same numbers, though a block has dropout. Pass `seed` "
        "on to Learner, and seed nothing in a component."
    )


def test_the_callers_random_numbers_go_on(learner_case: LearnerCase) -> None:
    """The caller's random number generator must be left as it was."""
    learner = learner_case.make()
    torch.manual_seed(5)
    learner.step(*make_data(0))
    learner.predict(make_data(0)[0])
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)), (
        "step or predict drew from it. Draw in a component's forward, which has random numbers of its own."
    )


def test_three_chained_resumes(learner_case: LearnerCase) -> None:
    """A learner that loads a saved state must go on bit for bit."""
    unbroken, run = learner_case.make(), learner_case.make()
    for number in range(8):
        unbroken.step(*make_data(number))
        run.step(*make_data(number))
        if number in (0, 2, 5):
            state = save_and_load(run.state_dict())
            run = learner_case.make(weights=9)  # other weights, to be overwritten
            run.load_state_dict(state)
    same = have_same_bits(copy_state(run), copy_state(unbroken))
    assert same, (
        f"After three resumes it is not where the uninterrupted one is: {same}. Keep what the next step "
        "needs in parameters and in persistent buffers, which state_dict holds."
    )
    x, _ = make_data(50)
    assert torch.equal(run.predict(x), unbroken.predict(x)), "After three resumes it predicts something else."


def test_another_learners_state_is_refused(learner_case: LearnerCase) -> None:
    """The state of another learner must be refused by a StateError, and change nothing."""
    learner = learner_case.make()
    before = copy_state(learner)
    kind = pw.Interlocking if isinstance(learner, pw.LocalLoss) else pw.LocalLoss
    with pytest.raises(pw.StateError, match=kind.__name__):
        learner.load_state_dict(LearnerCase("other", kind).make().state_dict())
    state = learner_case.make().state_dict()
    with pytest.raises(pw.StateError, match=f"{len(learner.trainers) - 1} components"):
        learner.load_state_dict({**state, "trainers": state["trainers"][:-1]})
    assert have_same_bits(copy_state(learner), before)


@pytest.mark.parametrize("damaged", [{}, [], None, {"learner": "LocalLoss"}])
def test_a_damaged_state_is_refused(learner_case: LearnerCase, damaged: Any) -> None:
    """A damaged state must be refused by a StateError that says what is missing."""
    learner = learner_case.make()
    with pytest.raises(pw.StateError, match="no state of a learner"):
        learner.load_state_dict(damaged)
    state = learner.state_dict()
    first, *rest = state["trainers"]
    for key in first:
        part = {name: value for name, value in first.items() if name != key}
        with pytest.raises(pw.StateError, match="no state of component 0"):
            learner.load_state_dict({**state, "trainers": [part, *rest]})
    if first["optimizer"] is not None:
        part = {**first, "optimizer": {"state": first["optimizer"]["state"]}}
        with pytest.raises(pw.StateError, match="does not fit component 0"):
            learner.load_state_dict({**state, "trainers": [part, *rest]})


BAD = {
    "empty": (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long), "at least one"),
    "fewer targets": (torch.zeros(4, 6), torch.zeros(3, dtype=torch.long), "4 inputs, 3 targets"),
    "floats": (torch.zeros(4, 6), torch.zeros(4), "class indices"),
    "one-hot": (torch.zeros(4, 6), torch.zeros(4, 3, dtype=torch.long), "class indices"),
    "too large": (torch.zeros(4, 6), torch.tensor([0, 1, 2, 3]), r"0 … 2; this batch has 0 … 3"),
    "negative": (torch.zeros(4, 6), torch.tensor([0, 1, 2, -1]), r"this batch has -1 … 2"),
}


@pytest.mark.parametrize("what", list(BAD))
def test_a_bad_batch_is_named_and_changes_nothing(learner_case: LearnerCase, what: str) -> None:
    """A bad batch must raise a PlywiseError that says what is wrong, and change nothing."""
    x, y, words = BAD[what]
    learner = learner_case.make()
    if learner_case.takes_any_targets and what not in ("empty", "fewer targets"):
        pytest.skip(learner_case.takes_any_targets)
    learner.step(*make_data(0))
    before = copy_state(learner)
    refused_by: Exception | None = None
    try:
        learner.step(x, y)
    except Exception as error:
        refused_by = error
    found = "nothing" if refused_by is None else f"{type(refused_by).__name__}: {refused_by}"
    is_ours = isinstance(refused_by, pw.PlywiseError) and not refused_by.__cause__  # else a block failed
    assert is_ours, (
        f"Targets or inputs that are {what} raised {found.splitlines()[0]}. For class indices call "
        "plywise.local.learner.check_classes in `signal`; if any targets may be learned, say so in a "
        "LearnerCase (takes_any_targets)."
    )
    assert re.search(words, str(refused_by)), f"Of a batch that is {what} it says no {words!r}: {found}"
    same = have_same_bits(copy_state(learner), before)
    assert same, f"A batch that is {what} was refused, and had changed the learner: {same}."
    assert learner.steps == 1, f"A batch that is {what} was refused, and counts as a step."


def test_a_batch_that_is_not_finite(learner_case: LearnerCase) -> None:
    """A batch with a NaN must not change the weights: the step is skipped with a warning, or refused."""
    learner = learner_case.make()
    learner.step(*make_data(0))
    parameters = [p for t in learner.trainers for p in t.component.parameters()]
    before = [p.detach().clone() for p in parameters]
    x, y = make_data(1)
    x[0, 0] = float("nan")
    if learner_case.raises:
        with pytest.raises(pw.NonFiniteError, match="NaN or infinity"):
            learner.step(x, y)
    else:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learner.step(x, y)
        assert any("not finite" in str(one.message) for one in said), (
            "There was no warning: no gradient depends on the batch, or the trainers do not step."
        )
        assert all(t.health.total(SKIPPED) == 1 for t in learner.trainers), "Not every component skipped it."
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True)), (
        "The batch with a NaN changed parameters."
    )


def test_odd_batch_ends(learner_case: LearnerCase) -> None:
    """Batches of any size must give a finite loss for each component, without a graph."""
    learner = learner_case.make()
    for number, rows in enumerate((8, 3, 8, 2)):
        losses = learner.step(*make_data(number, rows))
        assert losses.shape == (len(learner.trainers),), (
            f"step returned losses of shape {tuple(losses.shape)} of {len(learner.trainers)} components"
        )
        assert torch.isfinite(losses).all(), f"The losses of a batch of {rows} are {losses.tolist()}."
        assert not losses.requires_grad, "The losses that step returns have a graph: detach them."


def test_blocks_that_begin_in_place(learner_case: LearnerCase) -> None:
    results = []
    for in_place in (False, True):
        torch.manual_seed(1)
        modules = [
            nn.Linear(6, 10),
            nn.Sequential(nn.SiLU(in_place), nn.Linear(10, 10), nn.BatchNorm1d(10)),
            nn.Sequential(nn.SiLU(in_place), nn.Linear(10, CLASSES)),
        ]
        try:
            learner = learner_case.make(modules=modules)
            for number in range(3):
                learner.step(*make_data(number))
        except pw.BlockError as error:
            assert in_place
            pytest.skip(f"it refuses them: {error}")
        results.append(learner.predict(make_data(3)[0]))
    assert torch.equal(*results)


def test_no_gradient_leaves_it(learner_case: LearnerCase) -> None:
    learner = learner_case.make()
    x, y = make_data(0)
    x.requires_grad_()
    learner.step(x, y)
    assert x.grad is None


def test_callbacks_get_every_step(learner_case: LearnerCase) -> None:
    """Each callback must be called after each step, with its number and losses."""
    reports = []
    learner = learner_case.make(callbacks=[reports.append])
    losses = [learner.step(*make_data(number)) for number in range(3)]
    assert [report.step for report in reports] == [1, 2, 3], (
        f"A callback was called with the steps {[report.step for report in reports]} of 1, 2, 3. Pass "
        "`callbacks` on to Learner."
    )
    assert all(torch.equal(a.losses, b) for a, b in zip(reports, losses, strict=True))


def test_predicting_changes_nothing(learner_case: LearnerCase) -> None:
    """Prediction must change nothing, and give each sample a score for each class by its own values."""
    learner = learner_case.make()
    learner.step(*make_data(0))
    before = copy_state(learner)
    modes = [part.training for trainer in learner.trainers for part in trainer.component.modules()]
    x, _ = make_data(1)
    scores = learner.predict(x)
    assert scores.shape == (8, CLASSES), (
        f"predict gave scores of shape {tuple(scores.shape)} for 8 samples of {CLASSES} classes"
    )
    assert not scores.requires_grad, "The scores have a graph: predict without gradients."
    assert torch.allclose(learner.predict(x[:1]), scores[:1], atol=1e-6), (
        "The scores of a sample depend on the batch that it is in: predict in eval mode."
    )
    same = have_same_bits(copy_state(learner), before)
    assert same, f"predict changed the learner: {same}."
    assert modes == [part.training for t in learner.trainers for part in t.component.modules()], (
        "predict left blocks in another mode (train or eval) than before."
    )


def test_as_module_is_a_plain_module(learner_case: LearnerCase) -> None:
    """`as_module` must return a module that can be saved, and predicts what `predict` does."""
    learner = learner_case.make()
    learner.step(*make_data(0))
    module = learner.as_module()
    assert isinstance(module, nn.Module), f"as_module returned a {type(module).__name__}, and no nn.Module"
    copy = save_and_load(module, weights_only=False).eval()
    x, _ = make_data(2)
    with torch.no_grad():
        assert torch.equal(copy(x), learner.predict(x)), "The saved module predicts something else."
