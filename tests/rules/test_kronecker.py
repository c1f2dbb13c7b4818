"""``c · L^-p G R^-q`` against a slow definition that shares no code with it, and whose turn it is."""

import itertools
import math

import pytest
import torch
from algebra import relative
from torch import Tensor, nn
from torch.nn import functional

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")

SIZES = [2, 20, 5, 1, 9, 3]  # batches in turn: fewer rows than inputs, than outputs, and more


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """``[A, 1]`` of a linear layer or of a zero-padded Conv2d, (g, n, k)."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(1, -1, x.shape[-1])
    else:
        geometry = layer.kernel_size, layer.dilation, layer.padding, layer.stride
        parts = [functional.unfold(part, *geometry) for part in x.chunk(layer.groups, 1)]
        rows = torch.stack([part.mT.flatten(0, 1) for part in parts])
    return rows if layer.bias is None else functional.pad(rows, (0, 1), value=1.0)


def delta_rows_of(layer: nn.Module, delta: Tensor) -> Tensor:
    """``Δ``, (g, n, m)."""
    if isinstance(layer, nn.Linear):
        return delta.reshape(1, -1, delta.shape[-1])
    return torch.stack([part.flatten(2).mT.flatten(0, 1) for part in delta.chunk(layer.groups, 1)])


def grads(layer: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(len(p), -1) for p in layer.parameters()], 1)


def slow_root(S: Tensor, power: float, damping: float, relative_to: str, rank: int | None) -> Tensor:
    if power == 0:
        return torch.eye(len(S))
    values, vectors = torch.linalg.eigh(S)
    if rank is not None and 2 * rank < len(S):
        values[:-rank] = values[:-rank].mean()
    shift = damping * {"mean": S.trace() / len(S), "max": values[-1], "absolute": 1.0}[relative_to]
    return vectors @ torch.diag((values + shift) ** -power) @ vectors.T


class Slow:
    """One layer's moves, step by step, each group a matrix of its own."""

    def __init__(self, left, right, decay, statistic, damping, relative_to, keep_norm, stats_every,
                 refresh_every, phase=0, rank=None):  # fmt: skip
        self.powers, self.decay, self.statistic = {"L": left, "R": right}, decay, statistic
        self.damping, self.relative_to, self.keep_norm = damping, relative_to, keep_norm
        self.stats_every, self.refresh_every, self.phase = stats_every, refresh_every, phase
        self.rank = rank
        self.t, self.c, self.sums, self.counts, self.roots = 0, 1.0, {}, {}, {}
        self.by_rows = False

    def due(self, every: int, phase: int = 0) -> bool:
        return self.t == 0 or (self.t - phase) % every == 0

    def step(self, A: Tensor, delta: Tensor, seen: Tensor | None = None) -> Tensor:
        """``D`` (g·m, k) for rows A (g, n, k) and Δ (g, n, m); ``seen``: those rows of A that R learns."""
        seen = A if seen is None else seen
        learns = self.due(self.stats_every)
        if learns:
            for side, new, rows in (("R", seen, seen.shape[1]), ("L", delta, 1)):
                outer = (new.unsqueeze(3) * new.unsqueeze(2)).sum(1)
                self.sums[side] = self.decay * self.sums.get(side, 0) + outer
                self.counts[side] = self.decay * self.counts.get(side, 0) + rows
        G = torch.stack([d.T @ a for d, a in zip(delta, A, strict=True)])
        # the first batches' roots should not last: in the first cycle each statistic makes new ones
        refreshes = learns if self.t < self.refresh_every else self.due(self.refresh_every, self.phase)
        if refreshes:
            for side, power in self.powers.items():
                by = self.counts[side] if self.statistic == "mean" else 1
                self.roots[side] = [
                    slow_root(S / by, power, self.damping, self.relative_to, self.rank)
                    for S in self.sums[side]
                ]
        between = zip(self.roots["L"], G, self.roots["R"], strict=True)
        D = torch.stack([left @ g @ right for left, g, right in between])
        if self.keep_norm and (refreshes or not self.by_rows):
            self.c = G.norm() / D.norm()
        if (
            learns or refreshes
        ):  # with fewer rows than G has, the next moves are made without G: c cannot be measured
            limits = [size for side, size in (("R", G.shape[1]), ("L", G.shape[2])) if self.powers[side]]
            self.rows = seen.shape[1] if learns else self.rows
            self.by_rows = self.rows < min(limits, default=0)
        self.t += 1
        return (self.c * D).flatten(0, 1)


def linear(**how):
    return nn.Linear(7, 5, **how), lambda size: torch.randn(size, 7) * torch.arange(1.0, 8)


