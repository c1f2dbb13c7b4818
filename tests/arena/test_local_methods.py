"""Local learners in the arena: their refusals, their blocks, and their random numbers."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from method_settings import STEPS, network, setting
from torch import nn

import plywise as pw
from plywise.arena.method import TrialContext
from plywise.arena.methods import LEARNER_OF, find_method
from plywise.arena.methods.learners import cut
from plywise.arena.run.experiment import Design, run_arms
from plywise.arena.task import REGRESSION, SEQUENCES
from plywise.arena.workload import Data
from plywise.arena.workloads import find_workload
from plywise.arena.workloads.networks import CharTransformer
from plywise.data.batches import Split


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


# ---- tokens ------------------------------------------------------------------------------------------

TOKENS = (torch.arange(9) + torch.arange(16)[:, None]) % 11
X, Y = TOKENS[:, :-1], TOKENS[:, 1:]


def characters(depth=2):
    torch.manual_seed(0)
    return CharTransformer(11, 8, width=16, depth=depth, heads=2)


def of_tokens(model, blocks):
    numbers = {"lr": 0.01, "weight_decay": 1e-3}
    more = {"blocks": blocks, "classes": 11}
    return find_method("local-next-token").make(TrialContext(model, SEQUENCES, numbers, STEPS, X[:4], **more))


def test_a_tied_transformer_as_one_block_is_trained_by_backpropagation():
    model, twin = characters(), characters()
    trainer, optimizer = of_tokens(model, 1), torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in range(3):
        loss = SEQUENCES.loss(twin(X), Y)
        optimizer.zero_grad()
        loss.backward()
        assert trainer.step(X, Y) == pytest.approx(loss.item(), rel=1e-4)
        optimizer.step()
        for group in (optimizer, *(one.optimizer for one in trainer.learner.trainers)):
            group.param_groups[0]["lr"] = 0.01  # the arena's falls along a cosine
    torch.testing.assert_close(trainer.predict(X), twin.eval()(X), rtol=1e-3, atol=1e-3)


def test_every_block_of_a_tied_transformer_learns_tokens_by_itself():
    model = characters()
    before = {key: value.clone() for key, value in model.named_parameters()}
    trainer = of_tokens(model, 2)
    losses = [trainer.step(X, Y) for _ in range(STEPS)]
    assert losses[-1] < losses[0] / 4
    assert trainer.predict(X).shape == (16, 8, 11)
    unmoved = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    assert unmoved == ["norm.weight", "norm.bias"], "each block has a norm of its own"


def test_learners_of_next_tokens_run_on_the_transformer_and_others_say_why_not():
    workload = find_workload("char-transformer")
    names = [name for name in LEARNER_OF if not find_method(name).refuses(workload)]
    assert sorted(names) == ["interlocking", "local-loss", "local-next-token"]
    tokens = (torch.arange(65) + torch.arange(32)[:, None]) % 65
    part = Split(tokens[:, :-1], tokens[:, 1:])
    small = replace(workload, make_data=lambda: Data(part, part, part), steps=8, target=None)
    for line in run_arms(small, [*map(find_method, names)], Design(seeds=1)).ledger.lines.values():
        assert line["failure"] is None
        assert line["validation"][0] == pytest.approx(4.17, abs=0.1), "they begin as the network, ln 65"
        assert line["validation"][-1] < line["validation"][0] - 0.3
        assert 0.9 < line["gradients"] < 2, "readouts are the products besides"
