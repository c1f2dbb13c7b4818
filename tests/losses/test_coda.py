"""CoDA against a slow definition, in one process and in two; the known faults of its code are caught."""

import io
import math
import signal
from typing import Any

import pytest
import torch
from coda_worker import PLAN, SHARE, STEPS, batch, main, network, share_of, trained, values
from torch import Tensor, nn

from plywise import NonFiniteError, PlywiseError, StateError
from plywise.losses.auc_margin import AUCMargin
from plywise.losses.coda import CoDA
from plywise.losses.spauc import roc_auc
from processes import run_two_ranks

SLOW = pytest.mark.slow


class Definition:
    """The paper's algorithm on plain tensors, one worker, with the paper's own α and scale of F."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.a, self.b, self.alpha = (
            torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(3)
        )
        self.primal = [*model.parameters(), self.a, self.b]
        self.scale = SHARE * (1 - SHARE)  # the paper's F is so many times ours

    def objective(self, h: Tensor, y: Tensor) -> Tensor:
        p = SHARE
        squares = (1 - p) * (h - self.a) ** 2 * y + p * (h - self.b) ** 2 * ~y
        cross = 2 * (1 + self.alpha) * (p * h * ~y - (1 - p) * h * y)
        return (squares + cross).mean() - p * (1 - p) * self.alpha**2

    def run(self, steps: int, lr: float, gamma: float, first_stage: int) -> dict[str, Tensor]:
        data = (batch(step) for step in range(steps))
        stage = 1
        while True:
            scores: list[tuple[Tensor, Tensor]] = []
            for _ in range(3**stage):
                pair = next(data, None)
                if pair is None:
                    return self.values()
                scores.append((self.model(pair[0]).detach().flatten(), pair[1]))
            h, y = (torch.cat(parts) for parts in zip(*scores, strict=True))
            self.alpha.data = h[~y].mean() - h[y].mean()
            start = [v.detach().clone() for v in self.primal]
            iterates = []
            for _ in range(first_stage * 3 ** (stage - 1)):
                pair = next(data, None)
                if pair is None:
                    return self.values()
                loss = self.objective(self.model(pair[0]).flatten(), pair[1])
                gradients = torch.autograd.grad(loss / self.scale, [*self.primal, self.alpha])
                self.update(lr / 3 ** (stage - 1), gamma, start, gradients)
                iterates.append([v.detach().clone() for v in self.primal])
            self.finish(iterates)
            stage += 1

    def update(self, lr: float, gamma: float, start: list[Tensor], gradients: tuple[Tensor, ...]) -> None:
        pulls = self.pulls(start)
        for v, gradient, pull in zip(self.primal, gradients, pulls, strict=False):
            v.data = v.data - lr * (gradient + pull / gamma)
        self.move_alpha(lr * gradients[-1])

    def pulls(self, start: list[Tensor]) -> list[Tensor]:
        return [v.detach() - v0 for v, v0 in zip(self.primal, start, strict=True)]

    def move_alpha(self, by: Tensor) -> None:
        self.alpha.data = self.alpha.data + by

    def finish(self, iterates: list[list[Tensor]]) -> None:
        for v, values_of_v in zip(self.primal, zip(*iterates, strict=True), strict=True):
            v.data = torch.stack(values_of_v).mean(0)

    def values(self) -> dict[str, Tensor]:
        dual = self.alpha.detach() + 1.0  # ours is the paper's plus the margin
        return {**self.model.state_dict(), "a": self.a.detach(), "b": self.b.detach(), "alpha": dual}


class PullsBByA(Definition):
    """b is pulled by a − a₀."""

    def pulls(self, start: list[Tensor]) -> list[Tensor]:
        right = super().pulls(start)
        return [*right[:-1], right[-2]]


class AlphaStays(Definition):
    """``alpha = alpha + …`` in a function binds a name of the function's own."""

    def move_alpha(self, by: Tensor) -> None:
        pass


