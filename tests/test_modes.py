"""Frozen parts stay frozen: what measures or trains a model knows which of its parts are in eval mode."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import plywise as pw
from plywise._util.modes import evaluating
from plywise.arena.task import CLASSIFICATION, mean, predictor
from plywise.arena.workloads.own import own_workload
from plywise.data.digits import Split

SOURCE = Path(pw.__file__).parent
ALLOWED = {
    "_util/modes.py": "the one place",
    "arena/methods/peers.py": "a schedule-free optimizer has modes, too",
    "local/cutting/chain.py": "new modules get the mode of the model that they are made of",
    "local/cutting/spine.py": "what is around a block is in the block's mode while that runs",
    "local/split.py": "measures a copy",
    "local/cutting/tracing.py": "traces a copy",
    "local/trainer.py": "begins to train; frozen parts stay",
    "local/cutting/units.py": "tries a copy",
    "nn/adaptive_activation.py": "new modules get the mode of those that they replace",
    "schedules/front_layers.py": "freezes",
    "training/session.py": "hands out a trained network, ready for use",
}


def switches(path: Path) -> bool:
    """Whether a file switches modes: ``.eval()``, ``.train()``, ``.train(mode)``, ``.training = mode``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            count = len(node.args) + len(node.keywords)
            if (node.func.attr == "eval" and count == 0) or (node.func.attr == "train" and count < 2):
                return True
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Attribute) and target.attr == "training" for target in targets):
            return True
    return False


def test_nothing_else_switches_a_model_for_a_while():
    found = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if switches(path)}
    found = {path for path in found if not path.startswith("testing/")}  # which are tests
    assert found - ALLOWED.keys() == set(), "use plywise._util.modes.evaluating"
    assert ALLOWED.keys() - found == set(), "no longer needed"


def half_frozen() -> nn.Sequential:
    """A network whose batch norm its owner has frozen, with statistics of other data."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    model[1].eval().running_mean.fill_(2.0)
    return model


def modes(model):
    return [part.training for part in model.modules()]


MODULE = """
import torch
from torch import nn

made = []

def model():
    made.append(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6).eval(), nn.Dropout(0.5), nn.Linear(6, 3)))
    return made[-1]

def data():
    return torch.randn(60, 4) + 1, torch.arange(60) % 3
"""


def test_measuring_leaves_every_part_in_its_mode():
    model = half_frozen()
    before = modes(model)
    data = Split(torch.randn(50, 4), torch.arange(50) % 3)
    predict = predictor(model)
    once = mean(CLASSIFICATION.loss, predict, data)
    assert modes(model) == before
    model(data.x)
    assert torch.equal(model[1].running_mean, torch.full((6,), 2.0))
    assert mean(CLASSIFICATION.loss, predict, data) == once
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert modes(model) == before


def test_looking_at_a_users_model_leaves_its_parts_in_their_modes(user_module):
    user_module("thawed", MODULE)
    own_workload("mine", "thawed:model", "thawed:data")
    import thawed

    assert [modes(model) for model in thawed.made] == [[True, True, False, True, True]] * 2


@pytest.mark.parametrize("kind", [pw.LocalLoss, pw.Interlocking, pw.CascadedForward])
def test_local_learners_leave_frozen_batch_norms_frozen(kind):
    blocks = [nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU()), nn.Linear(6, 3)]
    blocks[0][1].eval().running_mean.fill_(2.0)
    if kind is pw.CascadedForward:
        blocks[1] = nn.Sequential(blocks[1], nn.ReLU())
    made = pw.Blocks(blocks, torch.randn(8, 4))
    learner = kind(made, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), num_classes=3)
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    for _ in range(2):
        learner.step(x, y)
        learner.predict(x)
    assert torch.equal(blocks[0][1].running_mean, torch.full((6,), 2.0))
    assert [part.training for part in blocks[0]] == [True, False, True, True]


def test_a_model_that_is_in_eval_mode_as_a_whole_is_trained():
    """As pretrained ones are when they are loaded: nobody means that dropout should stay off."""
    blocks = [nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)).eval(), nn.Linear(6, 3).eval()]
    learner = pw.LocalLoss(
        pw.Blocks(blocks, torch.randn(8, 4)),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        num_classes=3,
    )
    learner.step(torch.randn(30, 4), torch.arange(30) % 3)
    assert all(part.training for block in blocks for part in block.modules())
