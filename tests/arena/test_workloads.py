"""Every shipped workload: parts without common samples, training, splits, and reproducibility by seed."""

import json

import pytest
import torch

import plywise as pw
from plywise.arena.method import TrialContext, end_to_end
from plywise.arena.run.trial import run_trial
from plywise.arena.scoring.targets import ENOUGH
from plywise.arena.task import mean, predictor
from plywise.arena.workloads import (
    QUICK,
    RELATED,
    STANDARD,
    WORKLOADS,
    find_workload,
    synthetic,
    tables,
    targets,
)
from plywise.arena.workloads.networks import CharTransformer
from plywise.data.batches import endless_batches
from plywise.data.digits import Split
from plywise.data.store import find_file
from plywise.errors import PlywiseError

FILES = {
    "fashion-mlp": ["fashion_mnist.npz", "fashion_mnist/train-images-idx3-ubyte.gz"],
    "fashion-2c2d": ["fashion_mnist.npz", "fashion_mnist/train-images-idx3-ubyte.gz"],
    "mnist-autoencoder": ["mnist.npz", "mnist/train-images-idx3-ubyte.gz"],
    "cifar-3c3d": ["cifar10_train.npz", "cifar-10-binary.tar.gz"],
    "cifar-resnet": ["cifar10_train.npz", "cifar-10-binary.tar.gz"],
    "char-transformer": ["tinyshakespeare.txt", "tinyshakespeare.txt.gz"],
    "concrete": ["uci_concrete.csv.gz"],
    "energy": ["uci_energy.csv.gz"],
    "california": ["california_housing.csv.gz"],
    "boiling-points": ["compounds.csv.gz"],
}
SHAPES = {
    "quadratic": ((40_000, 100), (100, 100), (100, 100)),
    "digits-mlp": ((1100, 64), (297, 64), (400, 64)),
    "digits-conv": ((1100, 1, 8, 8), (297, 1, 8, 8), (400, 1, 8, 8)),
    "digits-autoencoder": ((1100, 64), (297, 64), (400, 64)),
    "fashion-mlp": ((10_000, 784), (2000, 784), (10_000, 784)),
    "fashion-2c2d": ((10_000, 1, 28, 28), (2000, 1, 28, 28), (10_000, 1, 28, 28)),
    "mnist-autoencoder": ((10_000, 784), (2000, 784), (10_000, 784)),
    "cifar-3c3d": ((8000, 3, 32, 32), (2000, 3, 32, 32), (10_000, 3, 32, 32)),
    "cifar-resnet": ((8000, 3, 32, 32), (2000, 3, 32, 32), (10_000, 3, 32, 32)),
    "char-transformer": ((16_359, 64), (400, 64), (400, 64)),
    "concrete": ((826, 8), (100, 8), (104, 8)),
    "energy": ((616, 8), (76, 8), (76, 8)),
    "california": ((16_512, 13), (2064, 13), (2064, 13)),
    "boiling-points": ((1210, 20), (143, 20), (143, 20)),
    "digits-rare": ((1013, 64), (297, 64), (400, 64)),
    "digits-generator": ((1100, 16), (297, 16), (400, 16)),
    "digits-denoiser": ((1100, 1, 8, 8), (297, 1, 8, 8), (400, 1, 8, 8)),
    "vsml-episodes": ((410, 8, 4), (51, 8, 4), (51, 8, 4)),
}


@pytest.fixture(scope="module", params=WORKLOADS)
def named(request):
    files = FILES.get(request.param, [])
    if files and find_file(*files) is None:
        pytest.skip(f"no {files[0]}; PLYWISE_DATA can name its folder")
    workload = find_workload(request.param)
    return workload, workload.make_data()


def measure_training(workload, data, steps, rate=0.01):
    """Return the loss on some training samples before and after some steps."""
    torch.manual_seed(3)
    model = workload.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    trainer = end_to_end(TrialContext(model, workload.task, {}, steps, data.train.x[:8]), optimizer)
    seen = Split(data.train.x[:200], data.train.y[:200])
    before = mean(workload.task.loss, trainer.predict, seen)
    batches = endless_batches(data.train, workload.batch_size, seed=3)
    for _ in range(steps):
        trainer.step(*next(batches))
    return before, mean(workload.task.loss, trainer.predict, seen)


