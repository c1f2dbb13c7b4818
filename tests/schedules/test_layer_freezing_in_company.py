"""Layer freezing with what else there is in a training: scalers, rules, checkpoints."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plywise as pw
from plywise.registry.find import RULES

from .runs import Run, run, same_bits

KEY = "plywise.LayerFreezing"
FRONT = ("0", "1", "3", "4")


def freezing(training: Run, every: int = 2, warmup: int = 1) -> pw.LayerFreezing:
    """Freezes `FRONT`, all that it may, when the warm-up and two periods are over."""
    schedule = pw.LayerFreezing(every=every, warmup=warmup, threshold=1e6, max_share=0.7)
    return schedule.attach(training.model, training.optimizer)


def start(
    rule: pw.Rule | None = None, turned: bool = False, seed: int = 0, steps: int = 0
) -> tuple[Run, pw.LayerFreezing]:
    """A run under a rule and the schedule, attached in this order or the other way round."""
    training, schedules = run(seed), []
    attachings = [lambda: schedules.append(freezing(training))]
    if rule is not None:
        attachings.insert(turned, lambda: rule.attach(training.model, training.optimizer))
    for attaching in attachings:
        attaching()
    for number in range(steps):
        training.step(number)
    return training, schedules[0]


def entry(training: Run) -> dict[str, Any]:
    return training.optimizer.state_dict()[KEY]


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """Nested dicts and lists as tensors by name."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: tensor for n, v in items for key, tensor in flat(v, f"{name}/{n}").items()}
    return {name: value.detach().clone() if isinstance(value, Tensor) else torch.tensor(hash(value))}


def seen(training: Run) -> dict[str, Tensor]:
    """All that a training is: weights, buffers, the optimizer's state; and what it may train."""
    trains = {f"{name} trains": p.requires_grad for name, p in training.model.named_parameters()}
    held = {
        f"{name} held": m.training for name, m in training.model.named_modules() if "Norm" in str(type(m))
    }
    return {**training.weights(), **flat(training.optimizer.state_dict()), **flat({**trains, **held})}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and same_bits(left, right)


# ---- ways of making a step --------------------------------------------------------------------------


def test_closures():
    plain, closed = run(), run()
    schedules = [freezing(plain), freezing(closed)]
    for number in range(8):
        plain.step(number)
        closed.model.train()

        def closure(number=number):
            closed.optimizer.zero_grad()
            loss = closed.loss(number)
            loss.backward()
            return loss

        closed.optimizer.step(closure)
        assert equal(seen(plain), seen(closed))
    assert schedules[1].frozen == FRONT


def test_micro_batches():
    """Two halves make the gradient of the whole, measured once, at the step."""
    whole, halves = run(), run()
    for training in (whole, halves):
        training.model.eval()  # a batch norm would see each half by itself
        freezing(training, every=3)
    for number in range(4):
        for training, parts in ((whole, [slice(None)]), (halves, [slice(4), slice(4, None)])):
            training.optimizer.zero_grad()
            for part in parts:
                training.loss(number, part).backward()
            training.optimizer.step()
    one, two = entry(whole), entry(halves)
    assert one["steps"] == two["steps"] == 4
    for key in ("before", "now"):
        assert one[key] == pytest.approx(two[key], rel=1e-4)
        assert all(value > 0 for value in one[key].values())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_by_a_grad_scaler(fused):
    """Bad steps leave no trace, and neither does the loss scale, which they change."""
    ends = []
    for bad in ((), (2, 5)):
        training = run()
        training.model.eval()  # a batch norm would see the data of bad steps
        training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.01, fused=fused)
        schedule = freezing(training, every=4)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        attempts = sorted([*range(9), *bad])  # a bad one first, then the same again
        for at, number in enumerate(attempts):
            training.optimizer.zero_grad()
            spoilt = float("inf") if attempts[at + 1 : at + 2] == [number] else 1.0
            scaler.scale(training.loss(number) * spoilt).backward()
            scaler.step(training.optimizer)
            scaler.update()
        assert schedule.frozen == FRONT
        ends.append(seen(training))
    assert equal(*ends)


@pytest.mark.filterwarnings("ignore:The gradient of:RuntimeWarning")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rule", ["NLMS", "RLS"])
def test_steps_skipped_by_a_rule(rule, turned):
    ends = []
    for bad in ((), (1, 3, 6)):
        training, schedule = start(getattr(pw, rule)(), turned)
        for number in range(8):
            training.model.eval()
            for factor in (float("nan"), 1.0) if number in bad else (1.0,):
                training.optimizer.zero_grad()
                (training.loss(number) * factor).backward()
                training.optimizer.step()
            assert schedule.frozen == (FRONT if number >= 3 else ())
        ends.append(seen(training))
    assert equal(*ends)


# ---- rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_under_every_rule(rule, turned):
    made = getattr(pw, rule)()
    training, schedule = start(made, turned, steps=4)
    assert schedule.frozen == FRONT
    assert "frozen" in str(made.explain())
    before = training.weights()
    for number in range(4, 9):
        training.step(number)
    for layer in "013468":
        assert same_bits(before, training.weights(), f"{layer}.") == (layer in FRONT)
    schedule.detach()
    before = training.weights()
    for number in range(9, 12):
        training.step(number)
    assert not any(same_bits(before, training.weights(), f"{layer}.") for layer in "013468")
    assert all(bool(torch.isfinite(value).all()) for value in training.weights().values())
    assert made.health.total("step skipped") == made.health.total("non-finite value") == 0
    made.detach()


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("attach_to", ["model", "compiled"])
def test_compiled(attach_to):
    plain, compiled = run(), run()
    freezing(plain)
    inner, compiled.model = compiled.model, torch.compile(compiled.model, backend="eager")
    schedule = freezing(compiled if attach_to == "compiled" else Run(inner, compiled.optimizer))
    for number in range(7):
        plain.step(number)
        compiled.step(number)
    assert schedule.frozen == FRONT
    assert equal(seen(plain), seen(Run(inner, compiled.optimizer)))


