"""Sessions: a training in pieces is the training in one piece, and what is wrong is said before it costs."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

from plywise.errors import NonFiniteError, PlywiseError, StateError
from plywise.local import checkpoint
from plywise.training.build import resolve_training
from plywise.training.config import TrainConfig
from plywise.training.judge import judge
from plywise.training.run_folder import RunFolder, cut_back
from plywise.training.session import load_trained, open_session, permutation, share
from sameness import same

MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 7), nn.ReLU(),
        nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 3),
    )

def features():
    return [nn.Sequential(nn.Linear(6, 9), nn.ReLU()), nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7))]

def data():
    x = torch.randn(23, 6)
    y = torch.randint(3, (23,))
    return x, y, x[:9] + 0.1, y[:9]

def huge():
    x, y, *_ = data()
    return x * 1e30, y
"""

STEPS, EPOCHS = 5, 4  # 23 samples in batches of 5: the last one has 3
PLANS = {
    "split, dropout, batch norm": {"model": "things:net", "split": (0, 1, 3)},
    "a rule with memory": {"rule": "KFAC", "optimizer": "SGD", "rate": 0.05, "blocks": 3},
    "AssociatedLearning": {"model": "things:features", "learner": "AssociatedLearning", "set": {"code": 4}},
    "CascadedForward": {"model": "things:features", "learner": "CascadedForward"},
    "Interlocking": {"learner": "Interlocking", "blocks": 3, "optimizer_set": {"betas": (0.5, 0.9)}},
}


@pytest.fixture(autouse=True)
def _project(user_module):
    user_module("things", MODULE)


def plan(out, **settings):
    return TrainConfig(
        **{"data": "things:data", "batch_size": 5, "epochs": EPOCHS, "every": 3, "out": out, **settings}
    )


def run(made, stop=math.inf, fresh=False):
    """One session, asked to stop after some step."""
    session = open_session(made, fresh=fresh)
    session.run(lambda line: session.engine.ask_to_stop() if line.step >= stop else None)
    return session


def killed(made, step):
    """One session, cut off in the middle of a step."""
    session = open_session(made)

    def cut(line):
        if line.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.run(cut)


