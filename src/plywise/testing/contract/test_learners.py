"""What every local learner promises: same bits, resume, clear refusals, no trace, no leak."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import plywise as pw
from plywise.engine.health import SKIPPED
from plywise.testing.cases import LearnerCase
from plywise.testing.contract.learners import CLASSES, copy_state, make_data
from plywise.testing.contract.models import have_same_bits, save_and_load


def test_it_learns(learner_case: LearnerCase) -> None:
    learner = learner_case.make(**({"scheduler": None} if learner_case.optimizes else {}))
    x, y = make_data(1000, 90)
    for number in range(200):
        learner.step(*make_data(number, 30))
        if number % 20 == 19 and (learner.predict(x).argmax(1) == y).float().mean() > 0.7:
            return
    pytest.fail("it is not right about 70 % of new samples after 200 steps")


def test_same_seed_same_bits(learner_case: LearnerCase) -> None:
    results = []
    for noise in (0, 1):
        learner = learner_case.make()
        torch.manual_seed(noise)  # the caller's random numbers are nobody's business
        for number in range(4):
            learner.step(*make_data(number))
        results.append(copy_state(learner))
    assert have_same_bits(*results)


def test_another_seed_draws_other_numbers(learner_case: LearnerCase) -> None:
    if learner_case.draws_nothing:
        pytest.skip(learner_case.draws_nothing)
    results = []
    for seed in (0, 1):
        learner = learner_case.make(seed=seed)
        learner.step(*make_data(0))
        results.append(copy_state(learner))
    assert not have_same_bits(*results)


def test_the_callers_random_numbers_go_on(learner_case: LearnerCase) -> None:
    learner = learner_case.make()
    torch.manual_seed(5)
    learner.step(*make_data(0))
    learner.predict(make_data(0)[0])
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_three_chained_resumes(learner_case: LearnerCase) -> None:
    unbroken, run = learner_case.make(), learner_case.make()
    for number in range(8):
        unbroken.step(*make_data(number))
        run.step(*make_data(number))
        if number in (0, 2, 5):
            state = save_and_load(run.state_dict())
            run = learner_case.make(seed=9)  # other weights, to be overwritten
            run.load_state_dict(state)
    assert have_same_bits(copy_state(run), copy_state(unbroken))
    x, _ = make_data(50)
    assert torch.equal(run.predict(x), unbroken.predict(x))


def test_another_learners_state_is_refused(learner_case: LearnerCase) -> None:
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
    x, y, words = BAD[what]
    learner = learner_case.make()
    if learner_case.takes_any_targets and what not in ("empty", "fewer targets"):
        pytest.skip(learner_case.takes_any_targets)
    learner.step(*make_data(0))
    before = copy_state(learner)
    with pytest.raises(pw.PlywiseError, match=words):
        learner.step(x, y)
    assert have_same_bits(copy_state(learner), before)
    assert learner.steps == 1


def test_a_batch_that_is_not_finite(learner_case: LearnerCase) -> None:
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
        assert any("not finite" in str(one.message) for one in said)
        assert all(t.health.total(SKIPPED) == 1 for t in learner.trainers)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_odd_batch_ends(learner_case: LearnerCase) -> None:
    learner = learner_case.make()
    for number, rows in enumerate((8, 3, 8, 2)):
        losses = learner.step(*make_data(number, rows))
        assert losses.shape == (len(learner.trainers),)
        assert torch.isfinite(losses).all()
        assert not losses.requires_grad


def test_callbacks_hear_of_every_step(learner_case: LearnerCase) -> None:
    heard = []
    learner = learner_case.make(callbacks=[heard.append])
    losses = [learner.step(*make_data(number)) for number in range(3)]
    assert [report.step for report in heard] == [1, 2, 3]
    assert all(torch.equal(a.losses, b) for a, b in zip(heard, losses, strict=True))


def test_predicting_changes_nothing(learner_case: LearnerCase) -> None:
    learner = learner_case.make()
    learner.step(*make_data(0))
    before = copy_state(learner)
    x, _ = make_data(1)
    scores = learner.predict(x)
    assert scores.shape == (8, CLASSES)
    assert not scores.requires_grad
    assert torch.allclose(learner.predict(x[:1]), scores[:1], atol=1e-6)  # no statistics of the batch
    assert have_same_bits(copy_state(learner), before)
    learner.step(*make_data(1))
    assert all(t.component.training for t in learner.trainers)


def test_as_module_is_a_plain_module(learner_case: LearnerCase) -> None:
    learner = learner_case.make()
    learner.step(*make_data(0))
    module = learner.as_module()
    assert isinstance(module, nn.Module)
    copy = save_and_load(module, weights_only=False).eval()
    x, _ = make_data(2)
    with torch.no_grad():
        assert torch.equal(copy(x), learner.predict(x))


def test_nothing_of_it_is_left(learner_case: LearnerCase) -> None:
    learner = learner_case.make()
    learner.step(*make_data(0))
    refs = [weakref.ref(t.component) for t in learner.trainers]
    del learner
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


class Watched(nn.Module):
    """Remembers the memory of a tensor inside the block, and how many of all such are kept at its turn."""

    def __init__(self, inner: list[StorageWeakRef], counts: list[int]) -> None:
        super().__init__()
        self.inner, self.counts = inner, counts
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.counts.append(sum(not ref.expired() for ref in self.inner))
        hidden = torch.sigmoid(self.layer(x))  # saved for backward, and handed to nobody
        self.inner.append(StorageWeakRef(hidden.untyped_storage()))
        return hidden * 2


def test_a_blocks_activations_are_freed_before_the_next_runs(learner_case: LearnerCase) -> None:
    if learner_case.keeps_activations:
        pytest.skip(learner_case.keeps_activations)
    inner: list[StorageWeakRef] = []
    counts: list[int] = []
    parts: list[nn.Module] = [Watched(inner, counts) for _ in range(6)]
    blocks = pw.Blocks([*parts, nn.Linear(6, CLASSES)], torch.zeros(2, 6))
    training = {"optimizer": torch.optim.SGD} if learner_case.optimizes else {}
    learner = learner_case.kind(blocks, CLASSES, **training)
    inner.clear()
    counts.clear()
    learner.step(*make_data(0))
    assert len(counts) >= 6  # more where a batch runs in parts
    assert not any(counts)
