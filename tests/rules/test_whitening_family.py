"""What the papers of the ``L^-p G R^-q`` family promise of their moves, and what the rules refuse."""

import math

import pytest
import torch
from algebra import relative
from torch import Tensor, nn

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")

NOW = {"stats_every": 1, "refresh_every": 1}
ONE_SIDED = {
    "whitening": lambda **how: pw.FeatureWhitening(**NOW, **how),
    "foof": lambda **how: pw.Foof(sample=1, **NOW, **how),
    "output only": lambda **how: pw.Precondition(left=0.5, right=0.0, **NOW, **how),
}
TWO_SIDED = {
    "adabk": lambda **how: pw.AdaBK(**NOW, **how),
    "kfac": lambda **how: pw.KFAC(**NOW, **how),
    "uneven": lambda **how: pw.Precondition(left=0.25, right=0.75, **NOW, **how),
}
FAMILY = {**ONE_SIDED, **TWO_SIDED}
LAYERS = {
    "linear": lambda: (nn.Linear(7, 5), lambda n: torch.randn(n, 7) + 1),
    "linear without bias": lambda: (nn.Linear(7, 5, bias=False), lambda n: torch.randn(n, 7)),
    "conv": lambda: (nn.Conv2d(2, 4, 3, padding=1), lambda n: torch.randn(n, 2, 4, 5)),
    "grouped conv": lambda: (nn.Conv2d(4, 6, 3, stride=2, groups=2), lambda n: torch.randn(n, 4, 7, 7)),
}


def matrix(grads) -> Tensor:
    return torch.cat([g.reshape(len(g), -1) for g in grads], 1)


def walk(rule: pw.Rule, layer: nn.Module, batches) -> list[tuple[Tensor, Tensor]]:
    """``(G, D)`` of each step, the bias's column with the weight's; the layer itself stays as it is."""
    parameters = list(layer.parameters())
    plain = [matrix(torch.autograd.grad((layer(x) * delta).sum(), parameters)) for x, delta in batches]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    rule.attach(layer, optimizer)
    found = []
    for G, (x, delta) in zip(plain, batches, strict=True):
        optimizer.zero_grad()
        (layer(x) * delta).sum().backward()
        optimizer.step()
        found.append((G, matrix([p.grad for p in parameters])))
    rule.detach()
    return found


def batches_for(layer: nn.Module, draw, sizes=(4, 1, 9, 2)) -> list[tuple[Tensor, Tensor]]:
    inputs = [draw(n) for n in sizes]
    return [(x, torch.randn_like(layer(x))) for x in inputs]


def directions(rule: pw.Rule, layer: nn.Module, batches) -> list[Tensor]:
    return [D for _, D in walk(rule, layer, batches)]


# ---- properties of the moves -----------------------------------------------------------------------


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("rule", FAMILY)
def test_moves_keep_the_gradients_size_and_go_down(rule, make):
    layer, draw = LAYERS[make]()
    for G, D in walk(FAMILY[rule](), layer, batches_for(layer, draw)):
        assert D.norm().item() == pytest.approx(G.norm().item(), rel=1e-12)
        assert (G * D).sum() > 1e-6 * G.norm() * D.norm()
        assert relative(D, G) > 1e-3  # and it is another direction


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("rank", [None, 1])
def test_moves_keep_their_size_between_refreshes_where_rows_are_many(rank, make):
    layer, draw = LAYERS[make]()
    for rule in (pw.AdaBK(stats_every=2, refresh_every=6, rank=rank), pw.Foof(sample=1, rank=rank)):
        for G, D in walk(rule, layer, batches_for(layer, draw, (30, 40, 50, 30, 40))):
            assert D.norm().item() == pytest.approx(G.norm().item(), rel=1e-12)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("rank", [None, 1])
def test_moves_go_down_between_refreshes_too(rank, make):
    layer, draw = LAYERS[make]()
    rules = pw.AdaBK(stats_every=2, refresh_every=6, rank=rank), pw.Foof(refresh_every=10, rank=rank)
    for rule in rules:
        for G, D in walk(rule, layer, batches_for(layer, draw, (4, 1, 9, 2, 1, 3, 5))):
            assert (G * D).sum() > 0


@pytest.mark.parametrize("rule", FAMILY)
def test_one_sample_alone_keeps_its_direction(rule):
    """G has rank one: a direction that both sides only scale."""
    for layer, x in (
        (nn.Linear(7, 5), torch.randn(1, 7)),
        (nn.Linear(7, 5, bias=False), torch.randn(7)),
        (nn.Conv2d(2, 4, 3), torch.randn(1, 2, 3, 3)),
    ):
        ((G, D),) = walk(FAMILY[rule](), layer, [(x, torch.randn_like(layer(x)))])
        assert relative(D, G) < 1e-11


