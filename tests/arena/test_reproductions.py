"""The papers' experiments: networks of the stated sizes, steps, intervals and verdicts."""

import math

import pytest
import torch
from torch import nn

from plywise.arena.method import EndToEnd
from plywise.arena.reproductions import PAPERS, find_paper, proxprop
from plywise.arena.reproductions.associated_learning import (
    schedule,
    shifted,
    standardised,
    tensorflow_adam,
)
from plywise.arena.reproductions.experiment import (
    DIGITS,
    DIVERGED,
    FULL,
    MIDDLE,
    SMALL,
    TEST_ACCURACY,
    TRAINING_LOSS,
    Arm,
    Claim,
    Experiment,
    Start,
)
from plywise.arena.reproductions.summary import (
    REPRODUCED,
    REVERSED,
    judge_claim,
    make_outcome,
)
from plywise.arena.scoring.verdicts import UNDECIDED, bound_mean, student
from plywise.data.store import find_file
from plywise.errors import PlywiseError

EXPERIMENTS = [
    pytest.param(paper, experiment.name, id=f"{paper}/{experiment.name}")
    for paper in PAPERS
    for experiment in find_paper(paper).experiments
]

# by hand: inputs × outputs + outputs for each layer, channels × channels × 9 or 25 for each convolution
DENSE_PROXPROP = 3072 * 4000 + 4000 + 4000 * 1000 + 1000 + 1000 * 4000 + 4000 + 4000 * 10 + 10
AL_MLP = 784 * 1024 + 1024 + 1024 * 1024 + 1024  # f
AL_MLP += 1024 * 5120 + 5120 + 5120 * 1024 + 1024  # the last bridge
AL_MLP += 1024 * 1024 + 1024 + 1024 * 10 + 10  # decoders
AL_CNN = 896 + 3 * 9248 + 18496 + 3 * 36928
AL_CNN += 4096 * 1280 + 1280 + 1280 * 256 + 256 + 3 * (256 * 256 + 256) + 256 * 10 + 10
AL_VGG = 3584 + 295_168 + 590_080 + 1_180_160 + 2 * 2_359_808 + 2048 * 1024 + 1024 + 1024 * 1024 + 1024
AL_VGG += 1024 * 1500 + 1500 + 1500 * 300 + 300 + 3 * (300 * 300 + 300) + 300 * 10 + 10
NORMS = 2 * (128 + 256 + 256 + 512 + 512 + 512) + 2 * (1024 + 1024 + 1500 + 4 * 300)
VGG13 = 3 * 64 * 9 + 64 + 64 * 64 * 9 + 64 + 64 * 128 * 9 + 128 + 128 * 128 * 9 + 128
VGG13 += 128 * 256 * 9 + 256 + 256 * 256 * 9 + 256 + 256 * 512 * 9 + 512 + 3 * (512 * 512 * 9 + 512)
VGG13 += 2 * 2 * (64 + 128 + 256 + 512 + 512) + 512 * 10 + 10
PARAMETERS = {
    "proxprop/table-1": {"": DENSE_PROXPROP},
    "proxprop/mlp": {"": DENSE_PROXPROP},
    "proxprop/convnet": {"": 76 * 16 + 401 * 20 + 501 * 20 + 321 * 10},
    "associated-learning/mnist-mlp": {"": AL_MLP},
    "associated-learning/cifar10-cnn": {"": AL_CNN},
    "associated-learning/cifar10-vgg": {"": AL_VGG, "BackProp": AL_VGG + NORMS},
    "back-matching/vgg13-cifar10": {"": VGG13},
    "back-matching/vgg13-cifar100": {"": VGG13 + 90 * 513},
    "consequentialism/mnist-mlp": {"": 785 * 1024 + 1025 * 1024 + 1025 * 10},
    "consequentialism/mnist-conv": {"": 10 * 32 + 289 * 64 + 3137 * 128 + 129 * 10},
}


def find_shape(experiment):
    return (1, 28, 28) if "mnist" in experiment.name else (3, 32, 32)


