"""Methods of the related papers: the effect of each on a model, and where it refuses to run."""

import re
from dataclasses import replace

import pytest
import torch
from method_settings import network, setting
from torch import nn

import plywise as pw
from plywise.arena.method import Method
from plywise.arena.methods import LEARNER_OF, PEERS, RELATED, RELATIVES, RULE_OF, find_method
from plywise.arena.methods.listing import ELSEWHERE, METHOD_OF, WORKLOAD_OF, find_place
from plywise.arena.methods.related_losses import INNER
from plywise.arena.methods.related_modules import REMEMBERED, SampleMemory, deepen
from plywise.arena.run.bench import Bench
from plywise.arena.run.config import BenchConfig, WorkloadSpec, resolve_bench
from plywise.arena.run.trial import run_trial
from plywise.arena.task import RANKING, REGRESSION, wrong_order
from plywise.arena.workloads import find_workload
from plywise.data.batches import endless_batches
from plywise.nn import Threshold
from plywise.registry.find import ROOMS


def make_batch(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 64, generator=generator), torch.randint(10, (count,), generator=generator)


def make_trainer(name, model=None, numbers=None, **more):
    method = find_method(name)
    torch.manual_seed(0)
    return method.make(setting(method, model, numbers, **more))


def run(name, workload="digits-rare", seed=0, **numbers):
    one, method = find_workload(workload), find_method(name)
    data = one.make_data()
    values = {key: numbers.get(key, space.default) for key, space in method.space.items()}
    return run_trial(
        lambda: method.make(
            replace(setting(method, one.make_model(), values, data.train.x[:8], one.task), steps=one.steps)
        ),
        data,
        one.task,
        seed=seed,
        steps=one.steps,
        batch_size=one.batch_size,
        measure_every=one.steps,
    )


# ---- who runs where --------------------------------------------------------------------------------


def test_every_related_method_is_listed_once_under_one_name():
    assert sorted(RELATIVES) == sorted(name for names in RELATED.values() for name in names)
    assert len(set(RELATIVES)) == len(RELATIVES)
    assert all(isinstance(find_method(name), Method) for name in RELATIVES)