def test_parts(named):
    workload, data = named
    parts = [data.train, data.validation, data.test]
    assert tuple(tuple(part.x.shape) for part in parts) == SHAPES[workload.name]
    for part in parts:
        assert len(part.x) == len(part.y)
        assert part.x.dtype == (torch.long if workload.name == "char-transformer" else torch.float32)
        if part.x.is_floating_point():
            assert torch.isfinite(part.x).all()
        if workload.classes and not workload.labels_tokens:
            assert set(part.y.unique().tolist()) == set(range(workload.classes))
    if workload.labels_tokens:
        assert set(data.train.y.unique().tolist()) == set(range(workload.classes)), "some characters are rare"
    assert len(data.train.y) >= workload.batch_size


def test_parts_share_no_sample(named):
    workload, data = named
    if workload.name.startswith(("fashion", "mnist", "char")):
        # a handful of these sets' images and lines are there twice; what matters is that none is used twice
        rows = [part.x.flatten(1) for part in (data.train, data.validation)]
        whole = torch.cat(rows)
        twice = len(whole) - len(torch.unique(whole, dim=0))
        assert twice <= 0.002 * len(whole)
        return
    rows = [{row.tobytes() for row in part.x.flatten(1).numpy()} for part in vars(data).values()]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_a_few_steps_lower_the_loss(named):
    workload, data = named
    before, after = measure_training(workload, data, 10)
    assert after < before


def test_an_untrained_network_knows_nothing(named):
    workload, data = named
    few = Split(data.validation.x[:500], data.validation.y[:500])
    metric = workload.task.measure(predictor(workload.make_model()), few, 250)
    assert metric > 0.6 * (workload.task.chance or 0) > 0 or workload.task.chance is None


def test_a_step_of_plain_gradient_descent(named):
    workload, data = named
    torch.manual_seed(0)
    model = workload.make_model()
    x, y = data.train.x[:64], data.train.y[:64]
    loss = workload.task.loss(model(x), y)
    loss.backward()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            assert parameter.grad is not None, "every parameter takes part"
            parameter -= 1e-3 * parameter.grad
        assert workload.task.loss(model(x), y) < loss


def test_same_seed_same_bits(named):
    workload, data = named
    assert measure_training(workload, data, 2) == measure_training(workload, data, 2)
    again = workload.make_data()
    for part, other in zip(vars(data).values(), vars(again).values(), strict=True):
        assert torch.equal(part.x, other.x)
        assert torch.equal(part.y, other.y)


def test_local_learners_can_cut_it(named):
    workload, data = named
    if not workload.blocks:
        assert workload.classes == 0
        return
    x, y = data.train.x[: workload.batch_size], data.train.y[: workload.batch_size]
    model = workload.make_model()
    model = model.untied() if workload.labels_tokens else model  # no chain as it is: one weight in two layers
    blocks = pw.split(model, workload.blocks, x[:32])
    assert len(blocks) == workload.blocks
    assert blocks.shapes[-1] == (*y.shape[1:], workload.classes)
    learner = pw.LocalLoss(
        blocks, num_classes=workload.classes, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01)
    )
    learner.step(x, y)
    assert learner.predict(x[:4]).shape == (4, *y.shape[1:], workload.classes)


def test_rules_find_layers(named):
    workload, data = named
    if workload.name in ("digits-denoiser", "vsml-episodes"):  # bare filters, one matrix for all connections
        return
    model = workload.make_model()
    rule = pw.ProxProp(tau=0.1).attach(model)
    x, y = data.train.x[:16], data.train.y[:16]
    workload.task.loss(model(x), y).backward()
    rule.detach()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert layers
    assert all(torch.isfinite(layer.weight.grad).all() for layer in layers)


@pytest.mark.parametrize("name", [*QUICK, *RELATED])
def test_what_needs_no_file_runs_as_trials(name):
    workload = find_workload(name)

    def begin():
        model = workload.make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return end_to_end(TrialContext(model, workload.task, {}, 3, torch.ones(1)), optimizer)

    data = workload.make_data()
    record = run_trial(begin, data, workload.task, seed=0, steps=3, batch_size=workload.batch_size, test=True)
    assert record.failure is None
    assert record.test is not None


# ---- names -----------------------------------------------------------------------------------------


def test_names_and_sets():
    assert set(QUICK) < set(STANDARD)
    assert sorted((*STANDARD, *RELATED)) == sorted(WORKLOADS) == sorted(SHAPES)
    assert not {*QUICK, *RELATED} & set(FILES), "these need no file"
    for name in WORKLOADS:
        workload = find_workload(name.upper())
        assert workload.name == name
        assert len(workload.about) > 40
    with pytest.raises(
        PlywiseError, match=r"No workload is called 'cifar-resnt'\. Did you mean cifar-resnet"
    ):
        find_workload("cifar-resnt")


