"""The arena's methods: each trains, its space is complete, controls are exact, and names are right."""

from dataclasses import replace

import pytest
import torch
from method_settings import STEPS, network, setting
from torch import nn

import plywise as pw
from plywise.arena.method import Method
from plywise.arena.methods import (
    LEARNER_OF,
    METHODS,
    NULL_CONTROL,
    PEERS,
    RULE_OF,
    find_method,
)
from plywise.arena.methods.learners import RELAXATION
from plywise.arena.methods.rules import TUNED
from plywise.arena.run.trial import run_trial
from plywise.arena.space import MOST_TUNED, Range, draw_points, get_defaults
from plywise.arena.task import CLASSIFICATION
from plywise.data.batches import endless_batches
from plywise.data.digits import load_digits
from plywise.data.parts import Data
from plywise.errors import PlywiseError
from plywise.registry.find import LEARNERS, RULES

RANKING_ONLY = ("auc-margin", "coda")
"""Methods that need another task; see test_related_methods.py."""
CLASSIFYING = [name for name in METHODS if name not in RANKING_ONLY]

FEWER = {"yam-adam": 0, "cascaded-forward": 1}
"""Methods that are defined by having nothing, or nothing else, to tune."""

ERROR = 0.35
"""What the defaults must reach on the validation digits in 80 steps; chance is 0.9, most reach 0.15."""
SLOWER = {
    "associated-learning": 0.5,  # codes form first
    "local-forward-gradient": 0.5,  # gradients are noisy
    "forward-forward": 0.5,  # a wrong label at a time
    "momentum-auxiliary": 0.55,  # three layers between a block and its loss
    "lrsgd-r": 0.45,  # rates fall in every inner loop
    "lrsgd-c": 0.5,
    "askew-sgd": 0.5,  # weights have two values
    "slope-recovery": 0.5,
}
"""Methods that need more steps. Each has room for what another processor's rounding makes of 80 steps."""


@pytest.fixture(scope="module")
def data():
    return Data(*load_digits())


def trial(name, data, numbers=None, steps=STEPS, seed=0):
    method = find_method(name)
    return run_trial(
        lambda: method.make(setting(method, numbers=numbers, example=data.train.x[:8])),
        data,
        CLASSIFICATION,
        seed=seed,
        steps=steps,
        measure_every=steps,
    )


# ---- every method ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFYING)
def test_defaults_train(name, data):
    record = trial(name, data)
    assert record.failure is None
    assert record.validation[0] > 0.7
    assert record.validation[-1] < SLOWER.get(name, ERROR)


@pytest.mark.parametrize("name", CLASSIFYING)
def test_same_seed_same_bits(name, data):
    one, two, other = (trial(name, data, steps=6, seed=seed) for seed in (1, 1, 2))
    assert (one.loss, one.validation) == (two.loss, two.validation)
    assert (one.loss, one.validation) != (other.loss, other.validation)


@pytest.mark.parametrize("name", [*CLASSIFYING, *(f"{rule}+adamw" for rule in RULE_OF)])
def test_every_point_of_the_space_takes_a_step(name):
    method = find_method(name)
    corners = [{key: getattr(one, end) for key, one in method.space.items()} for end in ("low", "high")]
    x, y = torch.rand(16, 64), torch.arange(16) % 10
    for numbers in [*draw_points(method.space, 4), *corners]:
        trainer = method.make(setting(method, numbers=numbers))
        assert trainer.step(x, y) > 0
        assert trainer.predict(x).shape == (16, 10)


@pytest.mark.parametrize("name", [*METHODS, *(f"{rule}+{peer}" for rule in RULE_OF for peer in PEERS)])
def test_every_method_has_equally_many_numbers_tuned(name):
    """Equal numbers of trials are equal chances only in spaces of one dimension."""
    assert len(find_method(name).space) == FEWER.get(name, MOST_TUNED)


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_tuned_with_care(name):
    """Rate and decay, their defaults a factor of ten and more from both ends of wide ranges."""
    space = find_method(name).space
    assert list(space) == ["lr", "weight_decay"]
    for one in space.values():
        assert one.log
        assert one.high / one.low >= 1000
        assert 10 * one.low <= one.default <= one.high / 10


def test_a_method_of_more_numbers_is_refused():
    space = {name: Range(0.1, 10.0, 1.0) for name in ("lr", "damping", "weight_decay")}
    with pytest.raises(PlywiseError, match=r"tunes lr, damping, weight_decay: 2 numbers at most"):
        Method("mine", "mine", space, lambda setting: None)