def tokens():
    return nn.Linear(6, 9), lambda size: torch.randn(size, 3, 6) + 1


def conv(**how):
    return nn.Conv2d(4, 6, (3, 2), **how), lambda size: torch.randn(-(-size // 4), 4, 7, 6) + 0.5


LAYERS = {
    "linear": linear,
    "linear without bias": lambda: linear(bias=False),
    "tokens": tokens,
    "conv": lambda: conv(padding=1),
    "conv without bias": lambda: conv(bias=False),
    "conv, all at once": lambda: conv(groups=2, stride=2, padding=(1, 2), dilation=(1, 2)),
    "conv of one row": lambda: (nn.Conv2d(2, 9, 3), lambda size: torch.randn(1, 2, 3, 3)),
}
PLAIN = {
    "left": 0.0,
    "right": 1.0,
    "decay": 0.95,
    "statistic": "mean",
    "damping": 0.1,
    "relative_to": "mean",
    "keep_norm": True,
}
SETTINGS = {
    "one side": PLAIN,
    "root, max": {**PLAIN, "right": 0.5, "damping": 1e-3, "relative_to": "max", "decay": 0.7},
    "both, max": {**PLAIN, "left": 0.5, "right": 0.5, "damping": 1e-3, "relative_to": "max", "decay": 0.9},
    "both, own size": {**PLAIN, "left": 1.0, "damping": 0.3, "keep_norm": False},
    "output, absolute": {**PLAIN, "left": 0.3, "right": 0.0, "damping": 0.5, "relative_to": "absolute"},
    "sum, absolute": {**PLAIN, "right": 0.7, "statistic": "sum", "damping": 2.0, "relative_to": "absolute"},
    "both, sum, for ever": {**PLAIN, "left": 0.25, "statistic": "sum", "decay": 1.0},
}
SCHEDULES = [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4)]


def problem(layer, draw, t):
    x = draw(SIZES[t % len(SIZES)])
    return x, torch.randn_like(layer(x)) * (t + 1)  # of another size in each step


@pytest.mark.parametrize(
    ("make", "settings", "schedule"),
    [
        (make, settings, schedule)
        for i, make in enumerate(LAYERS)
        for j, settings in enumerate(SETTINGS)
        for k, schedule in enumerate(SCHEDULES)
        # two layers meet all settings at all schedules; each other one meets all settings, and all schedules
        if make in ("linear", "conv, all at once") or (i + j) % len(SCHEDULES) == k
    ],
)
def test_every_step_is_the_definition(make, settings, schedule):
    layer, draw = LAYERS[make]()
    how = dict(SETTINGS[settings], stats_every=schedule[0], refresh_every=schedule[1])
    optimizer, slow = torch.optim.SGD(layer.parameters(), lr=0.01), Slow(**how)
    rule = pw.Precondition(**how).attach(layer, optimizer)
    for t in range(12):
        x, delta = problem(layer, draw, t)
        optimizer.zero_grad()
        (layer(x) * delta).sum().backward()
        optimizer.step()
        expected = slow.step(rows_of(layer, x), delta_rows_of(layer, delta))
        assert relative(grads(layer), expected) < 1e-9, t
    assert not rule.health.of("")


@pytest.mark.parametrize("schedule", [(1, 1), (2, 4)])
def test_a_sampled_statistic_takes_the_offsets_in_turn(schedule):
    """sample=2: every second position along both axes; the offset moves on with each statistic."""
    layer = nn.Conv2d(2, 3, 3, padding=1)
    how = dict(PLAIN, left=0.5, right=0.5, stats_every=schedule[0], refresh_every=schedule[1])
    optimizer, slow = torch.optim.SGD(layer.parameters(), lr=0.0), Slow(**how)
    pw.Precondition(sample=2, **how).attach(layer, optimizer)
    for t in range(12):
        x = torch.randn(2, 2, 5, 6)
        delta = torch.randn_like(layer(x))
        turn, rows = t // schedule[0], rows_of(layer, x)
        offsets = turn % 2, turn // 2 % 2
        seen = rows.reshape(1, 2, 5, 6, -1)[:, :, offsets[0] :: 2, offsets[1] :: 2].flatten(1, 3)
        optimizer.zero_grad()
        (layer(x) * delta).sum().backward()
        optimizer.step()
        assert relative(grads(layer), slow.step(rows, delta_rows_of(layer, delta), seen)) < 1e-9, t


@pytest.mark.parametrize("make", ["linear", "conv, all at once"])
def test_micro_batches_of_a_step_are_one_batch(make):
    layer, draw = LAYERS[make]()
    how = dict(SETTINGS["both, max"], stats_every=1, refresh_every=2)
    optimizer, slow = torch.optim.SGD(layer.parameters(), lr=0.0), Slow(**how)
    pw.Precondition(**how).attach(layer, optimizer)
    for t in range(6):
        optimizer.zero_grad()
        parts = [problem(layer, draw, 2 * t + i) for i in range(3)]
        for x, delta in parts:
            (layer(x) * delta).sum().backward()
        optimizer.step()
        rows = torch.cat([rows_of(layer, x) for x, _ in parts], 1)
        deltas = torch.cat([delta_rows_of(layer, delta) for _, delta in parts], 1)
        assert relative(grads(layer), slow.step(rows, deltas)) < 1e-9, t


# ---- whose turn it is ------------------------------------------------------------------------------


def run(model: nn.Module, rule: pw.Rule, steps: int) -> list[list[str]]:
    """The layers that have new roots, step by step."""
    optimizer, roots = torch.optim.SGD(model.parameters(), lr=0.01), {}
    rule.attach(model, optimizer)
    turns = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, model[0].in_features)).square().sum().backward()
        optimizer.step()
        now = {name: memory["input.root"].clone() for name, memory in rule.statistics.items()}
        turns.append([name for name, root in now.items() if not torch.equal(root, roots.get(name, root[:0]))])
        roots = now
    return turns


