"""What the blocks of a local learner keep of a batch, change, and learn from each other."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import plywise as pw
from plywise.local.learner import Learner, OneWayLearner
from plywise.testing.cases import LearnerCase
from plywise.testing.contract.learners import CLASSES, make_data
from plywise.testing.contract.models import have_same_bits


class Watched(nn.Module):
    """Notes the memory of tensors inside a block and at its ends, and how much of it is still kept.

    Args:
        inner: of tensors that only backward needs; with each call, those of earlier calls still kept go to
            ``counts``.
        counts: see ``inner``.
        ends: of inputs and outputs.
    """

    def __init__(self, inner: list[StorageWeakRef], counts: list[int], ends: list[StorageWeakRef]) -> None:
        super().__init__()
        self.notes = (inner, counts, ends)
        self.layer = nn.Linear(6, 6)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watched":
        other = Watched(*self.notes)  # weak references cannot be copied
        other.layer.load_state_dict(self.layer.state_dict())
        return other

    def forward(self, x: Tensor) -> Tensor:
        inner, counts, ends = self.notes
        counts.append(sum(not ref.expired() for ref in inner))
        hidden = torch.sigmoid(self.layer(x))  # saved for backward, and handed to nobody
        inner.append(StorageWeakRef(hidden.untyped_storage()))
        output = hidden * 2
        ends += [StorageWeakRef(value.untyped_storage()) for value in (x, output)]
        return output


def make_watched(case: LearnerCase) -> tuple[Learner, list[StorageWeakRef], list[int], list[StorageWeakRef]]:
    """Make a learner of six watched blocks, and its notes, which are empty."""
    inner: list[StorageWeakRef] = []
    counts: list[int] = []
    ends: list[StorageWeakRef] = []
    parts: list[nn.Module] = [Watched(inner, counts, ends) for _ in range(6)]
    blocks = pw.Blocks([*parts, nn.Linear(6, CLASSES)], torch.zeros(2, 6))
    learner = case.kind(blocks, CLASSES, **({"optimizer": torch.optim.SGD} if case.optimizes else {}))
    for notes in (inner, counts, ends):
        notes.clear()
    return learner, inner, counts, ends


def test_a_blocks_activations_are_freed_before_the_next_runs(learner_case: LearnerCase) -> None:
    """The activations inside a block must be freed before the next block runs."""
    if learner_case.keeps_activations:
        pytest.skip(learner_case.keeps_activations)
    learner, _, counts, _ = make_watched(learner_case)
    learner.step(*make_data(0))
    assert len(counts) >= 6, f"Of 6 blocks {len(counts)} ran in a step."  # more where a batch runs in parts
    assert not any(counts), (
        f"When the blocks ran, those of {', '.join(map(str, counts))} blocks before were still kept. Run the "
        "backward of each block before the next, as OneWayLearner does, or say in a LearnerCase why not "
        "(keeps_activations)."
    )


def test_no_activations_are_kept_after_a_step(learner_case: LearnerCase) -> None:
    """After a step no activations of the batch may be kept."""
    learner, inner, _, ends = make_watched(learner_case)
    for number in range(3):
        learner.step(*make_data(number))
    gc.collect()
    kept = {ref.cdata for ref in [*inner, *ends] if not ref.expired()}
    assert not kept, (
        f"Three steps have ended, and {len(kept)} tensors that the blocks were given or made are still kept. "
        "Look for an attribute or a list that holds one, or a loss with its graph; keep numbers "
        "(`tensor.item()`) or means in its place."
    )


def count_tensors() -> int:
    """Count the tensors that Python holds."""
    gc.collect()
    return sum(issubclass(type(held), Tensor) for held in gc.get_objects())


def test_memory_does_not_grow(learner_case: LearnerCase) -> None:
    """Steps of equal batches must not take more and more memory."""
    learner = learner_case.make()
    counts = []
    for number in range(9):
        learner.step(*make_data(number))
        if number in (2, 5, 8):
            counts.append(count_tensors())
    growth = min(counts[1] - counts[0], counts[2] - counts[1]) // 3
    assert growth < 1, (
        f"Each step adds tensors that stay, {growth} of them. Look for a list that collects what each batch "
        "gives; keep numbers (`loss.item()`) in it."
    )


def test_nothing_of_it_is_left(learner_case: LearnerCase) -> None:
    """A learner that is dropped must be freed."""
    learner = learner_case.make()
    learner.step(*make_data(0))
    refs = [weakref.ref(t.component) for t in learner.trainers]
    del learner
    gc.collect()
    held = [number for number, ref in enumerate(refs) if ref() is not None]
    assert not held, f"Something still holds the components {held}, such as a global list."


def test_the_batch_is_left_as_it_is(learner_case: LearnerCase) -> None:
    """The caller's batch must not be changed."""
    x, y = make_data(0)
    given = {"x": x.clone(), "y": y.clone()}
    learner_case.make().step(x, y)
    same = have_same_bits({"x": x, "y": y}, given)
    assert same, f"A step changed the tensors that it was given: {same}. Clone them first."


