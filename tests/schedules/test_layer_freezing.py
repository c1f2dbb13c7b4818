"""Layer freezing: which layers freeze when, and what being frozen means."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import plywise as pw
from plywise.registry.card import read_card

from .runs import Run, run, same_bits

EAGER = {"every": 2, "warmup": 1, "threshold": 1e6, "max_share": 0.7}  # freezes all that it may at step 4


def scalars(layers: int = 4) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Layers of a single weight each, and an optimizer that moves none."""
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(layers)])
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def give(model: nn.Module, optimizer: torch.optim.Optimizer, *gradients: float | None) -> None:
    """A step with these gradients, None for none; a frozen layer gets none."""
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = None if gradient is None or not p.requires_grad else torch.full_like(p, gradient)
    optimizer.step()


def hooks(training: Run) -> list[int]:
    """How many hooks there are, of every kind, on the model's modules and the optimizer."""
    owners = [*training.model.modules(), training.optimizer]
    return [len(v) for owner in owners for name, v in sorted(vars(owner).items()) if name.endswith("hooks")]


# ---- what is frozen when ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "warmup", "max_share", "at", "frozen"),
    [(3, 1, 0.5, 6, "01"), (3, 7, 0.5, 9, "01"), (3, 9, 0.8, 9, "012"), (1, 1, 0.99, 2, "012")],
)
def test_settled_layers_freeze_at_the_end_of_a_period(every, warmup, max_share, at, frozen):
    """Gradients that stay the same are settled once two periods and the warm-up are over."""
    model, optimizer = scalars()
    rule = pw.LayerFreezing(every=every, warmup=warmup, max_share=max_share).attach(model, optimizer)
    seen = []
    for _ in range(at + 4):
        give(model, optimizer, 1.0, 2.0, 3.0, 4.0)
        seen.append("".join(rule.frozen))
    assert seen == [""] * (at - 1) + [frozen] * 5


def test_the_measure():
    """d of 4, 4, 6 and 0 percent: the third layer stops the run, though the fourth has settled."""
    model, optimizer = scalars(5)
    schedule = pw.LayerFreezing(every=2, threshold=0.05, max_share=0.8, warmup=1).attach(model, optimizer)
    for row in [(60, 50, 10, 7, 1), (-40, 50, 90, 7, 1), (104, 0, 53, -7, 1), (0, 96, -53, 7, 1)]:
        assert schedule.frozen == ()
        give(model, optimizer, *row)
    assert schedule.frozen == ("0", "1")
    # a frozen layer stays frozen, whatever comes; the third settles by and by, the fourth no more
    for row in [(900, 900, 60, 1, 1), (900, 900, 60, 1, 1)]:
        give(model, optimizer, *row)
    assert schedule.frozen == ("0", "1")  # 106 before, 120 now
    for row in [(900, 900, 57, 1, 1), (900, 900, 57.5, 9, 1)]:
        give(model, optimizer, *row)
    assert schedule.frozen == ("0", "1", "2")  # 120 before, 114.5 now


@pytest.mark.parametrize(("now", "freezes"), [(104.9, True), (105.1, False), (95.1, True), (94.9, False)])
def test_threshold_is_a_share_of_before(now, freezes):
    for scale in (1.0, 1e-20, 1e20):
        model, optimizer = scalars()
        schedule = pw.LayerFreezing(every=1, threshold=0.05, warmup=1).attach(model, optimizer)
        for first in (100.0, now):
            give(model, optimizer, *[first * scale] * 4)
        assert bool(schedule.frozen) == freezes


def test_layers_without_gradients():
    """One that starts to get gradients has not settled; one that never gets any holds nobody up."""
    model, optimizer = scalars()
    schedule = pw.LayerFreezing(every=1, warmup=1, max_share=0.9).attach(model, optimizer)
    give(model, optimizer, None, 0.0, None, 1.0)
    give(model, optimizer, None, 0.0, 1e-30, 1.0)
    assert schedule.frozen == ("0", "1")


def test_steps_without_a_gradient_do_not_count():
    model, optimizer = scalars()
    schedule = pw.LayerFreezing(every=1, warmup=2).attach(model, optimizer)
    for _ in range(5):
        give(model, optimizer, None, None, None, None)
    give(model, optimizer, 1.0, 1.0, 1.0, 1.0)
    assert schedule.frozen == ()
    give(model, optimizer, 1.0, 1.0, 1.0, 1.0)
    assert schedule.frozen == ("0", "1")


