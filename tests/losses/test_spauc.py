"""SPAUC: the mean of its gradients is that of the loss over pairs, and scikit-learn takes it."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from plywise import PlywiseError
from plywise.data.digits import load_digits
from plywise.data.sets import load_numeric_table
from plywise.data.store import find_file
from plywise.losses.spauc import SPAUC, Numbers, compute_sample_gradient, roc_auc, shrink
from processes import ForkedCommand


def data(n: int = 60, share: float = 0.2, seed: int = 0) -> tuple[Numbers, np.ndarray]:
    random = np.random.default_rng(seed)
    y = random.permutation(n) < share * n
    x = random.normal(size=(n, 4)) @ (np.eye(4) + 0.2 * random.normal(size=(4, 4))) + 0.8 * y[:, None]
    return x, y


def rare_digits() -> tuple[Numbers, np.ndarray, Numbers, np.ndarray]:
    """Digits with few eights in training: inputs and labels, of training and of test."""
    train, _, test = load_digits()
    y = train.y == 8
    kept = ~y | (y.cumsum(0) <= 30)
    return train.x[kept].numpy(), y[kept].numpy(), test.x.numpy(), (test.y == 8).numpy()


def best(x: Numbers, y: np.ndarray, ridge: float = 0.0) -> Numbers:
    """The minimum of p(1−p) E(1 − wᵀ(x₊ − x₋))² + ridge/2 ‖w‖², in closed form."""
    p, gap = y.mean(), x[y].mean(0) - x[~y].mean(0)
    scatter = np.cov(x[y].T, bias=True) + np.cov(x[~y].T, bias=True) + np.outer(gap, gap)
    both = p * (1 - p)
    return np.linalg.solve(2 * both * scatter + ridge * np.eye(x.shape[1]), 2 * both * gap)


# The gradient of one sample: ours passes, and a known fault does not.


def norm_in_place_of_product(
    w: Numbers, away: Numbers, between: Numbers, share: float, positive: bool
) -> Numbers:
    """‖x − u‖² w in place of (wᵀ(x − u))(x − u)."""
    other = 1 - share if positive else share
    both = 2 * share * (1 - share)
    return 2 * other * (away @ away) * w + both * (1 + w @ between) * between


def check_mean_is_the_pairwise_gradient(gradient: Any) -> None:
    x, y = data()
    w = np.random.default_rng(1).normal(size=4)
    p, u, v = y.mean(), x[y].mean(0), x[~y].mean(0)
    samples = [gradient(w, a - (u if t else v), v - u, p, t) for a, t in zip(x, y, strict=True)]
    weights = torch.tensor(w, requires_grad=True)
    pairs = [(1 - weights @ torch.tensor(up - down)) ** 2 for up in x[y] for down in x[~y]]
    (p * (1 - p) * torch.stack(pairs).mean()).backward()
    np.testing.assert_allclose(np.mean(samples, axis=0), weights.grad.numpy(), rtol=1e-12)


def test_the_mean_of_its_gradients_is_that_of_all_pairs():
    check_mean_is_the_pairwise_gradient(compute_sample_gradient)


def test_the_known_fault_is_caught():
    with pytest.raises(AssertionError):
        check_mean_is_the_pairwise_gradient(norm_in_place_of_product)


def test_a_run_by_hand():
    """Three samples, with the numbers written out."""
    model = SPAUC(rate=0.5, ridge=0.1, lasso=0.05)
    model.partial_fit([[0.0, 0.0]], [0], classes=[0, 1])
    assert model.last_.tolist() == [0.0, 0.0]
    model.partial_fit([[2.0, 0.0]], [1])  # v − u = (−2, 0), p = 1/2, κ² = 4, η = 0.5/4/√2
    step = 0.125 / math.sqrt(2)
    second = (step * 1.0 - step * 0.05) / (1 + step * 0.1)  # g = 2/4 · (−2, 0)
    np.testing.assert_allclose(model.last_, [second, 0.0], rtol=1e-15)
    model.partial_fit([[0.0, 2.0]], [0])  # v = (0, 1), c = (0, 1), v − u = (−2, 1), p = 1/3, κ² = 5
    step, both = 0.1 / math.sqrt(3), 4 / 9
    gradient = both * (1 - 2 * second) * np.array([-2.0, 1.0])  # wᵀc = 0
    moved = np.array([second, 0.0]) - step * gradient
    third = np.sign(moved) * (np.abs(moved) - step * 0.05) / (1 + step * 0.1)
    np.testing.assert_allclose(model.last_, third, rtol=1e-14)
    np.testing.assert_allclose(model.coef_[0], (np.array([second, 0.0]) + third) / 3, rtol=1e-14)
    midway = (model.decision_function([[2.0, 0.0]]) + model.decision_function([[0.0, 1.0]])).item()
    assert midway == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_it_nears_the_minimum(ridge):
    x, y = data(400)
    wanted = best(x, y, ridge)
    distances = [
        np.linalg.norm(SPAUC(passes=passes, ridge=ridge).fit(x, y).last_ - wanted) for passes in (1, 4, 32)
    ]
    assert distances[2] < distances[1] < distances[0]
    assert distances[2] < 0.15 * np.linalg.norm(wanted)


def test_a_shift_of_the_inputs_changes_nothing_and_their_scale_only_that_of_the_weights():
    x, y = data()
    plain = SPAUC().fit(x, y)
    shifted, scaled = SPAUC().fit(x + np.array([5.0, -3.0, 0.0, 1.0]), y), SPAUC().fit(1000.0 * x, y)
    np.testing.assert_allclose(shifted.coef_, plain.coef_, rtol=1e-9)
    np.testing.assert_allclose(1000.0 * scaled.coef_, plain.coef_, rtol=1e-9)
    np.testing.assert_allclose(scaled.decision_function(1000.0 * x), plain.decision_function(x), rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("settings", [{}, {"rate": 0.8}])
def test_scales_and_shares_do_not_upset_it(scale, share, settings):
    x, y = data(100, share)
    model = SPAUC(**settings).fit(scale * x, y)
    assert np.isfinite(model.coef_).all()
    assert model.score(scale * x, y) > 0.6


def test_no_step_overshoots_from_the_stated_sample_on():
    """The step's matrix I − η(2k ccᵀ + 2p(1−p) ddᵀ) has no eigenvalue below −1 from t = (rate/0.8)² on."""
    x, y = data(300, 0.3)
    model, early, late = SPAUC(rate=8.0), [], []
    for row, label in zip(x, y, strict=True):
        model.partial_fit(row[None], [label], classes=[False, True])
        p, (v, u) = model._counts[1] / model._count, model._means
        c, k = row - model._means[int(label)], 1 - p if label else p
        step = 8.0 / (model._reach or 1.0) / math.sqrt(model._count)
        matrix = np.eye(4) - step * (2 * k * np.outer(c, c) + 2 * p * (1 - p) * np.outer(v - u, v - u))
        (early if model._count < 100 else late).append(np.linalg.eigvalsh(matrix)[0])
    assert min(early) < -1
    assert min(late) >= -1


