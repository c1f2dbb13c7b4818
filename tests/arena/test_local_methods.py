"""Local learners in the arena: what they refuse, how they are cut, what they draw."""

from itertools import pairwise

import pytest
import torch
from method_settings import STEPS, network, setting
from torch import nn

import plywise as pw
from plywise.arena.methods import LEARNER_OF, find_method
from plywise.arena.methods.learners import cut
from plywise.arena.task import REGRESSION


@pytest.mark.parametrize("name", LEARNER_OF)
def test_learners_refuse_what_they_cannot_train(name):
    method = find_method(name)
    with pytest.raises(pw.PlywiseError, match=r"block by block.*blocks=0"):
        method.make(setting(method, blocks=0))
    with pytest.raises(pw.PlywiseError, match=r"2 at most.*3 blocks"):
        method.make(setting(method, blocks=3))
    if name in ("activation-relaxation", "direct-feedback"):  # they follow the task's loss, whatever that is
        trainer = method.make(setting(method, classes=0, task=REGRESSION))
        assert trainer.step(torch.rand(8, 64), torch.rand(8, 10)) < 10
    else:
        with pytest.raises(pw.PlywiseError, match="classes=0"):
            method.make(setting(method, classes=0))


def test_which_learners_have_scores_of_their_own():
    readers = ("associated-learning", "cascaded-forward", "forward-forward", "mono-forward")
    for name in LEARNER_OF:
        method = find_method(name)
        plain = method.make(setting(method)).plain
        assert plain is (name not in readers)


@pytest.mark.parametrize("name", ["local-loss", "activation-relaxation", "associated-learning"])
def test_a_step_that_a_learner_skips_is_an_error(name):
    method = find_method(name)
    trainer = method.make(setting(method))
    with torch.no_grad():
        next(trainer.learner.trainers[0].component.parameters())[0] = torch.inf
    with pytest.raises(pw.NonFiniteError):
        trainer.step(torch.rand(8, 64), torch.arange(8))


def test_learners_rates_fall_to_zero_in_every_component():
    method = find_method("local-loss")
    trainer = method.make(setting(method))
    for _ in range(STEPS):
        trainer.step(torch.rand(8, 64), torch.arange(8))
    rates = [group["lr"] for one in trainer.learner.trainers for group in one.optimizer.param_groups]
    assert rates == pytest.approx([0.0, 0.0])


def test_cuts_follow_from_the_work_and_leave_the_model_as_it_is():
    widths = [8, 200, 200, 8, 8, 3]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths)]
    model = nn.Sequential(*layers)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    blocks = cut(model, 2, torch.rand(4, 8))
    # 1600, 40000, 1600, 64 and 24 products a sample: the second layer is nearly all of them
    assert [sum(isinstance(m, nn.Linear) for m in block.modules()) for block in blocks] == [2, 3]
    assert blocks[0].get_parameter("0.0.weight") is model[0][0].weight
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = torch.rand(4, 8)
    assert torch.equal(nn.Sequential(*blocks)(x), model(x))
    assert len(cut(model, 1, x)) == 1


def test_learners_draw_from_the_trials_seed():
    def weights(seed):
        method = find_method("local-forward-gradient")
        torch.manual_seed(seed)
        model = network()
        model.load_state_dict({key: torch.ones_like(value) / 50 for key, value in model.state_dict().items()})
        trainer = method.make(setting(method, model, example=torch.ones(4, 64)))
        trainer.step(torch.ones(8, 64), torch.arange(8))
        return model[0].weight.detach().clone()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