@pytest.mark.parametrize("name", CLASSIFYING)
def test_each_number_of_the_space_makes_a_difference(name, data):
    """A number without effect would waste a method's trials."""
    method = find_method(name)
    base = {**get_defaults(method.space), **({"cap": 0.01} if "cap" in method.space else {})}
    before = after_steps(name, base, data)
    for key, one in method.space.items():
        changed = {**base, key: one.high}
        assert not torch.equal(before, after_steps(name, changed, data)), key


def after_steps(name, numbers, data, steps=4):
    method = find_method(name)
    torch.manual_seed(0)
    trainer = method.make(setting(method, numbers=numbers, example=data.train.x[:8]))
    for x, y in (batch for _, batch in zip(range(steps), endless_batches(data.train, 64, 0), strict=False)):
        trainer.step(x, y)
    return trainer.predict(data.validation.x)


def test_names_cover_all_rules_and_learners():
    assert set(RULE_OF.values()) == set(RULES) == TUNED.keys()
    assert set(LEARNER_OF.values()) == set(LEARNERS)
    assert len(set(METHODS)) == len(METHODS)
    for name in METHODS:
        assert find_method(name).name == name
        assert find_method(name).about


def test_which_methods_are_baselines_and_which_need_blocks():
    assert [name for name in METHODS if find_method(name).baseline] == list(PEERS)
    assert {name: find_method(name).null for name in METHODS if find_method(name).null} == {
        NULL_CONTROL: "sgd"
    }
    assert [name for name in METHODS if find_method(name).local] == list(LEARNER_OF)


# ---- controls ----------------------------------------------------------------------------------------


def test_null_control_and_backprop_are_sgd_bit_for_bit(data):
    numbers = {"lr": 0.2, "weight_decay": 1e-3}
    records = [trial(name, data, numbers, steps=30) for name in ("sgd", NULL_CONTROL, "backprop")]
    assert records[0].loss == records[1].loss == records[2].loss
    assert records[0].loss[-1] < records[0].loss[0]
    assert trial("sgd", data, {"lr": 0.2, "weight_decay": 0.01}, steps=30).loss != records[0].loss


def test_relaxed_activations_are_backpropagation(data):
    """At its fixed point, Adam on its gradients is Adam: interlocking over all blocks is that too."""
    relaxed, whole = (trial(name, data, {"lr": 1e-3}) for name in ("activation-relaxation", "interlocking"))
    assert relaxed.loss[-1] == pytest.approx(whole.loss[-1], rel=1e-3)


def test_the_passes_of_a_learner_are_counted_on_the_given_model():
    def count(name, blocks):
        method = find_method(name)
        return method.count(replace(setting(method, example=torch.rand(32, 64)), blocks=blocks))

    assert count("local-loss", 1) == 1.0, "one block is backpropagation"
    # products of 64 × 64 and 64 × 10: the first layer takes two a step, the second three; with a local loss,
    # the second layer two, since its input's gradient goes nowhere, and a head of its size three
    assert count("local-loss", 2) == round((2 * 64 + 3 * 10 + 2 * 10) / (2 * 64 + 3 * 10), 2)
    assert count("interlocking", 2) > count("local-loss", 2)
    assert count("associated-learning", 2) > 1.5, "two networks beside the model's"
    assert 0.3 < count("cascaded-forward", 2) < 0.7, "no backward, and the Grams of two heads"
    iterations = RELAXATION["iterations"]
    assert count("activation-relaxation", 2) > 10 * iterations / (2 * 64 + 3 * 10), "one product in each"
    assert find_method("sgd").count is None


# ---- composition -------------------------------------------------------------------------------------


def test_composition_has_that_optimizer_and_that_rule():
    method = find_method("proxprop+adamw")
    assert list(method.space) == ["lr", "tau"]
    assert method.space["lr"] == find_method("adamw").space["lr"]
    model, x, y = network(), torch.rand(32, 64), torch.arange(32) % 10
    numbers = {"lr": 1e-3, "tau": 3.0}
    trainer = method.make(setting(method, model, numbers))
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {1e-2}, "AdamW's default"
    twin = network()
    twin.load_state_dict(model.state_dict())
    pw.ProxProp(tau=3.0).attach(twin)
    nn.functional.cross_entropy(twin(x), y).backward()
    trainer.step(x, y)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_rule_on_sgd_is_the_rule_alone_and_has_no_decay_where_rates_are_large():
    assert find_method("foof+sgd").name == "foof"
    assert list(find_method("foof").space) == ["lr", "damping"]
    (group,) = find_method("foof").make(setting(find_method("foof"))).optimizer.param_groups
    assert group["weight_decay"] == find_method("sgd").space["weight_decay"].default
    method = find_method("proxprop")
    assert list(method.space) == ["lr", "tau"]
    (group,) = method.make(setting(method)).optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 0.0)