@pytest.mark.parametrize(
    ("name", "workload", "reason"),
    [
        ("auc-margin", "digits-mlp", "the order of pairs"),
        ("coda", "energy", "the order of pairs"),
        ("input-gradient-penalty", "char-transformer", "not one of each sample"),
        ("input-gradient-penalty", "digits-generator", "not one of each sample"),
        ("adaptive-activations", "quadratic", "no activation module|single"),
        ("slope-recovery", "quadratic", "no activation module|single"),
        ("threshold", "quadratic", "no activation module"),
        ("fuse-layers", "cifar-resnet", "only a chain"),
        ("decision-stage", "energy", "needs classes"),
        ("local-loss", "energy", "needs classes"),
        ("scpl", "char-transformer", "each token has one"),
        ("decision-stage", "char-transformer", "each token has a class"),
    ],
)
def test_a_method_that_cannot_run_says_why_and_keeps_random_states(name, workload, reason):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert re.search(reason, find_method(name).refuses(find_workload(workload)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", RELATIVES)
def test_methods_that_do_not_refuse_take_a_step(name):
    """On each workload of the related papers a method either says why not, or takes a step."""
    method, refused = find_method(name), 0
    for workload in map(find_workload, ("digits-rare", "digits-generator", "vsml-episodes", "digits-mlp")):
        if method.refuses(workload):
            refused += 1
            continue
        data = workload.make_data()
        x, y = data.train.x[:64], data.train.y[:64]
        more = {"example": x[:8], "task": workload.task, "classes": workload.classes}
        trainer = make_trainer(name, workload.make_model(), **more)
        assert torch.isfinite(torch.tensor(trainer.step(x, y)))
        assert len(trainer.predict(x)) == 64
    assert refused < 4


# ---- the AUC ---------------------------------------------------------------------------------------


def test_the_ranking_metric_covers_all_pairs_for_any_batches():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (97, 1), generator=generator).float()  # many ties
    y = (torch.rand(97, 1, generator=generator) < 0.2).float()
    above, below = scores[y == 1], scores[y == 0]
    gaps = above[:, None] - below
    slow = ((gaps < 0).double() + 0.5 * (gaps == 0).double()).mean()
    assert wrong_order(scores, y).item() == pytest.approx(slow.item())
    assert wrong_order(scores.flatten(), y.flatten() == 1).item() == pytest.approx(slow.item())
    split = pw.data.digits.Split(scores, y)
    for rows in (7, 97):
        assert RANKING.measure(lambda x: x, split, rows) == pytest.approx(slow.item())
    with pytest.raises(pw.PlywiseError, match="0 of 97 samples are positive"):
        wrong_order(scores, torch.zeros(97, 1))


@pytest.mark.parametrize("name", ["auc-margin", "coda"])
def test_losses_for_the_auc_order_a_rare_class(name):
    record = run(name)
    assert record.failure is None
    assert record.validation[-1] < 0.1 < 0.3 < record.validation[0]
    assert record.validation == run(name).validation
    assert record.validation != run(name, seed=1).validation


def test_the_share_of_positives_is_learned_from_labels_and_a_batch_may_lack_a_class():
    trainer = make_trainer("auc-margin", nn.Linear(64, 1), task=RANKING)
    x = make_batch(100)[0]
    for count in (0, 10, 100):
        y = torch.zeros(100, 1)
        y[:count] = 1
        assert trainer.step(x, y) > -10
    assert trainer.loss.positive_share == pytest.approx(111 / 302)


def test_a_users_own_auc_is_read_from_the_whole_set(tmp_path, monkeypatch):
    (tmp_path / "mine_ranked.py").write_text(
        "import torch\n"
        "def model():\n"
        "    return torch.nn.Linear(5, 1)\n"
        "def data():\n"
        "    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))\n"
        "    return x, (x[:, :1] > 1.2).float()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    metric, loss = "plywise.arena.task:wrong_order", "torch.nn.functional:binary_cross_entropy_with_logits"
    workload = WorkloadSpec("mine", "mine_ranked:model", "mine_ranked:data", loss, metric).make()
    data = workload.make_data()
    measured = workload.task.measure(lambda x: x[:, :1], data.validation, 3)
    assert measured == 0.0, "batches of three often lack a class, the whole set does not"
    assert find_method("auc-margin").refuses(workload) == ""


# ---- terms in the loss -----------------------------------------------------------------------------


def test_without_strength_a_penalty_is_plain_training():
    x, y = make_batch()
    numbers = {"lr": 0.1, "weight_decay": 0.0}
    plain = make_trainer("sgd", numbers=numbers)
    flat = make_trainer("input-gradient-penalty", numbers={**numbers, "strength": 1e-12})
    steep = make_trainer("input-gradient-penalty", numbers={**numbers, "strength": 1.0})
    for _ in range(3):
        assert flat.step(x, y) == pytest.approx(plain.step(x, y), rel=1e-5)
        steep.step(x, y)
    torch.testing.assert_close(flat.predict(x), plain.predict(x))

    def measure_slope(trainer):
        inputs = x.clone().requires_grad_()
        losses = nn.functional.cross_entropy(trainer.model(inputs), y, reduction="sum")
        (gradient,) = torch.autograd.grad(losses, inputs)
        return gradient.abs().sum()

    assert measure_slope(steep) < 0.9 * measure_slope(flat)


def test_near_itself_moves_less_the_shorter_its_reach():
    x, y = make_batch()
    moved = {}
    for reach in (1e-3, 1e6):
        trainer = make_trainer(
            "wasserstein-proximal", numbers={"lr": 0.01, "weight_decay": 0.0, "reach": reach}
        )
        before = trainer.predict(x).detach()
        trainer.step(x, y)
        moved[reach] = (trainer.predict(x) - before).square().sum()
    assert moved[1e-3] < 0.5 * moved[1e6]
    free = make_trainer("adamw", numbers={"lr": 0.01, "weight_decay": 0.0})
    free.scheduler = None
    near = make_trainer("wasserstein-proximal", numbers={"lr": 0.01, "weight_decay": 0.0, "reach": 1e9})
    near.scheduler = None
    near.step(x, y)
    for _ in range(INNER):
        free.step(x, y)
    torch.testing.assert_close(near.predict(x), free.predict(x), rtol=1e-4, atol=1e-6)


def test_slope_recovery_pushes_slopes_up():
    x, y = make_batch()
    slopes = {}
    for recovery in (1e-6, 10.0):
        numbers = {"lr": 0.01, "weight_decay": 0.0, "recovery": recovery}
        model = network()
        trainer = make_trainer("slope-recovery", model, numbers)
        for _ in range(3):
            trainer.step(x, y)
        slopes[recovery] = dict(model.named_parameters())["1.slope"].item()
    assert slopes[10.0] > slopes[1e-6] + 0.01


# ---- weights and activations of two values -----------------------------------------------------------


def test_quantized_weights_are_what_predicts_and_training_goes_on_from_free_ones():
    model = network()
    trainer = make_trainer("askew-sgd", model, task=REGRESSION)
    x = make_batch()[0]
    with torch.no_grad():
        free = model(x)
        level = (2 / 64) ** 0.5
        expected = model[2](
            torch.relu(nn.functional.linear(x, level * measure_sign(model[0].weight), model[0].bias))
        )
    torch.testing.assert_close(trainer.predict(x), expected)
    assert torch.equal(model(x), free)


def measure_sign(weight):
    return torch.where(weight < 0, -1.0, 1.0)


def test_thresholds_stand_in_every_place_even_of_a_shared_activation():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(64, 8), shared, nn.Linear(8, 8), shared, nn.Linear(8, 10))
    make_trainer("threshold", model)
    assert [type(module) for module in model][1::2] == [Threshold, Threshold]


# ---- before and after training -----------------------------------------------------------------------


def test_fused_network_is_of_the_size_asked_for_and_answers_as_before():
    model, steps = network(), 20
    trainer = make_trainer("fuse-layers", model)
    trainer = find_method("fuse-layers").make(
        replace(setting(find_method("fuse-layers"), model), steps=steps)
    )
    x, y = make_batch(512)
    for _ in range(steps // 2):
        trainer.step(x, y)
    deep = trainer._trainer.model
    assert [type(module).__name__ for module in deep] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    before = trainer.predict(x)
    trainer._fuse()
    fused = trainer._trainer.model
    assert [p.shape for p in fused.parameters()] == [p.shape for p in model.parameters()]
    off = (trainer.predict(x) - before).square().mean() / before.var()
    assert off < 0.3, "the nearest single layer is not far"
    assert deepen(model)[1] == 0


def test_memory_keeps_the_last_thousand_and_no_more_batches_than_needed():
    memory = SampleMemory()
    for number in range(40):
        memory.add(torch.full((64, 1), float(number)), torch.zeros(64))
    kept = [int(x[0]) for x, _ in memory.batches]
    assert kept == list(range(40 - -(-REMEMBERED // 64), 40))


def test_the_decision_stage_predicts_from_half_way_and_stops_training():
    pytest.importorskip("sklearn")
    model, method = network(), find_method("decision-stage")
    torch.manual_seed(0)
    trainer = method.make(replace(setting(method, model), steps=8))
    data = find_workload("digits-mlp").make_data()
    batches = endless_batches(data.train, 64, 0)
    for _ in range(4):
        trainer.step(*next(batches))
    x = data.validation.x
    torch.testing.assert_close(trainer.predict(x), model.eval()(x))
    kept = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):
        trainer.step(*next(batches))
    decided = trainer.predict(x)
    assert decided.sum(1).eq(1).all()
    assert decided.unique().tolist() == [0.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


def test_a_bench_reports_refused_methods_and_runs_the_others(tmp_path):
    config = BenchConfig((WorkloadSpec("digits-rare"),), ("sgd", "decision-stage"), trials=0, seeds=1)
    with resolve_bench(config) as resolved:
        bench = Bench(resolved, tmp_path)
    reason = "a decision stage needs classes, and the targets are none"
    assert bench.about["refused"] == [
        {"workload": "digits-rare", "method": "decision-stage", "reason": reason}
    ]
    assert bench.total == 1


# ---- where each card leads ---------------------------------------------------------------------------


def test_every_registered_name_has_a_place():
    names = [name for room in ROOMS.values() for name in room]
    assert all(find_place(name) for name in names)
    assert {*METHOD_OF, *WORKLOAD_OF, *ELSEWHERE} == set(names)
    made = {*METHOD_OF.values()} - {*PEERS}
    assert made == {*RULE_OF, *LEARNER_OF, *RELATIVES}
    for workload in WORKLOAD_OF.values():
        find_workload(workload)
    with pytest.raises(pw.PlywiseError, match="does not say where"):
        find_place("Nothing")
