"""One trial: its measurements and clocks, and the record of every failure."""

import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import plywise as pw
from plywise.arena.method import with_rule
from plywise.arena.run.job import Peak
from plywise.arena.run.trial import run_trial
from plywise.arena.task import CLASSIFICATION, REGRESSION, mean, predictor
from plywise.data.batches import endless_batches
from plywise.data.digits import Split, load_digits
from plywise.data.parts import Data
from plywise.testing.processes import CONTEXT


def make_model():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def make_begin(model=make_model, rate=0.1, rule=None):
    def begin():
        network = model()
        optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
        return with_rule(network, optimizer, rule, CLASSIFICATION.loss)

    return begin


@pytest.fixture(scope="module")
def data():
    return Data(*load_digits())


def run_short_trial(data, begin=None, **options):
    options = {"seed": 0, "steps": 25, "measure_every": 10, "train_eval_size": 1100, **options}
    return run_trial(begin or make_begin(), data, CLASSIFICATION, **options)


def test_record_is_what_training_by_hand_gives(data):
    record = run_short_trial(data, test=True)
    assert record.steps == [0, 10, 20, 25]
    assert record.failure is None
    torch.manual_seed(0)
    trainer = make_begin()()
    batches = endless_batches(data.train, 128, 0)
    losses = [mean(CLASSIFICATION.loss, trainer.predict, data.train, 128)]
    errors = [mean(CLASSIFICATION.metric, trainer.predict, data.validation, 128)]
    for count in range(1, 26):
        trainer.step(*next(batches))
        if count in record.steps:
            losses.append(mean(CLASSIFICATION.loss, trainer.predict, data.train, 128))
            errors.append(mean(CLASSIFICATION.metric, trainer.predict, data.validation, 128))
    assert record.loss == losses
    assert record.validation == errors
    assert record.final_loss == losses[-1] < losses[0]
    assert record.test == mean(CLASSIFICATION.metric, trainer.predict, data.test, 128) < 0.7


class Hungry(nn.Sequential):
    """Allocates 64 MiB at certain times, and frees them at once."""

    def __init__(self, when):
        super().__init__(*make_model())
        self.when, self.calls = when, 0

    def forward(self, x):
        self.calls += 1
        now = {"first": self.calls == 1, "training": self.training, "test": x[0, 0] == 7}
        if now[self.when]:
            torch.ones(64 * 2**18)
        return super().forward(x)


def measure_peak(when, connection):
    data = Data(*load_digits())
    marked = Split(data.test.x.clone(), data.test.y)
    marked.x[:, 0] = 7
    three, peak = Data(data.train, data.validation, marked), Peak("cpu")
    peak.begin(three)
    assert (
        run_short_trial(three, make_begin(lambda: Hungry(when)), steps=3, test=True, meter=peak).failure
        is None
    )
    connection.send(peak.mib)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
@pytest.mark.parametrize(
    ("when", "least", "most"), [("first", 0, 40), ("training", 60, 120), ("test", 0, 40)]
)
def test_peak_memory_is_that_of_training(when, least, most):
    """In its own process like a trial, since memory of other tests can be freed at any time."""
    connection, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=measure_peak, args=(when, theirs))
    process.start()
    theirs.close()
    assert connection.poll(120)
    assert least <= connection.recv() < most
    process.join(60)
    assert process.exitcode == 0


def test_the_test_set_is_left_alone_unless_asked_for(data):
    untouchable = Split(torch.full_like(data.test.x, torch.nan), data.test.y[:1])
    record = run_short_trial(Data(data.train, data.validation, untouchable))
    assert record.test is None
    assert record.failure is None


def test_same_seed_same_bits_and_the_callers_random_state_is_left_alone(data):
    before = torch.get_rng_state()
    begin = make_begin(rate=5.0, rule=pw.ProxProp(tau=0.1))
    one, two, other = (run_short_trial(data, begin, seed=s).loss for s in (1, 1, 2))
    assert one == two != other
    assert torch.equal(before, torch.get_rng_state())
    null = run_short_trial(data, make_begin(rule=pw.Backprop())).loss
    assert null == run_short_trial(data).loss, "the null control is plain training"