def make_images(experiment, count):
    """Make random images of the experiment's shape, and labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, *find_shape(experiment), generator=generator), torch.arange(count) % 10


def unwrap_trainer(trainer):
    """Return the trainer inside the wrappers."""
    return unwrap_trainer(trainer.trainer) if hasattr(trainer, "trainer") else trainer


def find_network(trainer):
    """Return the network that predicts."""
    found = unwrap_trainer(trainer)
    return found.model if isinstance(found, EndToEnd) else found.learner.as_module()


@pytest.mark.parametrize(("paper", "name"), EXPERIMENTS)
def test_networks_at_full_size_are_the_papers(paper, name):
    experiment = find_paper(paper).find(name)
    expected = PARAMETERS[f"{paper}/{name}"]
    built = {}
    for arm in experiment.arms_at(FULL):
        if arm.method in built and arm.at != "with f frozen":
            continue  # another rate, or other first weights
        with torch.device("meta"):  # shapes without memory
            size = experiment.sizes[FULL]
            example = torch.empty(2, *find_shape(experiment))
            built[arm.method] = find_network(arm.begin(Start(size, arm.rates[0], example, "meta")))
        count = sum(parameter.numel() for parameter in built[arm.method].parameters())
        assert count == expected.get(arm.method, expected[""]), arm.name


def test_the_published_counts():
    assert PARAMETERS["associated-learning/mnist-mlp"][""] == 13_405_194
    assert PARAMETERS["proxprop/convnet"][""] == 22_466


@pytest.mark.parametrize(("paper", "name"), EXPERIMENTS)
def test_a_step_at_small_size(paper, name):
    experiment = find_paper(paper).find(name)
    size = experiment.sizes[SMALL]
    x, y = make_images(experiment, size.batch)
    for arm in experiment.arms_at(SMALL):
        torch.manual_seed(0)
        trainer = arm.begin(Start(size, min(arm.rates) * size.faster, x[:2]))
        before = [parameter.detach().clone() for parameter in find_network(trainer).parameters()]
        assert math.isfinite(trainer.step(x, y)), arm.name
        after = find_network(trainer).parameters()
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), arm.name
        scores = trainer.predict(x[:3])
        assert scores.shape == (3, 100 if "cifar100" in name else 10)
        assert torch.isfinite(scores).all()


def test_the_claim_of_proxprop_shows_on_the_digits():
    experiment = find_paper("proxprop").find("table-1")
    size = experiment.sizes[DIGITS]
    assert f"{size.steps} steps" in size.about
    data = size.data()
    assert [len(part.y) for part in vars(data).values()] == [1100, 297, 400]
    arms = {arm.name: arm for arm in experiment.arms_at(DIGITS)}
    assert len(arms) == 16

    def losses(name):
        torch.manual_seed(0)
        trainer = arms[name].begin(Start(size, arms[name].rates[0], data.train.x[:8]))
        batches = list(zip(data.train.x.split(100), data.train.y.split(100), strict=True))
        return [trainer.step(x, y) for _ in range(3) for x, y in batches]

    assert losses("cg3, τ = 1")[-1] < 1
    exploded = losses("BackProp, τ = 10")
    assert max(exploded, key=lambda loss: math.inf if math.isnan(loss) else loss) > 1000


def test_frozen_maps_stay_and_the_others_move():
    experiment = find_paper("associated-learning").find("mnist-mlp")
    size = experiment.sizes[SMALL]
    x, y = make_images(experiment, size.batch)
    for arm in experiment.arms[1:]:
        torch.manual_seed(0)
        learner = unwrap_trainer(arm.begin(Start(size, 1e-3, x[:2]))).learner
        blocks = [trainer.component.get_submodule("block") for trainer in learner.trainers]
        before = [p.detach().clone() for block in blocks for p in block.parameters()]
        learner.step(x, y)
        after = [p for block in blocks for p in block.parameters()]
        stayed = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert stayed == (arm.at == "with f frozen")


@pytest.mark.parametrize("paper", PAPERS)
def test_every_experiment_says_where_what_and_why(paper):
    found = find_paper(paper)
    assert found.name == paper
    for experiment in found.experiments:
        assert experiment.sizes.keys() - {DIGITS, MIDDLE} == {FULL, SMALL}
        assert experiment.sizes[SMALL].steps < experiment.sizes[FULL].steps / 20
        for size in {SMALL, MIDDLE} & experiment.sizes.keys():
            assert f"{experiment.sizes[size].steps:,} steps" in experiment.sizes[size].about
            assert experiment.claims_at(size), "a cut size has an order to compare"
        assert experiment.differences
        assert len({arm.name for arm in experiment.arms}) == len(experiment.arms)
        names = {arm.name for arm in experiment.arms}
        assert all({claim.better, claim.worse} <= names for claim in experiment.claims)


def test_table_1_of_proxprop():
    experiment = find_paper("proxprop").find("table-1")
    assert len(experiment.arms) == 36
    assert (len(experiment.arms_at(SMALL)), len(experiment.arms_at(MIDDLE))) == (16, 8)
    numbers = {arm.name: arm.number for arm in experiment.arms}
    assert numbers["BackProp, τ = 0.05"] == 0.091
    assert math.isnan(numbers["BackProp, τ = 50"])
    claims = {str(claim) for claim in experiment.claims}
    assert "cg3, τ = 1 beats BackProp, τ = 1" in claims
    assert "cg5, τ = 1 beats cg3, τ = 1" in claims
    assert not any("τ = 0.0005 beats cg" in claim and claim.startswith("cg") for claim in claims), "ties"


def test_the_last_layer_takes_explicit_steps():
    experiment = find_paper("proxprop").find("mlp")
    size = experiment.sizes[SMALL]
    x, y = make_images(experiment, 64)

    def take_step(rule):
        torch.manual_seed(0)
        trainer = proxprop.nesterov(rule, Start(size, 0.1, x[:2]))
        trainer.step(x, y)
        return [p.grad for p in trainer.model.parameters()]

    plain, exact = take_step(None), take_step(proxprop.ProxProp(0.05))
    assert torch.allclose(plain[-2], exact[-2], rtol=1e-4, atol=1e-7)
    assert torch.allclose(plain[-1], exact[-1], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(plain[0], exact[0], rtol=0.1)


# ---- Associated Learning's training ----------------------------------------------------------------


def test_adam_is_tensorflows():
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = tensorflow_adam([weight], 0.01)
    expected = weight.detach().clone()
    m = v = torch.zeros(2, dtype=torch.float64)
    for t in range(1, 6):
        gradient = torch.tensor([1e-8, 1e-3], dtype=torch.float64) * t
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = 0.01 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        expected = expected - rate * m / (v.sqrt() + 1e-8)
    assert torch.allclose(weight, expected, rtol=1e-12, atol=0)


def test_only_convolutions_decay():
    conv, dense = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)
    optimizer = tensorflow_adam([*conv.parameters(), *dense.parameters()], 0.1, decay=0.5)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {id(conv.weight): 0.5, id(conv.bias): 0, id(dense.weight): 0, id(dense.bias): 0}


def test_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(10)(optimizer)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 1e-3, 5e-4])


def test_images_are_shifted_mirrored_and_standardised():
    x = torch.rand(64, 3, 32, 32)
    moved = shifted(x)
    padded = nn.functional.pad(x, (4, 4, 4, 4))
    for before, after in zip(padded, moved, strict=True):
        windows = [before[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(w, after) or torch.equal(w.flip(2), after) for w in windows)
    assert not torch.equal(moved, x)
    plain = standardised(x)
    assert torch.allclose(plain.flatten(1).mean(1), torch.zeros(64), atol=1e-5)
    assert torch.allclose(plain.flatten(1).std(1, correction=0), torch.ones(64), atol=1e-4)
    assert torch.isfinite(standardised(torch.zeros(2, 3, 4, 4))).all()


# ---- intervals and verdicts ------------------------------------------------------------------------


def line(value, failure=None):
    return {"loss": [2.3, value], "test": value, "rate": 0.1, "failure": failure}


def test_intervals_have_their_stated_coverage():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 4, generator=generator).tolist()
    one_more = sum(low <= x <= high for *known, x in draws for low, high in [bound_mean(known, 1)])
    means = sum(low <= 0 <= high for *known, _ in draws for low, high in [bound_mean(known)])
    assert 0.94 < one_more / 4000 < 0.96
    assert 0.94 < means / 4000 < 0.96
    assert bound_mean([1.0], 1) is None
    assert student(1) > student(30) == student(1000)


@pytest.mark.parametrize(
    ("number", "size", "lines", "says"),
    [
        (0.5, FULL, [line(0.4), line(0.5), line(0.6)], "inside the interval"),
        (9.0, FULL, [line(0.4), line(0.5), line(0.6)], "outside the interval"),
        (0.5, SMALL, [line(0.4), line(0.5)], "not comparable at this size"),
        (0.5, FULL, [line(0.4)], "one run has no interval"),
        (None, FULL, [line(0.4), line(0.5)], "no number of the paper's is known"),
        (DIVERGED, SMALL, [line(0, "diverged at step 3: x")] * 2, "diverged, as in the paper"),
        (DIVERGED, FULL, [line(0.4), line(0, "diverged")], "the paper's diverged, 1 of ours did not"),
        (0.5, FULL, [line(0.4), line(0, "diverged")], "1 of ours failed, the paper's did not"),
    ],
)
def test_verdicts(number, size, lines, says):
    arm = Arm("m", None, (0.1,), number)
    experiment = Experiment("e", "", "", TRAINING_LOSS, (arm,), {})
    assert make_outcome(experiment, size, arm, dict(enumerate(lines)), []).verdict == says


LOW, HIGH, NEAR = (
    [line(v) for v in values] for values in ((0.10, 0.11, 0.12), (0.4, 0.5, 0.6), (0.1, 0.3, 0.05))
)
BAD = [line(0, "diverged at step 1: x")] * 3


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (LOW, HIGH, REPRODUCED),
        (HIGH, LOW, REVERSED),
        (LOW, NEAR, UNDECIDED),
        (LOW, BAD, REPRODUCED),
        (BAD, LOW, REVERSED),
        (BAD, BAD, UNDECIDED),
        ([*LOW[:2], BAD[0]], HIGH, UNDECIDED),
        (LOW[:1], HIGH[:1], UNDECIDED),
    ],
)
def test_claims_of_lower_losses(one, other, found):
    ours, theirs = dict(enumerate(one)), dict(enumerate(other))
    assert judge_claim(TRAINING_LOSS, Claim("a", "b"), ours, theirs).outcome == found


@pytest.mark.parametrize(
    ("errors", "found"),
    [((0.1, 0.2, 0.15), REPRODUCED), ((0.2, 0.3, 0.25), REVERSED), ((0.1, 0.9, 0.2), UNDECIDED)],
)
def test_claims_of_about_the_same(errors, found):
    base = {seed: line(value) for seed, value in enumerate((0.1, 0.2, 0.15))}
    other = {seed: line(value) for seed, value in enumerate(errors)}
    assert judge_claim(TEST_ACCURACY, Claim("a", "b", within=1.0), base, other).outcome == found


# ---- data and names --------------------------------------------------------------------------------


def test_missing_data_name_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYWISE_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in PAPERS:
        for experiment in find_paper(name).experiments:
            file = r"mnist\.npz" if "mnist" in experiment.name else r"cifar-100?-binary\.tar\.gz"
            with pytest.raises(PlywiseError, match=file):
                experiment.sizes[SMALL].data()


def test_parts_share_no_image():
    if find_file("mnist.npz", "mnist/train-images-idx3-ubyte.gz") is None:
        pytest.skip("no mnist.npz; PLYWISE_DATA can name its folder")
    for name in ("mnist-mlp", "mnist-conv"):
        size = find_paper("consequentialism").find(name).sizes[SMALL]
        data = size.data()
        assert [len(part.y) for part in vars(data).values()] == [size.images, size.validation, size.test]
        rows = [{row.tobytes() for row in part.x.flatten(1).numpy()} for part in vars(data).values()]
        assert not rows[0] & rows[1]
        assert not rows[0] & rows[2]
        assert 0 <= data.train.x.min() < data.train.x.max() <= 1


def test_names():
    assert find_paper("ProxProp").name == "proxprop"
    with pytest.raises(PlywiseError, match=r"No paper is called 'proxpop'\. Did you mean proxprop"):
        find_paper("proxpop")
    with pytest.raises(PlywiseError, match=r"no experiment called 'table1'\. Did you mean table-1"):
        find_paper("proxprop").find("table1")