class AveragesWeightsOnly(Definition):
    """Averages of a and b are what they were when the stage began: zero in the first."""

    def finish(self, iterates: list[list[Tensor]]) -> None:
        super().finish(iterates)
        self.a.data, self.b.data = torch.zeros_like(self.a), torch.zeros_like(self.b)


class OneTermTooMany(Definition):
    """The sum of the iterates begins with one of them, and is divided by their number without it."""

    def finish(self, iterates: list[list[Tensor]]) -> None:
        super().finish(iterates)
        for v, first in zip(self.primal, iterates[0], strict=True):
            v.data = v.data + first / len(iterates)


def check_against_ours(definition: type[Definition], steps: int) -> None:
    theirs = definition(network()).run(steps, **PLAN)
    mine = values(trained((0,), steps, every=2))  # one worker: averaging changes nothing
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-11, msg=f"{name}")


@pytest.mark.parametrize("steps", [3, 4, 9, 10, 18, 36, STEPS])
def test_one_worker_does_what_the_paper_says(steps):
    check_against_ours(Definition, steps)


@pytest.mark.parametrize("faulty", [PullsBByA, AlphaStays, AveragesWeightsOnly, OneTermTooMany])
def test_known_faults_are_caught(faulty):
    check_against_ours(faulty, 3)  # settling α is right in all of them
    with pytest.raises(AssertionError):
        check_against_ours(faulty, 10)


def test_stages_grow_and_steps_shrink():
    coda = trained((0,), 0)
    seen, rates = [], []
    for step in range(STEPS):
        seen.append((coda.stage, coda.settling))
        before = coda.loss.a.item()
        coda.step(*share_of((0,), step))
        rates.append(abs(coda.loss.a.item() - before))
    phases = [(1, True, 3), (1, False, 6), (2, True, 9), (2, False, 18), (3, True, 27), (3, False, 2)]
    assert seen == [(stage, settling) for stage, settling, count in phases for _ in range(count)]
    assert not any(rate for rate, (_, settling) in zip(rates, seen, strict=True) if settling)


def test_settling_moves_alpha_alone_and_leaves_modes_and_statistics():
    coda = trained((0,), 0, norm=True)
    coda.model[1].eval()
    before = values(coda)
    for step in range(3):
        coda.step(*share_of((0,), step))
    after = values(coda)
    assert [name for name in after if not torch.equal(before[name], after[name])] == ["alpha"]
    assert coda.model.training
    assert not coda.model[1].training


def test_with_the_default_floor_alpha_is_never_negative():
    loss = AUCMargin(margin=0.01, positive_share=SHARE).double()
    coda = CoDA(network(), loss, lr=0.2, first_stage=50)
    x, y = batch(0, 400)
    for _ in range(40):
        coda.step(10 * x, y)
        assert loss.alpha.item() >= -0.2 * 2 * (coda.model(10 * x)[y].mean().item() + 10)
    loss(coda.model(10 * x), y)
    assert loss.alpha.item() >= 0