# ---- checkpoints ------------------------------------------------------------------------------------


def through_a_file(training: Run, folder: Path) -> dict[str, Any]:
    state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def load(training: Run, state: dict[str, Any]) -> None:
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rule", [None, "ProxProp", "RLS", "KFAC"])
def test_broken_off_and_resumed_after_every_step(tmp_path, rule, turned):
    """Into a new training and into one that has frozen layers already, whatever its rule remembers."""

    def make(**settings):
        return start(None if rule is None else getattr(pw, rule)(), turned, **settings)[0]

    training, unbroken = make(), []
    for number in range(7):
        training.step(number)
        unbroken.append(seen(training))
    training = make()
    for number, expected in enumerate(unbroken):
        training.step(number)
        assert equal(seen(training), expected), number
        state = through_a_file(training, tmp_path)
        training = make(seed=9, steps=(0, 6, 3)[number % 3])
        load(training, state)
        assert equal(seen(training), expected), number


def test_states_are_copies():
    training, _ = start(steps=3)
    state = copy.deepcopy(training.optimizer.state_dict())
    kept = training.optimizer.state_dict()
    before = copy.deepcopy(kept[KEY])
    training.step(3)
    assert kept[KEY] == before
    training.optimizer.load_state_dict(state)
    training.step(3)
    assert state[KEY] == before


def test_an_older_state_gives_layers_back_to_their_owner():
    training, schedule = start(steps=1)
    state = copy.deepcopy(training.optimizer.state_dict())
    for number in range(1, 4):
        training.step(number)
    training.optimizer.load_state_dict(state)
    training.model[0].requires_grad_(False)
    schedule.detach()
    assert not training.model[0].weight.requires_grad


def longer(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3))


def shorter(model: nn.Sequential) -> None:
    del model[8]


def wider(model: nn.Sequential) -> None:
    model[6], model[8] = nn.Linear(6, 7), nn.Linear(7, 3)


OTHERS = {
    "longer": (longer, "layer '9' has 12 weights to train there and no here"),
    "shorter": (shorter, "layer '8' has no weights to train there and 21 here"),
    "wider": (wider, "layer '6' has 49 weights to train there and 42 here"),
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_the_state_of_another_model_is_refused(what):
    change, words = OTHERS[what]
    other = run()
    change(other.model)
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.01)
    freezing(other)
    training, _ = start(steps=5)
    state = other.optimizer.state_dict()
    state["param_groups"] = training.optimizer.state_dict()["param_groups"]  # torch looks at these itself
    before = seen(training)
    with pytest.raises(pw.StateError, match=words):
        training.optimizer.load_state_dict(state)
    assert equal(seen(training), before)


def test_a_state_without_the_schedule():
    training, schedule = start(steps=5)
    state, before = copy.deepcopy(run().optimizer.state_dict()), seen(training)
    with pytest.raises(pw.StateError, match=r"without LayerFreezing.*load it before attach"):
        training.optimizer.load_state_dict(state)
    assert equal(seen(training), before)
    schedule.detach()
    training.optimizer.load_state_dict(state)
    assert freezing(training).frozen == ()


def test_a_state_that_the_rule_refuses():
    """What is frozen stays so, though the schedule had made way for the state."""
    undisturbed, _ = start(pw.RLS(), steps=5)
    training, schedule = start(pw.RLS(), steps=5)
    state = start(pw.RLS(), steps=1)[0].optimizer.state_dict()
    del state["plywise"]
    state["state"] = {
        index: {key: value for key, value in own.items() if not str(key).startswith("plywise.")}
        for index, own in state["state"].items()
    }
    with pytest.raises(pw.StateError, match="holds no memory of RLS"):
        training.optimizer.load_state_dict(state)
    assert schedule.frozen == FRONT
    for number in range(5, 8):
        undisturbed.step(number)
        training.step(number)
    assert equal(seen(training), seen(undisturbed))


def test_a_state_that_was_loaded_before_attach_is_lost_not_without_a_word() -> None:
    training, other = start(steps=3)[0], run(seed=9)
    other.optimizer.load_state_dict(training.optimizer.state_dict())
    with pytest.warns(RuntimeWarning, match=r"state that was loaded before attach\(\) is lost"):
        schedule = freezing(other)
    schedule.detach()
    freezing(other)  # a user who has detached a schedule knows


def test_the_same_layers_in_another_order_are_refused() -> None:
    def begin(turned: bool) -> Run:
        torch.manual_seed(0)
        layers = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 6)}
        model = nn.ModuleDict(dict(reversed(layers.items())) if turned else layers)
        training = Run(model, torch.optim.SGD(model.parameters(), lr=0.1))
        freezing(training)
        return training

    state = begin(turned=False).optimizer.state_dict()
    with pytest.raises(pw.StateError, match="its layers are the same, in another order"):
        begin(turned=True).optimizer.load_state_dict(state)