def test_modes_are_left_as_they_are(learner_case: LearnerCase) -> None:
    """After a step every module of every block must be in training mode, as before."""
    learner = learner_case.make()
    before = list_modes(learner)
    learner.step(*make_data(0))
    changed = sorted(name for name, mode in list_modes(learner).items() if before.get(name, mode) != mode)
    assert not changed, (
        f"A step left {', '.join(changed[:4])} in another mode. Set no mode in a component: the learner does."
    )


def list_modes(learner: Learner) -> dict[str, bool]:
    """List whether each module is in training mode, by component and name."""
    return {
        f"{name or 'all'} of component {trainer.index}": part.training
        for trainer in learner.trainers
        for name, part in trainer.component.named_modules()
    }


def list_parameters(learner: Learner, number: int) -> dict[int, str]:
    """List what the optimizer of a component trains: identities with names."""
    trainer = learner.trainers[number]
    names = {id(p): name for name, p in trainer.component.named_parameters()}
    groups = trainer.optimizer.param_groups if trainer.optimizer is not None else []
    return {id(p): names.get(id(p), "one of no component") for group in groups for p in group["params"]}


def test_a_parameter_belongs_to_one_component(learner_case: LearnerCase) -> None:
    """Each parameter must be trained by one component alone."""
    learner = learner_case.make()
    owners: dict[int, int] = {}
    for number in range(len(learner.trainers)):
        for key, name in list_parameters(learner, number).items():
            first = owners.setdefault(key, number)
            assert first == number, (
                f"The optimizers of the components {first} and {number} train the same parameter, {name}. "
                "Leave parameters of other components out of parameter_groups."
            )


def test_a_component_changes_nothing_of_the_others(learner_case: LearnerCase) -> None:
    """While a component learns, the others must not change, nor get gradients."""
    learner = learner_case.make()
    if not isinstance(learner, OneWayLearner):
        pytest.skip("in a learner that is no OneWayLearner components may act on each other")
    learner.step(*make_data(0))
    for trainer in learner.trainers:
        trainer.begin()
    signal = learner.signal(*make_data(1))
    for trainer in learner.trainers:
        others = {
            f"{name} of component {other.index}": p
            for other in learner.trainers
            if other is not trainer
            for name, p in other.component.named_parameters()
        }
        before = {name: p.detach().clone() for name, p in others.items()}
        signal, _ = trainer.learn(signal, learner.steps)
        same = have_same_bits({name: p.detach() for name, p in others.items()}, before)
        assert same, f"While component {trainer.index} learned, others changed: {same}."
        graded = [name for name, p in others.items() if p.grad is not None and p.grad.any()]
        assert not graded, (
            f"Component {trainer.index} left a gradient in {graded[0]}, which its owner adds to its own. Use "
            "a copy of another component's parameters, or `p.detach()`."
        )


def test_components_learn_nothing_from_those_after(learner_case: LearnerCase) -> None:
    """What a component learns must not depend on the components after it."""
    results = []
    for factor in (1.0, 3.0):
        learner = learner_case.make()
        if not isinstance(learner, OneWayLearner):
            pytest.skip("in a learner that is no OneWayLearner gradients may cross blocks")
        *before, last = learner.trainers
        with torch.no_grad():
            for p in last.component.parameters():
                p.mul_(factor)
        learner.step(*make_data(0))
        results.append(
            {
                f"{name} of component {trainer.index}": p.detach().clone()
                for trainer in before
                for name, p in trainer.component.named_parameters()
            }
        )
    same = have_same_bits(*results)
    assert same, (
        f"With other weights in the last component, those before learn something else: {same}. Detach what "
        "one hands on (Signal.detached), or derive from Learner if gradients are to cross."
    )