@pytest.mark.parametrize("make", ["linear", "grouped conv"])
@pytest.mark.parametrize("rule", FAMILY)
@pytest.mark.parametrize("c", [7.0, 1e-3])
def test_a_loss_times_c_gives_moves_times_c(rule, make, c):
    layer, draw = LAYERS[make]()
    batches = batches_for(layer, draw)
    louder = [(x, c * delta) for x, delta in batches]
    pairs = zip(*(directions(FAMILY[rule](), layer, b) for b in (batches, louder)), strict=True)
    assert all(relative(two, c * one) < 1e-9 for one, two in pairs)


@pytest.mark.parametrize("rule", FAMILY)
def test_inputs_times_c_do_not_change_the_direction(rule):
    """Without a bias, whose 1 does not scale."""
    for layer, draw in (LAYERS["linear without bias"](), (nn.Conv2d(2, 4, 3, bias=False), None)):
        draw = draw or (lambda n: torch.randn(n, 2, 5, 5))
        batches = batches_for(layer, draw)
        larger = [(30 * x, delta) for x, delta in batches]
        pairs = zip(*(directions(FAMILY[rule](), layer, b) for b in (batches, larger)), strict=True)
        assert all(relative(two, 30 * one) < 1e-9 for one, two in pairs)


@pytest.mark.parametrize("rule", FAMILY)
def test_turned_inputs_and_outputs_turn_the_move(rule):
    """x Qᵀ and Δ Pᵀ give P D Qᵀ: no choice of coordinates matters."""
    layer, draw = LAYERS["linear without bias"]()
    P, Q = (torch.linalg.qr(torch.randn(size, size)).Q for size in (5, 7))
    batches = batches_for(layer, draw)
    turned = [(x @ Q.T, delta @ P.T) for x, delta in batches]
    pairs = zip(*(directions(FAMILY[rule](), layer, b) for b in (batches, turned)), strict=True)
    assert all(relative(two, P @ one @ Q.T) < 1e-9 for one, two in pairs)


@pytest.mark.parametrize("rule", ["whitening", "foof"])
def test_white_inputs_leave_the_gradient_as_it_is(rule):
    x = torch.linalg.qr(torch.randn(20, 7)).Q * math.sqrt(20)
    layer = nn.Linear(7, 5, bias=False)
    for G, D in walk(FAMILY[rule](), layer, [(x, torch.randn(20, 5)) for _ in range(3)]):
        assert relative(D, G) < 1e-12


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("rule", FAMILY)
def test_much_damping_is_backpropagation(rule, make):
    """In each group: relative to its own statistic, one group's damping is not another's."""
    layer, draw = LAYERS[make]()
    groups = getattr(layer, "groups", 1)
    for G, D in walk(FAMILY[rule](damping=1e10), layer, batches_for(layer, draw)):
        for g, d in zip(G.chunk(groups), D.chunk(groups), strict=True):
            assert relative(d / d.norm(), g / g.norm()) < 1e-8


def test_much_absolute_damping_is_backpropagation_in_all_groups():
    layer, draw = LAYERS["grouped conv"]()
    rule = pw.Precondition(left=0.5, right=1, damping=1e14, relative_to="absolute", **NOW)
    for G, D in walk(rule, layer, batches_for(layer, draw)):
        assert relative(D, G) < 1e-9


# ---- the members of the family ---------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [(1, 1), (2, 4)])
@pytest.mark.parametrize("make", ["linear", "grouped conv"])
def test_named_rules_are_members_of_the_family(make, schedule):
    layer, draw = LAYERS[make]()
    batches = batches_for(layer, draw, (4, 1, 9, 2, 3, 8))
    when = {"stats_every": schedule[0], "refresh_every": schedule[1]}
    ours = {"decay": 0.9, "damping": 0.03, **when}
    for named, member in (
        (pw.FeatureWhitening(**ours), pw.Precondition(left=0, right=0.5, relative_to="max", **ours)),
        (pw.AdaBK(**ours), pw.Precondition(left=0.5, right=0.5, relative_to="max", **ours)),
        (pw.KFAC(**ours), pw.Precondition(left=1, right=1, relative_to="mean", **ours)),
        (pw.KFAC(keep_norm=False, **ours), pw.Precondition(left=1, right=1, keep_norm=False, **ours)),
        (pw.Foof(sample=3, **ours), pw.Precondition(right=1, sample=3, slowdown=8, **ours)),
        (pw.AdaBK(rank=2, **ours), pw.Precondition(0.5, 0.5, relative_to="max", rank=2, **ours)),
        (pw.Foof(rank=2, slowdown=1, **ours), pw.Precondition(rank=2, sample=pw.Foof().sample, **ours)),
    ):
        pairs = zip(*(directions(rule, layer, batches) for rule in (named, member)), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs), named