@pytest.mark.parametrize(("layers", "every"), [(1, 1), (1, 4), (3, 3), (4, 6), (5, 5)])
def test_equal_layers_take_turns(layers, every):
    model, names = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))), [str(i) for i in range(layers)]
    rule = pw.Precondition(stats_every=1, refresh_every=every)
    turns = run(model, rule, 3 * every)
    assert all(sorted(step) == names for step in turns[:every])  # at each statistic at first
    assert all(len(step) <= 1 for step in turns[every:])
    for start in range(every, 2 * every + 1):  # then in any cycle everyone, once
        assert sorted(itertools.chain(*turns[start : start + every])) == names


@pytest.mark.parametrize("every", [3, 4])
def test_layers_take_turns_from_the_second_cycle_where_statistics_are_as_rare_as_roots(every):
    model, names = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), list("012")
    rule = pw.Precondition(stats_every=every, refresh_every=every)
    turns = run(model, rule, 3 * every + 1)
    assert sorted(turns[0]) == names
    assert not any(turns[1:every])  # no new statistic, no new root
    assert all(len(step) <= 1 for step in turns[every:])
    assert all(sorted(itertools.chain(*turns[t : t + every])) == names for t in range(every, 2 * every))


def test_the_dearest_layer_chooses_first():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 20), nn.Linear(20, 2))
    turns = run(model, pw.Foof(stats_every=2, refresh_every=2, slowdown=1), 7)
    assert [sorted(step) for step in turns] == [list("0123"), [], *2 * [["3"], list("012")], ["3"]]


def test_work_is_spread_evenly():
    widths = [3, 17, 9, 12, 5, 14, 11, 8, 16, 6, 7]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    turns = run(model, pw.KFAC(stats_every=4, refresh_every=4), 8)
    cost = {str(i): (m.in_features + 1) ** 3 + m.out_features**3 for i, m in enumerate(model)}
    loads = [sum(cost[name] for name in step) for step in turns[4:]]
    assert sum(loads) == sum(cost.values())
    assert max(loads) - min(loads) <= max(cost.values())