@pytest.mark.parametrize("optimizer", ["muon", "soap", "schedule-free", "shampoo", "torch.optim:RAdam"])
def test_rules_compose_with_any_optimizer(optimizer):
    method = find_method(f"foof+{optimizer}")
    assert method.name == f"foof+{optimizer}"
    x, y = torch.rand(64, 64), torch.arange(64) % 10
    trainer = method.make(setting(method))
    losses = [trainer.step(x, y) for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", [name for name in LEARNER_OF if name != "cascaded-forward"])
def test_rules_act_inside_learners(name, data):
    method = find_method(f"{name}+foof")
    assert list(method.space)[-1] == "damping"
    low, high = ({**get_defaults(method.space), "damping": damping} for damping in (0.1, 7.0))
    trainer = method.make(setting(method, numbers=high))
    assert [one.rule.damping for one in trainer.learner.trainers] == [7.0, 7.0]
    scores = after_steps(method.name, high, data)
    assert scores.isfinite().all()
    assert not torch.equal(scores, after_steps(method.name, low, data))


def test_optimizer_and_method_by_address(tmp_path, monkeypatch):
    (tmp_path / "mine_of_methods.py").write_text(
        "import torch\n"
        "from plywise.arena.method import Method, wrap_optimizer\n"
        "from plywise.arena.space import Range\n"
        "class Slow(torch.optim.SGD):\n"
        '    """Slow descent."""\n'
        "    search_space = {'lr': Range(0.01, 1.0, 0.1), 'momentum': Range(0.0, 0.9, 0.5, log=False)}\n"
        "method = wrap_optimizer('mine', 'my own', torch.optim.Rprop, {'lr': Range(0.001, 0.1, 0.01)})\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    slow = find_method("mine_of_methods:Slow")
    assert (slow.name, slow.about) == ("mine_of_methods:Slow", "Slow descent.")
    trainer = slow.make(setting(slow, numbers={"lr": 0.2, "momentum": 0.25}))
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.25
    assert list(find_method("proxprop+mine_of_methods:Slow").space) == ["lr", "tau"]
    assert list(find_method("backprop+mine_of_methods:Slow").space) == ["lr", "momentum"]
    assert find_method("mine_of_methods:method").about == "my own"
    assert find_method("torch.optim:Adam").space["lr"].low == 1e-4
    with pytest.raises(pw.PlywiseError, match="int"):
        find_method("mine_of_methods:number")
    with pytest.raises(pw.PlywiseError, match=r"not a subclass of torch\.optim\.Optimizer"):
        find_method("proxprop+mine_of_methods:method")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamm", "Did you mean adamw"),
        ("prox-porp", "Did you mean proxprop"),
        ("xyzzy", "There are: sgd, adamw"),
        ("proxprop+adamv", "Did you mean adamw"),
        ("foov+adamw", "Did you mean foof"),
        ("local-loss+adamw", "'adamw' is no rule"),
        ("cafo+foof", "closed form"),
        ("adamw+foof", "'adamw' is no rule or learner"),
        ("foof+foof", "'foof' is no optimizer"),
        ("no_such_module:Thing", "no module"),
        ("", "No method is called ''"),
    ],
)
def test_wrong_names_suggest_the_nearest(name, words):
    with pytest.raises(pw.PlywiseError, match=words):
        find_method(name)


def test_case_hyphens_and_aliases():
    assert find_method("FeatureWhitening").name == find_method("whitening").name == "feature-whitening"
    assert find_method("K-FAC+AdamW").name == "kfac+adamw"
    assert find_method("cafo").name == "cascaded-forward"


@pytest.mark.parametrize("space", [["lr"], {"lr": (1e-4, 1e-1)}, "lr"])
def test_a_search_space_holds_ranges(space):
    with pytest.raises(
        PlywiseError, match=r"Method mine: a search space is .*Range.*holds no (list|tuple|str)"
    ):
        Method("mine", "mine", space, lambda setting: None)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_in_one_sentence_what_it_is(name):
    about = find_method(name).about
    assert about[0].isupper() or name not in RULE_OF
    assert ". " not in about