@pytest.mark.parametrize("make", LAYERS)
def test_proxprop_is_a_member(make):
    """A batch's own sum AᵀA with 1/τ on its diagonal: in the first step, or with no other kept."""
    layer, draw = LAYERS[make]()
    batches, tau = batches_for(layer, draw), 0.3
    how = {"keep_norm": False, "statistic": "sum", "damping": 1 / tau, "relative_to": "absolute", **NOW}
    prox = []
    for batch in batches:
        rule = pw.ProxProp(tau)
        rule.attach(layer)
        layer.zero_grad()
        (layer(batch[0]) * batch[1]).sum().backward()
        rule.detach()
        prox.append(matrix([p.grad for p in layer.parameters()]))
    assert relative(directions(pw.Precondition(decay=1, **how), layer, batches[:1])[0], prox[0]) < 1e-12
    forgetful = directions(pw.Precondition(decay=1e-30, **how), layer, batches)
    assert max(relative(one, two) for one, two in zip(forgetful, prox, strict=True)) < 1e-11


def test_kfac_is_the_textbooks():
    """``(Ā ⊗ Γ)⁻¹ vec G`` with the damping λ split by π, Martens and Grosse (2015), section 6.3."""
    layer, eps = nn.Linear(6, 4), 0.05
    x, delta = torch.randn(30, 6) * torch.arange(1.0, 7), torch.randn(30, 4) @ torch.randn(4, 4)
    ((G, D),) = walk(pw.KFAC(damping=eps, keep_norm=False, **NOW), layer, [(x, delta)])
    homogeneous = torch.cat([x, torch.ones(30, 1)], 1)
    A, Gamma = homogeneous.T @ homogeneous / 30, delta.T @ delta
    pi = ((A.trace() / 7) / (Gamma.trace() / 4)).sqrt()
    root_of_damping = eps * (A.trace() / 7 * (Gamma.trace() / 4)).sqrt()
    fisher = torch.kron(
        A + pi * root_of_damping * torch.eye(7), Gamma + root_of_damping / pi * torch.eye(4)
    )  # columns stacked
    expected = torch.linalg.solve(fisher, G.T.flatten()).reshape(7, 4).T
    assert relative(D, expected) < 1e-11
    ((_, kept),) = walk(pw.KFAC(damping=eps, **NOW), layer, [(x, delta)])
    assert relative(kept, expected * (G.norm() / expected.norm())) < 1e-11


@pytest.mark.parametrize("rule", [pw.FeatureWhitening, pw.AdaBK, pw.KFAC, pw.Foof])
def test_a_refresh_without_a_gradient_does_not_lose_the_size(rule):
    """The first step below a head of zeros: nothing to measure c by. Small inputs, fewer than outputs."""
    layer = nn.Linear(7, 5, bias=False)
    batches = [(torch.randn(4, 7) / 100, size * torch.randn(4, 5)) for size in (0.0, 1.0, 1.0)]
    for G, D in walk(rule(), layer, batches)[1:]:
        assert 0.1 < D.norm() / G.norm() < 10


# ---- the table -------------------------------------------------------------------------------------


def row_of(rule: pw.Rule, layer: nn.Module, batch_size: int = 10, x: Tensor | None = None):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    rule.attach(layer, optimizer)
    if x is not None:
        layer(x).sum().backward()
    (row,) = rule.explain(batch_size).rows
    rule.detach()
    return row