def log(folder):
    """The lines of a log, without the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "check")} for line in lines]


@pytest.mark.parametrize("name", PLANS)
def test_three_interruptions_change_no_bit(tmp_path, name):
    whole = run(plan(tmp_path / "whole", **PLANS[name]))
    made = plan(tmp_path / "pieces", **PLANS[name])
    # in an epoch, at its end, and before its odd last batch
    for stop in (2, STEPS, 3 * STEPS - 1):
        assert run(made, stop).step == stop
    last = run(made)
    assert (whole.step, last.step) == (STEPS * EPOCHS, STEPS * EPOCHS)
    assert same(whole.engine.learner.state_dict(), last.engine.learner.state_dict())
    assert log(tmp_path / "whole") == log(tmp_path / "pieces")
    x = torch.randn(4, 6)
    assert torch.equal(load_trained(tmp_path / "pieces")(x), whole.engine.learner.predict(x))


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    whole = run(plan(tmp_path / "whole", **PLANS["split, dropout, batch norm"]))
    made = plan(tmp_path / "pieces", **PLANS["split, dropout, batch norm"])
    killed(made, 8)
    with (tmp_path / "pieces" / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "epo')  # the line that it was writing
    killed(made, 7)  # the same step again, and a checkpoint at 6 only
    last = run(made)
    assert last.began == 6
    assert same(whole.engine.learner.state_dict(), last.engine.learner.state_dict())
    assert log(tmp_path / "whole") == log(tmp_path / "pieces")


def test_the_log_says_it_all(tmp_path):
    session = run(plan(tmp_path / "a", blocks=2))
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS * EPOCHS + 1))
    assert [line["epoch"] for line in lines] == [1 + i // STEPS for i in range(STEPS * EPOCHS)]
    assert all(line["losses"].keys() == {"0", "1"} for line in lines)
    judged = {line["step"]: line["accuracy"] for line in lines if "accuracy" in line}
    assert list(judged) == [STEPS * (i + 1) for i in range(EPOCHS)]
    assert judged[STEPS * EPOCHS] == judge(session.engine.learner, session._data.test, "classes")
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path):
    assert torch.equal(permutation(3, 2, 50), permutation(3, 2, 50))
    assert not torch.equal(permutation(3, 2, 50), permutation(3, 1, 50))
    assert not torch.equal(permutation(3, 2, 50), permutation(2, 2, 50))
    session = open_session(plan(tmp_path / "a"))
    seen = Counter()
    for x, _ in session._batches(STEPS, 2 * STEPS):
        assert len(x) in (5, 3)
        seen.update(tuple(row) for row in x.tolist())
    assert seen == Counter(tuple(row) for row in session._data.train.x.tolist())


@pytest.mark.parametrize(("rows", "replicas"), [(1, 3), (5, 2), (6, 3), (7, 4)])
def test_replicas_share_a_batch_evenly(rows, replicas):
    parts = [share(torch.arange(rows), replica, replicas) for replica in range(replicas)]
    assert len({len(part) for part in parts}) == 1
    assert set(torch.cat(parts).tolist()) == set(range(rows))


def test_a_finished_run_goes_on_with_more_epochs(tmp_path):
    whole = run(plan(tmp_path / "whole"))
    run(plan(tmp_path / "pieces", epochs=2))
    again = run(plan(tmp_path / "pieces", epochs=2))
    assert (again.finished, again.began) == (True, 2 * STEPS)
    last = run(plan(tmp_path / "pieces", every=100, keep=1))  # how, not what
    assert same(whole.engine.learner.state_dict(), last.engine.learner.state_dict())
    assert log(tmp_path / "whole") == log(tmp_path / "pieces")


def test_only_so_many_checkpoints_stay(tmp_path):
    run(plan(tmp_path / "a", keep=2))
    assert checkpoint.steps(tmp_path / "a" / "checkpoints") == [18, 20]


def test_blocks_are_cut_where_they_were(tmp_path):
    """Costs are measured again each time; a run keeps its cuts."""
    made = plan(tmp_path / "a", model="things:net", blocks=3)
    training = resolve_training(made)
    for starts in ((0, 1, 2), (0, 2, 4)):
        blocks, found = training.make_blocks(starts)
        assert found == starts
        names = [name for block in blocks for name, _ in block.named_parameters()]
        assert names == [name for name, _ in made_net().named_parameters()]
    told = resolve_training(plan(tmp_path / "a", model="things:net", split=(0, 3)))
    assert told.make_blocks()[1] == (0, 3)
    for wrong in ((1, 2), (0, 2, 2), (0, 9)):
        with pytest.raises(PlywiseError, match="5 units, numbered from 0, and is not to be cut at"):
            training.make_blocks(wrong)
    first, starts = training.make_blocks()
    again, _ = training.make_blocks(starts)
    assert [str(block) for block in first] == [str(block) for block in again]
    assert same([block.state_dict() for block in first], [block.state_dict() for block in again])


def test_a_measured_cut_stays(tmp_path):
    made = plan(tmp_path / "pieces", model="things:net", blocks=3)
    for stop in (2, 9):
        run(made, stop)
    last = run(made)
    starts = RunFolder(tmp_path / "pieces").record().starts
    whole = run(plan(tmp_path / "whole", model="things:net", split=starts))
    assert same(whole.engine.learner.state_dict(), last.engine.learner.state_dict())
    assert run(plan(tmp_path / "pieces", model="things:net", blocks=3, split=starts)).finished
    with pytest.raises(StateError, match=r"split is .* there and 0,3,4 here"):
        run(plan(tmp_path / "pieces", model="things:net", blocks=3, split=(0, 3, 4)))


def made_net():
    import things

    return things.net()


# ---- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rate": 0.5, "seed": 1}, "rate is 0.003 there and 0.5 here; seed is 0 there and 1 here"),
        ({"set": {"code": 3}, "learner": "AssociatedLearning"}, "set is nothing there and code=3 here"),
        ({"rule": "NLMS"}, "rule is not given there and NLMS here"),
        ({"data": "digits"}, "data is things:data there and digits here"),
    ],
)
def test_another_plan_is_refused(tmp_path, change, said):
    run(plan(tmp_path / "a"), stop=4)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StateError, match=said):
        open_session(plan(tmp_path / "a", **change))
    assert sorted(tmp_path.rglob("*")) == before
    assert run(plan(tmp_path / "a"), stop=6).began == 4


def test_changed_data_are_refused(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(20, 6)), np.arange(20) % 3
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y)
    run(plan(tmp_path / "a", data="d.npz"), stop=4)
    np.savez(tmp_path / "d.npz", x_train=x + 1, y_train=y)
    with pytest.raises(StateError, match=r"what d\.npz holds has changed"):
        open_session(plan(tmp_path / "a", data="d.npz"))
    np.savez(tmp_path / "e.npz", x_train=x, y_train=y)  # the same, elsewhere
    assert run(plan(tmp_path / "a", data="e.npz"), stop=5).began == 4


def test_lost_checkpoints_are_missed(tmp_path):
    run(plan(tmp_path / "a"), stop=4)
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(StateError, match=r"no checkpoint in .*checkpoints: bring them back"):
        open_session(plan(tmp_path / "a"))
    assert len(log(tmp_path / "a")) == 4
    (tmp_path / "elsewhere").rename(tmp_path / "a" / "checkpoints")
    (tmp_path / "a" / "plan.json").unlink()
    with pytest.raises(StateError, match=r"no plan\.json"):
        open_session(plan(tmp_path / "a"))
    (tmp_path / "a" / "plan.json").write_text("[]")
    with pytest.raises(StateError, match=r"plan\.json is not a plan"):
        open_session(plan(tmp_path / "a"))
    assert run(plan(tmp_path / "a"), stop=2, fresh=True).began == 0
    assert len(log(tmp_path / "a")) == 2


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(tmp_path):
    whole = run(plan(tmp_path / "whole"))
    run(plan(tmp_path / "a"), stop=8)
    folder = tmp_path / "a" / "checkpoints"
    last = folder / "step_000000008" / "component 1.pt"
    last.write_bytes(last.read_bytes()[:-9])
    with pytest.warns(RuntimeWarning, match=r"step 8 is damaged .* That of step 6 is taken"):
        load_trained(tmp_path / "a")
    again = run(plan(tmp_path / "a"))
    assert again.began == 6
    said = r"step 8 is damaged \(component 1\.pt does not fit .* It goes on from step 6; renamed: step_0+8\.d"
    assert re.search(said, again.note)
    assert (folder / "step_000000008.damaged").is_dir()
    assert same(whole.engine.learner.state_dict(), again.engine.learner.state_dict())
    assert log(tmp_path / "whole") == log(tmp_path / "a")
    for path in folder.rglob("learner.pt"):
        path.unlink()
    with pytest.raises(StateError, match=r"There is no other\. --fresh"):
        open_session(plan(tmp_path / "a"))


def test_a_damaged_plan_or_log_is_said(tmp_path):
    run(plan(tmp_path / "a"), stop=8)
    saved, text = tmp_path / "a" / "log.jsonl", (tmp_path / "a" / "plan.json").read_text()
    lines = saved.read_text().splitlines(keepends=True)
    digit = next(i for i in range(40, 99) if lines[2][i].isdigit())
    lines[2] = f"{lines[2][:digit]}{(int(lines[2][digit]) + 1) % 10}{lines[2][digit + 1 :]}"
    saved.write_text("".join(lines))
    again = run(plan(tmp_path / "a"), stop=9)
    assert "log.jsonl is damaged: 1 of its lines are lost." in again.note
    assert "lacks 1 of 8 steps" in again.note
    assert [line["step"] for line in log(tmp_path / "a")] == [1, 2, 4, 5, 6, 7, 8, 9]
    (tmp_path / "a" / "plan.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(StateError, match=r"plan\.json is not a plan of plywise, or damaged: it does not fit"):
        open_session(plan(tmp_path / "a", seed=1))


def test_what_fails_to_start_leaves_the_old_run_alone(tmp_path):
    run(plan(tmp_path / "a"), stop=4)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PlywiseError, match="has no 'nett'"):
        open_session(plan(tmp_path / "a", model="things:nett"), fresh=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_run_at_a_time(tmp_path):
    held = open_session(plan(tmp_path / "a"))
    with pytest.raises(StateError, match="Another process is at work"):
        open_session(plan(tmp_path / "a"))
    held.run()
    assert open_session(plan(tmp_path / "a")).finished


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    made = plan(tmp_path / "a", optimizer="SGD", rate=1e20)
    with pytest.raises(NonFiniteError, match=r"component \d is (nan|inf) at step 2\. .*step 0 .* stays"):
        run(made)
    assert RunFolder(tmp_path / "a").last_step() == 0
    assert all(math.isfinite(loss) for line in log(tmp_path / "a") for loss in line["losses"].values())


def test_a_failing_step_is_explained(tmp_path):
    made = plan(tmp_path / "a", model="things:net", blocks=2, batch_size=22)
    with pytest.raises(PlywiseError, match=r"Step 2 fails: .* than 1 value .* odd end of an epoch, of 1"):
        run(made)


def test_a_log_is_cut_where_it_should_be(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_back(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_back(path, 0)
    assert path.read_text() == ""
