"""One trial: what is measured, on which clock, and that no failure is lost."""

import json
import time

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.arena.trial import accuracy, endless_batches, make_step, mean_loss, run_trial
from plywise.data.digits import Split, load_digits


def make_model():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def sgd(rate=0.1):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)


@pytest.fixture(scope="module")
def data():
    train, validation, _ = load_digits()
    return train, validation


def trial(data, model=make_model, optimizer=None, rule=None, **options):
    options = {"seed": 0, "steps": 25, "measure_every": 10, **options}
    return run_trial(model, *data, optimizer or sgd(), rule, **options)


def test_record_is_what_training_by_hand_gives(data):
    record = trial(data)
    assert record.steps == [0, 10, 20, 25]
    assert record.failure is None
    torch.manual_seed(0)
    model = make_model()
    step, batches = make_step(model, sgd(), None), endless_batches(data[0], 128, 0)
    losses = [mean_loss(model, data[0])]
    for count in range(1, 26):
        step(*next(batches))
        if count in record.steps:
            losses.append(mean_loss(model, data[0]))
    assert record.loss == losses
    assert record.final_loss == losses[-1] < losses[0]
    assert record.test_accuracy == accuracy(model, data[1]) > 0.3


def test_same_seed_same_bits_and_the_callers_random_state_is_left_alone(data):
    before = torch.get_rng_state()
    rule = pw.ProxProp(tau=0.1)
    one, two, other = (trial(data, rule=rule, optimizer=sgd(5.0), seed=s).loss for s in (1, 1, 2))
    assert one == two != other
    assert torch.equal(before, torch.get_rng_state())
    assert trial(data, rule=pw.Backprop()).loss == trial(data).loss, "the null control is plain training"


def test_measuring_is_off_the_clock(data):
    class SlowWhenMeasured(nn.Sequential):
        def forward(self, x):
            if not self.training:
                end = time.process_time() + 0.1
                while time.process_time() < end:
                    pass
            return super().forward(x)

    record = trial(data, model=lambda: SlowWhenMeasured(*make_model()), steps=4, measure_every=1)
    assert record.cpu_seconds[0] == 0
    assert record.cpu_seconds == sorted(record.cpu_seconds)
    assert 0 < record.cpu_seconds[-1] < 0.1


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
    record = trial(data, optimizer=sgd(1e6), rule=rule)
    assert "diverged at step" in record.failure
    assert record.final_loss is None
    assert record.test_accuracy is None
    assert record.steps[0] == 0
    json.dumps(record.as_dict(), allow_nan=False)


def test_not_a_number_is_an_outcome(data):
    train = Split(data[0].x.clone(), data[0].y)
    train.x[0] = torch.nan
    for rule in (None, pw.NLMS()):
        assert "loss is nan" in trial((train, data[1]), rule=rule).failure
    poisoned = trial((Split(data[0].x / 0, data[0].y), data[1]))
    json.dumps(poisoned.as_dict(), allow_nan=False)


def test_an_exception_is_an_outcome(data):
    class Breaks(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            if self.calls == 3:
                raise RuntimeError("the third step. More words")
            return super().forward(x)

    assert (
        trial(data, model=lambda: Breaks(*make_model())).failure == "RuntimeError at step 3: the third step"
    )
    refused = trial(data, model=lambda: nn.Sequential(nn.Flatten()), rule=pw.NLMS()).failure
    assert "before the first step" in refused


def test_interrupt_is_not_swallowed(data):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial(data, model=interrupted)


def test_held_out_loss_on_demand(data):
    assert trial(data).validation_loss == []
    watched = trial(data, watch_held_out=True)
    assert len(watched.validation_loss) == len(watched.steps)
    assert "validation_loss" not in watched.as_dict()