def test_a_layer_is_a_module_with_all_its_own_parameters():
    """g sums over weight and bias: what one loses the other may gain."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = pw.LayerFreezing(every=1, warmup=1).attach(model, optimizer)
    give(model, optimizer, 1.0, 3.0, 1.0, 1.0)
    give(model, optimizer, 2.0, -2.0, 5.0, 5.0)
    assert schedule.frozen == ("0",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_of_large_layers(dtype):
    """Such a sum overflows in float16, stands still in bfloat16, and drifts if float32 adds up one by one."""
    model = nn.Sequential(nn.Linear(3000, 1500, bias=False), nn.Linear(1, 1)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pw.LayerFreezing(every=5, warmup=1).attach(model, optimizer)
    give(model, optimizer, 0.3, -0.3, 0.3)
    each = float(torch.tensor(0.3, dtype=dtype))
    expected = {"0": 4_500_000 * each, "1": 2 * each}
    assert optimizer.state_dict()["plywise.LayerFreezing"]["now"] == pytest.approx(expected, rel=1e-6)


def test_sparse_gradients():
    """Rows that came twice are added before their size is taken."""
    model = nn.Sequential(nn.Embedding(5, 1, sparse=True), nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[1].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = pw.LayerFreezing(every=1, warmup=1).attach(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.tensor([1, 1, 2, 4])) * torch.tensor([[1.0], [-4.0], [2.0], [0.0]])).sum().backward()
        optimizer.step()
    assert optimizer.state_dict()["plywise.LayerFreezing"]["before"]["0"] == 5.0
    assert schedule.frozen == ("0",)


@pytest.mark.parametrize("way", ["weight", "module"])
def test_a_weight_at_two_places(way):
    """It is frozen when both of its layers are."""
    model, optimizer = scalars(6)
    if way == "weight":
        model[3].weight = model[1].weight
    else:
        model[3] = model[1]
    schedules = [pw.LayerFreezing(every=1, warmup=1, max_share=share) for share in (0.55, 0.7)]
    for schedule, frozen in zip(schedules, ["0", "0123"], strict=True):
        schedule.attach(model, optimizer)
        for _ in range(2):
            give(model, optimizer, *[1.0] * 5)
        assert "".join(schedule.frozen) == frozen
        schedule.detach()


# ---- what being frozen means ------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, foreach=True),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("to_none", [True, False])
def test_frozen_layers_do_not_move(optimizer, to_none):
    """Neither by momentum nor by decay, nor do their batch norms by the data."""
    training = run()
    training.optimizer = OPTIMIZERS[optimizer](training.model.parameters())
    schedule = pw.LayerFreezing(**EAGER).attach(training.model, training.optimizer)
    for number in range(4):
        training.step(number)
    assert schedule.frozen == ("0", "1", "3", "4")
    before = training.weights()
    for number in range(4, 9):
        training.model.train()
        training.optimizer.zero_grad(set_to_none=to_none)
        training.loss(number).backward()
        training.optimizer.step()
    for layer in "0134":
        assert same_bits(before, training.weights(), f"{layer}.")
        assert all(p.grad is None for p in training.model[int(layer)].parameters())
    for layer in "68":
        assert not same_bits(before, training.weights(), f"{layer}.")


def test_backward_ends_before_the_frozen_part():
    training = run()
    schedule = pw.LayerFreezing(**EAGER).attach(training.model, training.optimizer)
    for number in range(4):
        training.step(number)
    x = torch.randn(3, 2, 4, 4)
    assert not training.model[:5](x).requires_grad
    assert training.model[:7](x).requires_grad
    schedule.detach()
    assert training.model[:1](x).requires_grad


def test_batch_norms_of_the_frozen_part():
    training = run()
    norms = [training.model[1], training.model[4]]
    schedule = pw.LayerFreezing(**{**EAGER, "max_share": 0.5}).attach(training.model, training.optimizer)
    for number in range(4):
        training.step(number)
        assert [norm.training for norm in norms] == [number < 3, True]  # "1" is frozen, "4" is behind it
    x = torch.randn(5, 2, 4, 4)
    training.model.train()
    front = training.model[:3](x)
    for number in range(4, 8):
        training.step(number)
    assert torch.equal(training.model.train()[:3](x), front)
    assert not norms[0].training
    schedule.detach()
    assert [norm.training for norm in norms] == [True, True]
    seen = training.weights()
    training.step(8)
    assert not same_bits(seen, training.weights(), "1.running_mean")


def test_a_batch_norm_without_weights_belongs_to_what_is_around_it():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pw.LayerFreezing(every=1, warmup=1, threshold=1e6).attach(model, optimizer)
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    assert (model[1].training, model[3].training) == (False, True)


def test_a_model_in_eval_mode():
    """Its batch norms are held when it trains again, and stay in eval mode when it is detached in it."""
    training = run()
    hooked = hooks(training)
    schedule = pw.LayerFreezing(**EAGER).attach(training.model.eval(), training.optimizer)
    for number in range(7):
        training.optimizer.zero_grad()
        training.loss(number).backward()
        training.optimizer.step()
    before = training.weights()
    training.step(7)
    assert same_bits(before, training.weights(), "1.")
    training.model.eval()
    schedule.detach()
    assert not any(module.training for module in training.model.modules())
    assert hooks(training) == hooked


def test_what_its_owner_froze_stays_so():
    """Before the schedule came, and before its turn: weights, and a batch norm in eval mode."""
    training = run()
    model = training.model
    model[0].requires_grad_(False)
    schedule = pw.LayerFreezing(**EAGER).attach(model, training.optimizer)
    model[3].bias.requires_grad_(False)
    for number in range(4):
        model.train()
        model[1].eval()
        training.optimizer.zero_grad()
        training.loss(number).backward()
        training.optimizer.step()
    assert schedule.frozen == ("1", "3", "4")  # 0.7 of the five that train
    schedule.detach()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["0.weight", "3.bias"]
    assert (model[1].training, model[4].training) == (False, True)


def test_only_what_the_optimizer_steps_is_frozen():
    training = run()
    mine = [p for layer in training.model[3:] for p in layer.parameters()]
    training.optimizer = torch.optim.SGD(mine, lr=0.01)
    schedule = pw.LayerFreezing(**EAGER).attach(training.model, training.optimizer)
    for number in range(4):
        training.step(number)
    assert schedule.frozen == ("3", "4")
    assert training.model[0].weight.grad is not None


# ---- attaching and leaving --------------------------------------------------------------------------


def test_nothing_is_left_after_detach():
    training, plain = run(), run()
    before = hooks(training)
    schedule = pw.LayerFreezing(**EAGER).attach(training.model, training.optimizer)
    for number in range(6):
        training.step(number)
    assert hooks(training) != before
    assert training.model.state_dict().keys() == plain.model.state_dict().keys()
    schedule.detach()
    schedule.detach()
    assert schedule.frozen == ()
    assert hooks(training) == before
    assert training.optimizer.state_dict().keys() == plain.optimizer.state_dict().keys()
    for one in (training, plain):
        assert all(p.requires_grad for p in one.model.parameters())
        assert all(module.training for module in one.model.modules())
    # and it trains on, all of it
    seen = training.weights()
    training.step(6)
    assert not any(same_bits(seen, training.weights(), f"{layer}.") for layer in (0, 1, 3, 4, 6, 8))
    schedule.attach(training.model, training.optimizer)
    schedule.detach()


def test_until_something_freezes_training_is_untouched():
    training, plain = run(), run()
    schedule = pw.LayerFreezing(every=2, warmup=100).attach(training.model, training.optimizer)
    for number in range(8):
        training.step(number)
        plain.step(number)
    assert same_bits(training.weights(), plain.weights())
    schedule.detach()


def test_copies():
    """A copied model has frozen weights and no schedule; a copied schedule has no model."""
    training = run()
    schedule = pw.LayerFreezing(**EAGER).attach(training.model, training.optimizer)
    for number in range(4):
        training.step(number)
    for other in (copy.deepcopy(training.model), pickle.loads(pickle.dumps(training.model))):
        assert not other[0].weight.requires_grad
        assert not other[1].training
        other.train()
        assert torch.isfinite(other(torch.randn(3, 2, 4, 4))).all()
        assert other[1].training
    for again in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert again.frozen == ()
        assert str(again) == str(schedule)
        again.attach(*scalars()).detach()


def test_a_dropped_model_is_freed():
    training = run()
    schedule = pw.LayerFreezing(**EAGER).attach(training.model, training.optimizer)
    for number in range(4):
        training.step(number)
    model = weakref.ref(training.model)
    gc.disable()
    try:
        del training.model
        assert model() is None
    finally:
        gc.enable()
    schedule.detach()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"every": 0}, "every"),
        ({"every": 1.5}, "every"),
        ({"warmup": 0}, "warmup"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"max_share": 0.0}, "max_share"),
        ({"max_share": 1.0}, "max_share"),
    ],
)
def test_settings_out_of_range(settings, name):
    with pytest.raises(ValueError, match=f"LayerFreezing: {name}"):
        pw.LayerFreezing(**settings)


def test_what_attach_refuses():
    model, optimizer = scalars()
    schedule = pw.LayerFreezing().attach(model, optimizer)
    with pytest.raises(pw.AttachError, match="attached already"):
        schedule.attach(*scalars())
    with pytest.raises(pw.AttachError, match="Another LayerFreezing"):
        pw.LayerFreezing().attach(model, optimizer)
    with pytest.raises(pw.AttachError, match="LBFGS"):
        pw.LayerFreezing().attach(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(pw.AttachError, match="steps none"):
        pw.LayerFreezing().attach(model, scalars()[1])
    small, its_optimizer = scalars(3)
    with pytest.raises(pw.AttachError, match="none of 3 layers"):
        pw.LayerFreezing(max_share=0.3).attach(small, its_optimizer)
    assert not small._forward_pre_hooks


def test_card():
    card = read_card(pw.LayerFreezing)
    assert (card.year, len(card.hyper_parameters)) == (2019, 4)