def test_a_rate_that_is_too_high_says_so():
    x, y = data(400)
    with pytest.raises(PlywiseError, match=r"a rate of at most 0.8 .it is 1e.30."):
        SPAUC(rate=1e30).fit(x, y)


def test_the_other_class_as_positive_turns_the_scores():
    x, y = data()
    np.testing.assert_allclose(SPAUC().fit(x, ~y).coef_, -SPAUC().fit(x, y).coef_, rtol=1e-12)


def test_samples_may_come_one_by_one():
    x, y = data()
    whole, parts = SPAUC().partial_fit(x, y), SPAUC()
    for row, label in zip(x, y, strict=True):
        parts.partial_fit(row[None], [label], classes=[False, True])
    assert np.array_equal(whole.coef_, parts.coef_)
    assert np.array_equal(whole.intercept_, parts.intercept_)


def test_one_class_alone_moves_nothing():
    x, _ = data()
    model = SPAUC().partial_fit(x, np.zeros(60), classes=[0, 1])
    assert not model.coef_.any()
    assert not SPAUC().fit(np.ones((6, 2)), [0, 1, 0, 1, 0, 1]).coef_.any()  # nothing to tell them apart by


def test_a_lasso_shrinks_to_zero():
    x, y = data(400)
    sizes = [np.abs(SPAUC(lasso=lasso).fit(x, y).coef_).sum() for lasso in (0.0, 0.05, 0.2)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert not SPAUC(rate=0.8, lasso=10.0).fit(x, y).last_.any()
    assert shrink(np.array([-3.0, 0.5, 2.0]), 1.0).tolist() == [-2.0, 0.0, 1.0]


def test_same_seed_same_bits_and_copies_go_on():
    x, y = data()
    model = SPAUC(seed=3).fit(x, y)
    assert np.array_equal(model.coef_, SPAUC(seed=3).fit(x, y).coef_)
    assert not np.array_equal(model.coef_, SPAUC(seed=4).fit(x, y).coef_)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(other.partial_fit(x, y).coef_, SPAUC(seed=3).fit(x, y).partial_fit(x, y).coef_)
    assert np.array_equal(model.fit(x, y).coef_, SPAUC(seed=3).fit(x, y).coef_)  # again, not on


def test_any_two_labels_will_do():
    x, y = data()
    names = np.where(y, "ill", "healthy")
    model = SPAUC().fit(x.tolist(), names.tolist())
    assert model.classes_.tolist() == ["healthy", "ill"]
    assert np.array_equal(model.predict(x) == "ill", model.decision_function(x) > 0)
    assert (model.predict(x) == names).mean() > 0.7
    assert model.score(x, names) == roc_auc(model.decision_function(x), y)


def test_a_rare_digit():
    x, y, x_test, y_test = rare_digits()
    assert SPAUC().fit(x, y).score(x_test, y_test) > 0.9


@pytest.mark.skipif(
    find_file("uci_wine_quality_red.csv.gz") is None,
    reason="no uci_wine_quality_red.csv.gz; PLYWISE_DATA can name its folder",
)
def test_good_wines_are_rare():
    x, quality = load_numeric_table("uci_wine_quality_red")
    y = quality >= 7
    assert 0.1 < y.mean() < 0.2
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[:1100], order[1100:]
    mean, deviation = x[train].mean(0), x[train].std(0)
    x = (x - mean) / deviation
    model = SPAUC(passes=10).fit(x[train], y[train])
    exact = roc_auc(x[test] @ best(x[train], y[train]), y[test])
    assert model.score(x[test], y[test]) > 0.8
    assert model.score(x[test], y[test]) > exact - 0.03


def test_auc_by_its_definition():
    random = np.random.default_rng(0)
    scores, y = random.integers(0, 6, size=50), random.random(50) < 0.3
    pairs = [(up > down) + 0.5 * (up == down) for up in scores[y] for down in scores[~y]]
    assert roc_auc(scores, y) == pytest.approx(np.mean(pairs), rel=1e-14)
    assert roc_auc(torch.tensor(scores), torch.tensor(y)) == roc_auc(scores, y)
    for wrong in (np.zeros(50), np.ones(50)):
        with pytest.raises(ValueError, match="both classes"):
            roc_auc(scores, wrong)
    with pytest.raises(ValueError, match="NaN"):
        roc_auc([math.nan, 1.0], [0, 1])


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ([1.0, 2.0], [0, 1], r"\(n, d\), not \(2,\)"),
        ([[1.0], [math.nan]], [0, 1], "NaN or an infinity"),
        ([[1.0], [2.0]], [0, 1, 1], "a label for each of 2 samples"),
        ([[1.0], [2.0]], [0, 0], "two kinds, not 1"),
        ([[1.0], [2.0], [3.0]], [0, 1, 2], "two kinds, not 3"),
        (np.zeros((0, 2)), [], "0 samples"),
    ],
)
def test_wrong_data_are_refused(x, y, words):
    for learn in (SPAUC().fit, SPAUC().partial_fit):
        with pytest.raises(ValueError, match=words):
            learn(x, y)


