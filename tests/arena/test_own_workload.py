"""A user's model and data as a workload: every form of data, and the messages for what does not fit."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from plywise.arena.method import TrialContext, end_to_end
from plywise.arena.run.trial import run_trial
from plywise.arena.task import CLASSIFICATION, REGRESSION, SEQUENCES
from plywise.arena.workloads.own import own_workload
from plywise.errors import BlockError, PlywiseError
from plywise.registry.resolve import resolve_data


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).with_name("own_things.py"), tmp_path / "user.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "user", raising=False)
    yield tmp_path
    sys.modules.pop("user", None)


def make_workload(model="net", data="data", **more):
    address = f"user:{data}" if data.isidentifier() else data
    return own_workload("mine", f"user:{model}", address, **more)


def count_samples(data):
    return [len(part.y) for part in vars(data).values()]


# ---- the forms of data -------------------------------------------------------------------------------


def test_two_arrays_are_split_and_this_is_reported():
    workload = make_workload()
    data = workload.make_data()
    assert count_samples(data) == [80, 10, 10]
    assert data.train.x.dtype == torch.float32
    firsts = torch.cat([part.x[:, 0] for part in vars(data).values()])
    assert sorted(firsts.tolist()) == list(range(0, 400, 4)), "each sample is in one part"
    assert "80 to train, 10 to validate, 10 to test" in workload.about
    assert "by a fixed seed" in workload.about
    again = make_workload().make_data()
    assert torch.equal(again.test.x, data.test.x)
    assert (workload.batch_size, workload.steps, workload.name, workload.target) == (80, 1000, "mine", None)
    assert make_workload(batch_size=7, steps=9).batch_size == 7


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("lists", [80, 10, 10]),
        ("dataset", [80, 10, 10]),
        ("four", [89, 11, 7]),
        ("two_datasets", [80, 10, 8]),
        ("three", [100, 5, 6]),
        ("mixed", [30, 5, 6]),
    ],
)
def test_other_forms(data, expected):
    found = make_workload(data=data).make_data()
    assert count_samples(found) == expected
    for part in vars(found).values():
        assert part.x.shape[1:] == (4,)
        assert (part.x.dtype, part.y.dtype) == (torch.float32, torch.long)


def test_bytes_are_images_and_whole_numbers_stay():
    images = make_workload("image", "images").make_data()
    assert images.train.x.unique().tolist() == [1.0]
    workload = make_workload("words", "tokens")
    assert workload.make_data().train.x.dtype == torch.long
    assert workload.task is SEQUENCES
    assert (workload.classes, workload.blocks) == (9, 2), "for local learners of tokens"
    assert workload.labels_tokens


def test_npz(user):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)), np.arange(40) % 3
    np.savez(user / "a.npz", x_train=x, y_train=y)
    assert count_samples(make_workload(data="a.npz").make_data()) == [32, 4, 4]
    np.savez(user / "a.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
    assert count_samples(make_workload(data="a.npz").make_data()) == [36, 4, 5]
    np.savez(user / "a.npz", x_train=x, y_train=y, x_validation=x[:5], y_validation=y[:5])
    assert count_samples(make_workload(data="a.npz").make_data()) == [36, 5, 4]
    np.savez(user / "a.npz", x_train=x, y_train=y, x_test=x[:5])
    with pytest.raises(PlywiseError, match="has no y_test; it has: x_train, y_train, x_test"):
        make_workload(data="a.npz")
    np.savez(user / "a.npz", x=x, y=y)
    with pytest.raises(PlywiseError, match="has no x_train and no y_train; it has: x, y"):
        make_workload(data="a.npz")
    with pytest.raises(PlywiseError, match=r"There is no file gone\.npz"):
        make_workload(data="gone.npz")


def test_csv_of_numbers_and_of_classes(user):
    rows = [f"{i},{i * i % 7},{i % 5},1.5" for i in range(50)]
    (user / "a.csv").write_text(
        "a,b,c,d,target\n" + "\n".join(f"{row},{i / 8}" for i, row in enumerate(rows))
    )
    workload = make_workload("one", "a.csv")
    assert workload.task.metric is REGRESSION.metric
    assert workload.make_data().train.y.shape == (40, 1), "as the model's output has it"
    (user / "a.csv").write_text(
        "a,b,c,d,target\n" + "\n".join(f"{row},{i % 3}" for i, row in enumerate(rows))
    )
    workload = make_workload("net", "a.csv")
    assert workload.task.metric is CLASSIFICATION.metric
    assert workload.classes == 3
    with pytest.raises(PlywiseError, match=r"1 output, and targets go up to 2.*floating-point"):
        make_workload("one", "a.csv")
    (user / "a.csv").write_text("a,b,c,d,target\n" + "\n".join(f"{row}," for row in rows))
    with pytest.raises(PlywiseError, match="hold NaN or infinity in 50 of 50 samples"):
        make_workload("one", "a.csv")
    (user / "a.csv").write_text("a\n1\n2\n")
    with pytest.raises(PlywiseError, match="has one column"):
        make_workload("one", "a.csv")


def test_the_data_of_a_shipped_workload_and_data_read_before():
    data = resolve_data("digits-mlp").data
    assert count_samples(data) == [1100, 297, 400]
    with pytest.raises(PlywiseError, match=r"fails on two inputs of torch\.float32 and shape"):
        make_workload(data="digits-mlp")
    read = make_workload().make_data()
    assert own_workload("again", "user:net", read).make_data() is read


def test_a_row_and_a_column_of_numbers_are_the_same():
    for model, data, shape in [
        ("one", "numbers", (80, 1)),
        ("flat", "column", (80,)),
        ("one", "column", (80, 1)),
        ("flat", "numbers", (80,)),
    ]:
        assert make_workload(model, data).make_data().train.y.shape == shape
        assert make_workload(model, data, loss="user:l1").make_data().train.y.shape == shape


# ---- tasks -------------------------------------------------------------------------------------------


def test_usual_tasks():
    classes = make_workload()
    assert classes.task.metric_name == "error rate"
    assert 0.6 < classes.task.chance < 0.7
    assert (classes.classes, classes.blocks) == (3, 3)
    numbers = make_workload("one", "numbers")
    assert numbers.task.metric_name == "mean squared error"
    assert numbers.task.chance == pytest.approx(numbers.make_data().train.y.var(0, correction=0).item())
    assert (numbers.classes, numbers.blocks) == (0, 0)


def test_own_loss_and_metric():
    smooth = make_workload(loss="user:smoothed")
    assert (smooth.task.metric_name, smooth.classes) == ("error rate", 3)
    assert smooth.task.loss.__name__ == "smoothed"
    assert make_workload("one", "numbers", loss="user:l1").task.metric_name == "user:l1"
    assert make_workload("one", "numbers", metric="user:l1").task.loss is REGRESSION.loss
    judged = make_workload(metric="user:confidence")
    assert (judged.task.metric_name, judged.classes) == ("user:confidence", 3)
    assert make_workload("one", "numbers", loss="torch.nn.functional:huber_loss").task.loss(
        torch.zeros(1), torch.ones(1)
    ).item() == pytest.approx(0.5)


def test_blocks():
    assert make_workload(blocks=2).blocks == 2
    assert make_workload(blocks=0).blocks == 0
    assert make_workload("image", "images").blocks == 0, "a single layer is not cut"
    with pytest.raises(BlockError, match="can be cut into 3 at most"):
        make_workload(blocks=7)


def test_it_trains_and_the_callers_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    workload = make_workload("one", "numbers", steps=40)
    assert torch.equal(before, torch.get_rng_state())

    def begin():
        model = workload.make_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return end_to_end(TrialContext(model, workload.task, {}, 40, torch.ones(1)), optimizer)

    data = workload.make_data()
    size = workload.batch_size
    one, two = (run_trial(begin, data, workload.task, seed=1, steps=40, batch_size=size) for _ in range(2))
    assert one.failure is None
    assert one.validation == two.validation
    assert one.validation[-1] < one.validation[0]
    assert workload.make_model() is not workload.make_model()


# ---- what does not fit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            "holes",
            r"user:holes, train: the inputs hold NaN or infinity in 2 of 100 samples, first in number 3",
        ),
        ("target_holes", "the targets hold NaN or infinity in 1 of 100 samples, first in number 99"),
        ("unequal", "there are 100 inputs and 99 targets"),
        ("empty", "there is no sample"),
        ("few", "9 training samples; a comparison needs 10"),
        (
            "other_shape",
            r"training input is float32 of shape \(4,\), and a test input float32 of shape \(3,\)",
        ),
        ("other_kind", "training target is int64 of shape .*test target float32"),
        ("negative", "the targets hold -1; classes and tokens count from 0"),
        ("columns", r"whole numbers of shape \(100, 1\). Classes are of shape \(N,\), as of y\[:, 0\]"),
        ("high", "3 outputs, and targets go up to 3: it needs 4"),
        ("giant", "3 outputs, and targets go up to 1000000000000: it needs"),
        ("words_as_x", "the inputs are words, and no numbers"),
        ("ragged", "not an array of numbers"),
        ("five", "returned 5 things; it must return"),
        ("nothing", "returned a NoneType; it must return"),
        ("boom", "user:boom raised ValueError: not today"),
        ("number", "is of type int, not a function"),
        ("stream", "a Stream gave no batch"),
        ("bare", r"a Bare must hold samples, each a pair \(x, y\)"),
        ("absent", "has no 'absent'"),
        ("digits-mpl", "Did you mean digits-mlp"),
    ],
)
def test_data_that_do_not_fit(data, words):
    with pytest.raises(PlywiseError, match=words):
        make_workload(data=data)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("boom", "data", "user:boom raised ValueError: not today"),
        ("nothing", "data", "returned a NoneType, not a torch.nn.Module"),
        ("narrow", "data", r"fails on two inputs of torch.float32 and shape \(2, 4\): RuntimeError"),
        ("dead", "data", "gives NaN before any training, on 2 samples without NaN or infinity. Look for"),
        ("fixed", "data", "a Flatten without a parameter to train"),
        ("same", "data", "the same network twice"),
        ("wordy", "data", "gives a list, not one tensor"),
        ("net", "numbers", r"gives \(3,\) for each sample, and a target \(\); they must be of one shape"),
        ("one", "data", "1 output, and targets go up to 2: it needs 3"),
        ("flat", "data", r"it must be \(classes,\) scores"),
        ("net", "one_hot", r"one-hot: of 3 numbers .* y.argmax\(1\)"),
        ("instance", "data", "is a network. Training needs a function that makes it"),
        ("absent", "data", "has no 'absent'"),
    ],
)
def test_models_that_do_not_fit(model, data, words):
    with pytest.raises(PlywiseError, match=words):
        make_workload(model, data)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("user:rows", r"The loss must be a tensor with one number, the mean; it is of shape \(2, 1\)"),
        ("user:broken", "The loss fails on outputs of shape .*KeyError: 'weights'"),
        ("user:endless", "The loss is (nan|inf|-inf) on two samples"),
        ("user:absent", "has no 'absent'"),
        ("l1", "Say where your loss is as module:name"),
    ],
)
def test_losses_that_do_not_fit(loss, words):
    with pytest.raises(PlywiseError, match=words):
        make_workload("one", "numbers", loss=loss)
    with pytest.raises(PlywiseError, match=words.replace("loss", "metric")):
        make_workload("one", "numbers", metric=loss)


def test_the_model_is_left_as_it_was_made():
    module = make_workload().make_model()
    assert isinstance(module, nn.Sequential)
    assert module.training