@pytest.mark.parametrize("steps", [2, 8, 12, 25])
def test_a_state_goes_on_bit_for_bit(steps):
    whole = trained((0,), STEPS)
    half, rest = trained((0,), steps), trained((0,), 0)
    file = io.BytesIO()
    torch.save([half.state_dict(), half.model.state_dict(), half.loss.state_dict()], file)
    file.seek(0)
    for part, state in zip([rest, rest.model, rest.loss], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for step in range(steps, STEPS):
        rest.step(*share_of((0,), step))
    assert (rest.stage, rest.taken) == (whole.stage, whole.taken)
    assert all(torch.equal(value, values(whole)[name]) for name, value in values(rest).items())


def test_a_state_of_another_network_is_refused():
    with pytest.raises(StateError):
        CoDA(nn.Linear(4, 1), AUCMargin()).load_state_dict(trained((0,), 0).state_dict())


def test_a_loss_that_is_not_finite_moves_nothing():
    coda = trained((0,), 5)
    before = values(coda)
    x, y = share_of((0,), 5)
    with pytest.raises(NonFiniteError, match="nan in stage 1, after 2 steps"):
        coda.step(x * math.nan, y)
    assert all(torch.equal(value, before[name]) for name, value in values(coda).items())
    assert coda.taken == 2


def test_settling_needs_both_classes():
    coda = trained((0,), 0)
    x, y = share_of((0,), 0)
    coda.step(x, y & False)
    coda.step(x, y & False)
    with pytest.raises(PlywiseError, match=r"0 of 48 samples .* stage 1"):
        coda.step(x, y & False)


def test_what_does_not_train_stays():
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    coda = CoDA(model, AUCMargin(positive_share=SHARE).double(), **PLAN)
    for step in range(STEPS):
        coda.step(*share_of((0,), step))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"gamma": -1.0},
        {"timeout_s": math.inf},
        {"first_stage": 0},
        {"every": 2.5},
        {"every_growth": 0.5},
        {"every_growth": math.inf},
    ],
)
def test_wrong_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"CoDA: {name} must"):
        CoDA(network(), AUCMargin(), **wrong)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes saw; the second is killed at the end."""
    return run_two_ranks(main, tmp_path_factory.mktemp("coda"), codes=(0, -signal.SIGKILL))


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


@SLOW
def test_two_workers_averaging_each_step_are_one_with_joined_batches(workers):
    one, two = (seen["every 1"] for seen in workers)
    assert difference(one, two) == 0
    assert difference(one, values(trained((0, 1), every=1))) < 1e-12
    assert difference(one, values(trained((0,), every=1))) > 1e-3


@SLOW
def test_two_workers_averaging_seldom_are_not(workers):
    apart = difference(workers[0]["every 3"], values(trained((0, 1), every=3)))
    assert 1e-6 < apart < 0.1


@SLOW
def test_two_workers_with_the_same_batches_are_one_with_these(workers):
    alone = values(trained((0,), every=3))
    assert difference(workers[0]["same data"], alone) == 0
    assert difference(workers[1]["same data"], alone) == 0


@SLOW
def test_workers_are_equal_after_an_averaging_only(workers):
    assert difference(workers[0]["averaged"], workers[1]["averaged"]) == 0  # running statistics too
    assert difference(workers[0]["between"], workers[1]["between"]) > 1e-6


def test_the_period_grows_from_stage_to_stage():
    coda, periods = trained((0,), 0, every=2, every_growth=3**0.5), {}
    for step in range(STEPS):
        coda.step(*share_of((0,), step))
        periods[coda.stage] = coda.period
    assert periods == {1: 2, 2: 3, 3: 6}


@SLOW
def test_workers_average_by_the_period_of_the_stage(workers):
    one, two = (seen["every grows"] for seen in workers)
    apart = [difference(first, second) for first, second in zip(one, two, strict=True)]
    assert apart[0] == 0  # after 2 steps of the first stage
    assert apart[1] > 1e-6  # after 2 of the second, where the period is 5
    assert apart[2] == 0


@SLOW
def test_workers_begin_with_the_first_one_s_weights(workers):
    first = network(seed=0).state_dict()
    for seen in workers:
        assert all(torch.equal(seen["start"][name], value) for name, value in first.items())


@SLOW
def test_two_workers_learn_a_rare_digit(workers):
    one, two = (seen["digits"] for seen in workers)
    assert torch.equal(one["after"], two["after"])
    assert roc_auc(one["before"], one["eights"]) < 0.8
    assert roc_auc(one["after"], one["eights"]) > 0.93


@SLOW
def test_other_plans_and_lost_workers_are_named(workers):
    one, two = workers
    assert "from 3 to 4 as every (worker 0: 3)" in one["other plan"]
    assert "from 3 to 4 as every (worker 1: 4)" in two["other plan"]
    assert "worker 0 of 2 does not reach the others, averaging after 3 steps of stage 1" in one["late"]
    assert two["late"] == ""
    assert "worker 0 of 2 does not reach the others" in one["killed"]