def test_what_does_not_fit_what_was_learned_is_refused():
    with pytest.raises(PlywiseError, match="Call fit"):
        SPAUC().predict([[1.0]])
    model = SPAUC().fit(*data())
    before = model.coef_.copy()
    with pytest.raises(ValueError, match=r"3 features.*4"):
        model.decision_function(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"labels .5. are none of"):
        model.partial_fit(np.zeros((1, 4)), [5])
    assert np.array_equal(model.coef_, before)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"ridge": -1.0}, {"lasso": math.inf}, {"passes": 0}])
def test_wrong_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"SPAUC: {name} must"):
        SPAUC(**wrong)
    with pytest.raises(ValueError, match=f"SPAUC: {name} must"):
        SPAUC().set_params(**wrong)


def test_settings_by_name():
    model = SPAUC(ridge=0.5)
    assert model.get_params() == {"rate": 5.0, "ridge": 0.5, "lasso": 0.0, "passes": 5, "seed": 0}
    assert model.set_params(passes=np.int64(2), rate=np.float64(0.1)) is model
    assert "passes=" in repr(model)
    with pytest.raises(ValueError, match="no setting 'penalty'; it has rate"):
        model.set_params(penalty=1.0)


@pytest.mark.slow
def test_scikit_learn_is_not_imported(tmp_path):
    script = tmp_path / "look.py"
    script.write_text("import sys, plywise.losses.spauc; sys.exit('sklearn' in sys.modules)")
    assert ForkedCommand(["python", str(script)], {}, tmp_path / "out", tmp_path / "err").wait() == 0


class TestWithScikitLearn:
    def test_clone_and_scores(self):
        sklearn = pytest.importorskip("sklearn")
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import cross_val_score

        x, y, x_test, y_test = rare_digits()
        model = sklearn.base.clone(SPAUC(ridge=0.01).fit(x, y))
        assert not hasattr(model, "coef_")
        assert model.get_params()["ridge"] == 0.01
        scores = cross_val_score(model, x, y, cv=3, scoring="roc_auc")
        assert scores.min() > 0.8
        np.testing.assert_allclose(
            cross_val_score(model, x, y, cv=3), scores, rtol=1e-12
        )  # its score is the AUC
        model.fit(x, y)
        scores = model.decision_function(x_test)
        assert roc_auc(scores, y_test) == pytest.approx(roc_auc_score(y_test, scores), rel=1e-12)

    def test_pipeline_and_search(self):
        pytest.importorskip("sklearn")
        from sklearn.base import is_classifier
        from sklearn.model_selection import GridSearchCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        x, y = data(200)
        assert is_classifier(SPAUC())
        pipeline = make_pipeline(StandardScaler(), SPAUC())
        search = GridSearchCV(pipeline, {"spauc__rate": [1e-6, 0.5], "spauc__passes": np.arange(1, 3)}, cv=3)
        search.fit(x, np.where(y, "rare", "common"))
        assert search.best_score_ > 0.6
        assert set(search.predict(x)) <= {"rare", "common"}