def test_numpys_and_pythons_random_numbers_follow_the_seed_too(data):
    def make_shifted_model():
        network = make_model()
        with torch.no_grad():
            network[0].bias += np.random.rand() + random.random()
        return network

    states = random.getstate(), np.random.get_state()[1].tolist()
    one, two, other = (run_short_trial(data, make_begin(make_shifted_model), seed=s).loss for s in (1, 1, 2))
    assert one == two != other
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_the_callers_random_state_on_the_gpu_is_left_alone(data):
    torch.rand(3, device="cuda")
    before = torch.cuda.get_rng_state()
    run_short_trial(data, steps=1)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_a_network_that_changes_its_input_changes_no_data(data):
    class Halving(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    before = [split.x.clone() for split in data.parts]
    assert run_short_trial(data, make_begin(lambda: Halving(*make_model())), test=True).failure is None
    assert all(torch.equal(x, split.x) for x, split in zip(before, data.parts, strict=True))


def test_measuring_is_off_the_clocks(data):
    class SlowWhenMeasured(nn.Sequential):
        def forward(self, x):
            if not self.training:
                end = time.process_time() + 0.02
                while time.process_time() < end:
                    pass
            return super().forward(x)

    begin = make_begin(lambda: SlowWhenMeasured(*make_model()))
    record = run_short_trial(data, begin, steps=4, measure_every=1)
    for clock in (record.cpu, record.wall):
        assert clock[0] == 0
        assert clock == sorted(clock)
        assert 0 < clock[-1] < record.measuring / 2
    assert record.measuring > 0.2


def test_the_training_loss_is_of_as_many_samples_as_asked_for(data):
    few = Data(Split(data.train.x[:50], data.train.y[:50]), data.validation, data.test)
    trainer = predictor_of_seed(0)
    assert run_short_trial(data, steps=1, train_eval_size=50).loss[0] == mean(
        CLASSIFICATION.loss, trainer, few.train
    )


def predictor_of_seed(seed):
    torch.manual_seed(seed)
    return predictor(make_model())


def test_batches_are_whole_and_cover_the_epoch():
    split = Split(torch.arange(10.0).unsqueeze(1), torch.arange(10))
    batches = endless_batches(split, 4, seed=0)
    epochs = [torch.cat([next(batches)[1] for _ in range(2)]) for _ in range(2)]
    for epoch in epochs:
        assert len(epoch.unique()) == 8
    assert not torch.equal(*epochs)
    assert len(next(endless_batches(split, 100, seed=0))[1]) == 10


@pytest.mark.parametrize("rule", [None, pw.Backprop(), pw.Consequentialism()])
def test_divergence_is_an_outcome(data, rule):
    record = run_short_trial(data, make_begin(rate=1e6, rule=rule), test=True)
    assert "diverged at step" in record.failure
    assert record.final_loss is None
    assert record.test is None
    assert record.steps[0] == 0
    json.dumps(record.as_dict(), allow_nan=False)


def test_a_large_loss_that_was_large_before_has_not_diverged(data):
    far = Data(*(Split(split.x, 1e4 * split.x[:, 20:21]) for split in data.parts))

    def begin():
        model = nn.Linear(64, 1)
        return with_rule(model, torch.optim.SGD(model.parameters(), lr=1e-3), None, REGRESSION.loss)

    record = run_trial(begin, far, REGRESSION, seed=0, steps=5)
    assert record.failure is None
    assert record.loss[0] > 1e3


def test_not_a_number_is_an_outcome(data):
    train = Split(data.train.x.clone(), data.train.y)
    train.x[0] = torch.nan
    for rule in (None, pw.NLMS()):
        nan = Data(train, data.validation, data.test)
        assert "loss is nan" in run_short_trial(nan, make_begin(rule=rule)).failure
    poisoned = run_short_trial(Data(Split(data.train.x / 0, data.train.y), data.validation, data.test))
    json.dumps(poisoned.as_dict(), allow_nan=False)


def test_an_exception_is_an_outcome(data):
    class Breaks(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            if self.calls == 3:
                raise RuntimeError("the third step. More words")
            return super().forward(x)

    failure = run_short_trial(data, make_begin(lambda: Breaks(*make_model()))).failure
    assert re.fullmatch(r"RuntimeError at step 3: the third step \(line \d+ of test_trial\.py\)", failure)
    nothing_to_train = make_begin(lambda: nn.Sequential(nn.Flatten()), rule=pw.NLMS())
    assert "before the first step" in run_short_trial(data, nothing_to_train).failure


@pytest.mark.parametrize(
    ("hurt", "why"),
    [
        (lambda: sys.exit(3), r"SystemExit at step 1: 3 \(line \d+ of test_trial\.py\)"),
        (lambda: torch.empty(1 << 60), r"RuntimeError at step 1: .*(can't|not enough|could not).* memory.*"),
    ],
)
def test_exits_and_lack_of_memory_are_reported_as_outcomes(data, hurt, why):
    class Hurts(nn.Sequential):
        def forward(self, x):
            if self.training:
                hurt()
            return super().forward(x)

    assert re.fullmatch(why, run_short_trial(data, make_begin(lambda: Hurts(*make_model()))).failure)


def test_interrupt_is_not_swallowed(data):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_short_trial(data, interrupted)
