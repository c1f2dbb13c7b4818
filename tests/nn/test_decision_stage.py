"""The decision stage: what its classifier sees, what it decides, and what it refuses."""

import copy
import doctest

import numpy as np
import pytest
import torch
from torch import nn

import plywise.nn.decision_stage as module
from plywise.data.digits import load_digits
from plywise.errors import NonFiniteError, PlywiseError
from plywise.nn import DecisionStage


class Nearest:
    """The label of the nearest row seen."""

    def fit(self, X, y):
        self.X, self.y = X, y

    def predict(self, X):
        return self.y[((X[:, None] - self.X) ** 2).sum(2).argmin(1)]


def trained(epochs, rate=1e-2):
    """A small network after some epochs on digits, and the digits."""
    torch.manual_seed(0)
    train, validation, test = load_digits()
    model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(epochs):
        for rows in torch.randperm(1100).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train.x[rows]), train.y[rows]).backward()
            optimizer.step()
    return model, train, validation, test


def share_right(decided, part):
    return (decided == part.y).double().mean().item()


def test_classifier_sees_softmax_vectors_made_in_eval_mode():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Dropout())
    model(torch.randn(50, 4) + 2)
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    stage = DecisionStage(model, Nearest()).fit([(x[:20], y[:20]), (x[20:], y[20:])])
    assert model.training
    assert model[2].training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        scores = model.eval()(x).double()
    expected = (scores.exp() / scores.exp().sum(1, keepdim=True)).numpy()
    assert stage.classifier.X.dtype == np.float64
    np.testing.assert_allclose(stage.classifier.X, expected, rtol=0, atol=1e-6)
    assert stage.classifier.y.tolist() == y.tolist()


def test_prediction_in_parts_is_prediction_at_once():
    model, train, _, test = trained(1)
    data = [(train.x[:200], train.y[:200])]
    whole = DecisionStage(model, Nearest()).fit(data).predict(test.x)
    parts = DecisionStage(model, Nearest(), batch_size=33).fit(data).predict(test.x)
    assert torch.equal(whole, parts)
    assert whole.dtype == torch.int64
    assert whole.shape == test.y.shape


def test_converged_network_is_decided_as_its_largest_probability_does():
    model, train, _, test = trained(40)
    decided = model(train.x).argmax(1)
    assert share_right(decided, train) == 1
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(train.x, train.y), batch_size=128)
    stage = DecisionStage(model, Nearest()).fit(loader)
    assert torch.equal(stage.predict(train.x), decided)
    agreement = (stage.predict(test.x) == model(test.x).argmax(1)).double().mean()
    assert agreement > 0.97


def test_support_vector_machine_agrees_with_a_converged_network():
    svm = pytest.importorskip("sklearn.svm", reason="scikit-learn is not installed")
    model, train, _, test = trained(40)
    stage = DecisionStage(model, svm.SVC()).fit([(train.x, train.y)])
    assert torch.equal(stage.predict(train.x), model(train.x).argmax(1))
    assert (stage.predict(test.x) == model(test.x).argmax(1)).double().mean() > 0.98


def test_stage_reads_what_the_largest_probability_does_not_say():
    """Classes exchanged at the output: every largest probability is wrong, no information is lost."""
    model, train, _, test = trained(20)
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.copy_(parameter.roll(1, 0))
    assert share_right(model(test.x).argmax(1), test) < 0.1
    stage = DecisionStage(model, Nearest()).fit([(train.x, train.y)])
    assert share_right(stage.predict(test.x), test) > 0.9


def test_half_trained_network_gains_on_real_digits():
    model, train, _, test = trained(2, rate=1e-3)
    stage = DecisionStage(model, Nearest()).fit([(train.x, train.y)])
    assert share_right(stage.predict(test.x), test) > share_right(model(test.x).argmax(1), test) + 0.05


def test_a_second_fit_replaces_the_first():
    model = nn.Linear(2, 2)
    x = torch.eye(2)
    stage = DecisionStage(model, Nearest()).fit([(x, torch.tensor([0, 1]))])
    assert stage.predict(x).tolist() == [0, 1]
    assert stage.fit([(x, torch.tensor([7, 5]))]).predict(x).tolist() == [7, 5]


@pytest.mark.parametrize("classifier", [object(), nn.Linear(2, 2), type("Half", (), {"fit": print})()])
def test_what_is_no_classifier_is_refused(classifier):
    with pytest.raises(PlywiseError, match=r"has no .*predict"):
        DecisionStage(nn.Linear(2, 2), classifier)


@pytest.mark.parametrize("batch_size", [0, 2.0, True, -1])
def test_bad_batch_size(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        DecisionStage(nn.Linear(2, 2), Nearest(), batch_size=batch_size)


def test_order_and_data_that_do_not_fit_are_refused():
    x, y = torch.randn(6, 2), torch.arange(6) % 2
    stage = DecisionStage(nn.Linear(2, 2), Nearest())
    with pytest.raises(PlywiseError, match="call fit"):
        stage.predict(x)
    with pytest.raises(PlywiseError, match="no batch"):
        stage.fit([])
    with pytest.raises(PlywiseError, match="one class label a sample"):
        stage.fit([(x, nn.functional.one_hot(y))])
    with pytest.raises(PlywiseError, match="one class label a sample"):
        stage.fit([(x, y[:5])])


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 1), nn.Flatten(0), nn.Unflatten(1, (2, 1)), nn.RNN(2, 2, batch_first=True)],
    ids=["one score", "flat", "three dimensions", "a tuple"],
)
def test_models_without_rows_of_scores_are_refused(model):
    stage = DecisionStage(model, Nearest())
    with pytest.raises(PlywiseError, match="2 or more classes"):
        stage.fit([(torch.randn(6, 2), torch.arange(6) % 2)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_classifier_never_sees_numbers_that_are_not_finite(bad):
    x, y = torch.randn(6, 2), torch.arange(6) % 2
    stage = DecisionStage(nn.Linear(2, 2), Nearest())
    broken = x.clone()
    broken[3] = bad
    with pytest.raises(NonFiniteError, match="NaN or an infinity"):
        stage.fit([(x, y), (broken, y)])
    assert not hasattr(stage.classifier, "X")
    with pytest.raises(PlywiseError, match="call fit"):
        stage.predict(x)
    with pytest.raises(NonFiniteError, match="NaN or an infinity"):
        stage.fit([(x, y)]).predict(broken)


def test_classifier_that_forgets_rows_is_refused():
    class Lazy(Nearest):
        def predict(self, X):
            return super().predict(X)[:-1]

    stage = DecisionStage(nn.Linear(2, 2), Lazy()).fit([(torch.randn(6, 2), torch.arange(6) % 2)])
    with pytest.raises(PlywiseError, match="one label a row"):
        stage.predict(torch.randn(4, 2))


def test_worked_examples():
    assert doctest.testmod(module).failed == 0