def test_targets_say_who_made_them(monkeypatch, tmp_path):
    for name, entry in targets().items():
        assert name in WORKLOADS
        assert set(entry) == {"target", "loose", "trials", "commit", "made_by"}
        assert entry["trials"] >= ENOUGH, "a target of fewer is soft"
        assert find_workload(name).target == entry["target"] < entry["loose"]
    (tmp_path / "targets.json").write_text(json.dumps({"digits-mlp": {"target": 0.04}}))
    monkeypatch.setattr("plywise.arena.workloads.files", lambda _: tmp_path)
    assert find_workload("digits-mlp").target == 0.04
    assert find_workload("digits-conv").target is None


def test_a_missing_file_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYWISE_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in FILES:
        with pytest.raises(PlywiseError, match=r"is missing: .* is neither in .*none nor in .*plywise\. "):
            find_workload(name).make_data()
    for name in QUICK:
        find_workload(name).make_data()


# ---- what single workloads promise -----------------------------------------------------------------


def test_the_quadratic_is_exact():
    workload = find_workload("quadratic")
    data = workload.make_data()
    assert torch.linalg.eigvalsh((data.validation.x.T @ data.validation.x / 100).double()).sort().values == (
        pytest.approx(synthetic.spectrum().sort().values, rel=1e-4, abs=1e-5)
    )
    answer = torch.linalg.lstsq(data.validation.x, data.validation.y).solution
    model = workload.make_model()
    with torch.no_grad():
        for held in (data.validation, data.test):
            gap = model.weight.T - answer
            expected = (gap.T @ (data.test.x.T @ data.test.x / 100) @ gap).item()
            assert mean(workload.task.metric, predictor(model), held) == pytest.approx(expected, rel=1e-3)
        model.weight.copy_(answer.T)
        assert mean(workload.task.metric, predictor(model), data.test) < 1e-3
        noise = mean(workload.task.loss, predictor(model), data.train)
    assert noise == pytest.approx(synthetic.NOISE**2, rel=0.03)
    assert workload.steps * workload.batch_size <= len(data.train.y), "no sample is seen twice"


def test_tables_are_scaled_by_the_training_part_alone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64) * 5 + 7
    x[::9, 1] = torch.nan
    x[:, 2] = 4.0
    y = x[:, 0] * 2

    data = tables.prepare_table(lambda: (x.numpy(), y.numpy()))
    assert len(data.train.x) == 160
    assert data.train.x.mean(0) == pytest.approx([0, 0, 0], abs=1e-5)
    assert data.train.x.std(0) == pytest.approx([1, 1, 0], abs=1e-5)
    assert data.train.y.std().item() == pytest.approx(1, abs=1e-5)
    for part in vars(data).values():
        assert torch.isfinite(part.x).all()
    median = data.train.x[:, 1].mode().values
    filled = sum((part.x[:, 1] == median).sum().item() for part in vars(data).values())
    assert filled == x[:, 1].isnan().sum().item() + 1, (
        "all missing values, and the one that they are taken from"
    )
    below, above = ((data.train.x[:, 1] < median).sum(), (data.train.x[:, 1] > median).sum())
    assert abs(below - above) <= 1


def test_rows_with_equal_inputs_stay_together():
    x = torch.arange(60.0, dtype=torch.float64).remainder(20).unsqueeze(1)
    data = tables.prepare_table(lambda: (x.numpy(), torch.arange(60.0, dtype=torch.float64).numpy()))
    values = [set(part.x.flatten().tolist()) for part in vars(data).values()]
    assert sum(map(len, values)) == 20
    assert [len(part.y) for part in vars(data).values()] == [48, 6, 6]


def test_the_transformer_is_causal_and_shares_one_table():
    model = CharTransformer(11, 8, width=16, depth=2, heads=4)
    tokens = torch.arange(16).view(2, 8) % 11
    changed = tokens.clone()
    changed[:, 5:] = 0
    with torch.no_grad():
        one, two = model(tokens), model(changed)
    assert torch.allclose(one[:, :5], two[:, :5], atol=1e-6)
    assert not torch.allclose(one[:, 5:], two[:, 5:], atol=1e-6)
    assert model.head.weight is model.characters.weight