@pytest.mark.parametrize("schedule", [(1, 3), (2, 4)])
def test_layers_with_turns_of_their_own_are_the_definition(schedule):
    """Widths fall, so that the layers take their turns from below."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    how = dict(SETTINGS["both, max"], stats_every=schedule[0], refresh_every=schedule[1])
    slow = {name: Slow(**how, phase=phase) for phase, name in enumerate("024")}
    plies: dict[str, pw.LinearCall] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = pw.Precondition(**how).attach(model, optimizer)
    with rule.observing(lambda ply, move, below: plies.update({ply.name: ply})):
        for t in range(12):
            optimizer.zero_grad()
            model(torch.randn(SIZES[t % 6], 8)).square().sum().backward()
            optimizer.step()
            for name, ply in plies.items():
                layer = model[int(name)]
                expected = slow[name].step(rows_of(layer, ply.a), delta_rows_of(layer, ply.delta))
                assert relative(grads(layer), expected) < 1e-9, (t, name)


# ---- low rank --------------------------------------------------------------------------------------


def moves(rule: pw.Rule, make, batches) -> list[Tensor]:
    torch.manual_seed(1)
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    rule.attach(layer, optimizer)
    found = []
    for x, delta in batches:
        optimizer.zero_grad()
        (layer(x) * delta).sum().backward()
        optimizer.step()
        found.append(grads(layer))
    return found


@pytest.mark.parametrize("rank", [5, 6, 40])
def test_half_the_size_is_no_low_rank(rank):
    batches = [(torch.randn(12, 10), torch.randn(12, 8)) for _ in range(4)]
    how = {"left": 0.5, "right": 0.5, "stats_every": 1, "refresh_every": 2}
    dense, low = (
        moves(pw.Precondition(rank=r, **how), lambda: nn.Linear(10, 8, bias=False), batches)
        for r in (None, rank)
    )
    assert all(torch.equal(one, two) for one, two in zip(dense, low, strict=True))
    small = moves(pw.Precondition(rank=3, **how), lambda: nn.Linear(10, 8, bias=False), batches)
    assert all(relative(one, two) > 1e-3 for one, two in zip(small, dense, strict=True))


@pytest.mark.parametrize("schedule", [(1, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("settings", ["one side", "both, max", "output, absolute", "both, sum, for ever"])
@pytest.mark.parametrize("bias", [True, False])
def test_low_rank_is_the_mean_of_all_but_the_largest(bias, settings, schedule):
    """Where three directions stand out, so that subspace iteration has nothing left to do."""
    layer = nn.Linear(11, 9, bias=bias)
    ours = torch.randn(3, 11), torch.randn(3, 9)
    how = dict(SETTINGS[settings], stats_every=schedule[0], refresh_every=schedule[1], rank=3)
    optimizer, slow = torch.optim.SGD(layer.parameters(), lr=0.0), Slow(**how)
    pw.Precondition(**how).attach(layer, optimizer)
    for t in range(12):
        n = (6, 30, 5, 4)[t % 4]  # fewer rows than outputs, and more
        x, delta = (300 * torch.randn(n, 3) @ few + 0.01 * torch.randn(n, few.shape[1]) for few in ours)
        optimizer.zero_grad()
        (layer(x) * delta).sum().backward()
        optimizer.step()
        assert relative(grads(layer), slow.step(rows_of(layer, x), delta_rows_of(layer, delta))) < 1e-7, t


def few_directions(n: int, k: int, stds: list[float]) -> Tensor:
    """Rows whose second moments are ``stds²`` in a few directions and 1 in all others, exactly."""
    white = torch.linalg.qr(torch.randn(n, k)).Q * math.sqrt(n)
    scales = torch.ones(k)
    scales[: len(stds)] = torch.tensor(stds)
    return white * scales @ torch.linalg.qr(torch.randn(k, k)).Q.T


@pytest.mark.parametrize("settings", ["one side", "root, max", "both, max", "sum, absolute"])
def test_low_rank_is_exact_for_few_directions_among_equals(settings):
    batch = few_directions(30, 11, [900.0, 300.0, 60.0]), few_directions(30, 9, [500.0, 200.0])
    how = dict(SETTINGS[settings], stats_every=1, refresh_every=2)
    dense = moves(pw.Precondition(**how), lambda: nn.Linear(11, 9, bias=False), [batch] * 5)
    low = moves(pw.Precondition(rank=4, **how), lambda: nn.Linear(11, 9, bias=False), [batch] * 5)
    assert all(relative(one, two) < 1e-9 for one, two in zip(low, dense, strict=True))


@pytest.mark.parametrize(
    ("max_size", "treatment"),
    [
        (7, "L^-0.5 G R^-0.5, every 5 steps"),
        (6, "L^-0.5 G, every 5 steps (input side larger than max_size=6)"),
        (
            3,
            "G, every 5 steps (input side larger than max_size=3) (output side larger than max_size=3)",
        ),
    ],
)
def test_a_side_that_is_too_large_is_left_as_it_is(max_size, treatment):
    layer = nn.Linear(6, 4)
    how = dict(PLAIN, stats_every=5, refresh_every=5)
    rule = pw.Precondition(**{**how, "left": 0.5, "right": 0.5}, max_size=max_size)
    rule.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.0))
    assert rule.explain().rows[0].treatment == f"Precondition: {treatment}"
    rule.detach()
    batches = [(torch.randn(9, 6), torch.randn(9, 4)) for _ in range(7)]
    slow = Slow(**{**how, "left": 0.5 * (max_size >= 4), "right": 0.5 * (max_size >= 7)})
    for (x, delta), found in zip(batches, moves(rule, lambda: nn.Linear(6, 4), batches), strict=True):
        expected = slow.step(rows_of(layer, x), delta_rows_of(layer, delta))
        assert relative(found, expected) < 1e-9