def test_the_table_is_a_hand_count():
    """10 rows of 6 inputs and a bias, 4 outputs; a plain step takes 6·10·7·4 = 1680 operations."""
    both = pw.Precondition(left=0.5, right=0.5, stats_every=5, refresh_every=10)
    row = row_of(both, nn.Linear(6, 4))
    inputs = 10 * 7**2 / 5 + 7**3 / 10 + 2 * 7**2 * 4  # statistic, root, product with G's 4 rows
    outputs = 10 * 4**2 / 5 + 4**3 / 10 + 2 * 4**2 * 7
    assert row.cost == pytest.approx((inputs + outputs) / 1680, rel=1e-12)
    assert row.memory == 8 * (2 * 7**2 + 2 * 4**2)  # statistic and root, in float64
    assert row.treatment == "Precondition: L^-0.5 G R^-0.5, every 10 steps"

    low = pw.Precondition(rank=2, stats_every=5, refresh_every=10)
    row = row_of(low, nn.Linear(6, 4))
    inputs = 10 * 7**2 / 5 + 2 * 7**2 * 2 / 10 + 4 * 7 * 2 * 4
    assert row.cost == pytest.approx(inputs / 1680, rel=1e-12)
    assert row.memory == 8 * (7**2 + 7 * 2)
    assert row.treatment == "Precondition: G R^-1, every 10 steps"

    few = row_of(pw.Precondition(stats_every=5), nn.Linear(6, 4), batch_size=2)  # fewer rows than outputs
    assert few.cost == pytest.approx((2 * 7**2 / 5 + 7**3 / 5 + 2 * 7**2 * 2) / (6 * 2 * 7 * 4), rel=1e-12)


def test_the_table_counts_a_convolution_by_groups_and_positions():
    layer, x = nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 5, 6)  # 24 rows, 18 inputs
    rule = pw.KFAC(stats_every=2, refresh_every=4)
    row = row_of(rule, layer, x=x)
    inputs = 24 * 18**2 / 2 + 18**3 / 4 + 2 * 18**2 * 3
    outputs = 24 * 3**2 / 2 + 3**3 / 4 + 2 * 3**2 * 18
    assert row.cost == pytest.approx(2 * (inputs + outputs) / (6 * 2 * 24 * 18 * 3), rel=1e-12)
    assert row.memory == 8 * 2 * (2 * 18**2 + 2 * 3**2)


def test_memory_of_the_table_is_what_the_optimizer_saves():
    """But for the counts and a root's few numbers beside its vectors."""
    for rule in (pw.KFAC(), pw.AdaBK(rank=2), pw.Foof(rank=3), pw.RLS()):
        layer = nn.Linear(20, 8)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        rule.attach(layer, optimizer)
        layer(torch.randn(5, 20)).sum().backward()
        optimizer.step()
        (memory,) = rule.statistics.values()
        saved = sum(t.numel() for t in memory.values() if t.dim() > 2)
        assert rule.explain().rows[0].memory == 8 * saved, rule


# ---- hyper-parameters out of range -----------------------------------------------------------------

NUMBERS = [0, -1.0, math.nan, math.inf, "1", None, True]
WHOLES = [0, -3, 2.0, "1", True]
RULES = {
    pw.Precondition: "decay damping rank sample stats_every refresh_every max_size",
    pw.FeatureWhitening: "decay damping rank sample stats_every refresh_every",
    pw.AdaBK: "decay damping rank sample stats_every refresh_every",
    pw.KFAC: "decay damping rank sample stats_every refresh_every",
    pw.Foof: "decay damping rank sample stats_every refresh_every",
    pw.RLS: "forgetting gain ridge",
}
RUNNING = [rule for rule in RULES if rule is not pw.RLS]
POSITIVE = ("decay", "damping", "forgetting", "gain", "ridge")
REFUSED = [
    *(
        (rule, {name: value}, name)
        for rule, names in RULES.items()
        for name in names.split()
        for value in (NUMBERS if name in POSITIVE else WHOLES)
    ),
    *((rule, {"decay": 1.01}, "decay") for rule in RUNNING),
    *((rule, {"stats_every": 4, "refresh_every": 10}, "refresh_every") for rule in RUNNING),
    (pw.RLS, {"forgetting": 1.01}, "forgetting"),
    (pw.Precondition, {"left": -0.5}, "left"),
    (pw.Precondition, {"right": -1.0}, "right"),
    (pw.Precondition, {"left": 0.0, "right": 0.0}, "left and right"),
    (pw.Precondition, {"left": math.inf}, "left"),
    (pw.Precondition, {"right": math.nan}, "right"),
    (pw.Precondition, {"solver": "magic"}, "solver"),
    (pw.Precondition, {"solver": "cholesky", "right": 0.5}, "solver"),
    (pw.Precondition, {"solver": "newton_schulz"}, "solver"),
    (pw.FeatureWhitening, {"solver": "cholesky"}, "solver"),
    (pw.AdaBK, {"solver": "magic"}, "solver"),
    (pw.Precondition, {"relative_to": "median"}, "relative_to"),
    (pw.Precondition, {"statistic": "max"}, "statistic"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "arguments", "name"), REFUSED)
def test_a_hyper_parameter_out_of_range_is_named(rule, arguments, name):
    with pytest.raises(ValueError, match=rf"^{rule.__name__}: .*\b{name}\b"):
        rule(**arguments)
