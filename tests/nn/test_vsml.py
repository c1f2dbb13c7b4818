"""VSML against its equations LSTM by LSTM, and what sharing one rule among all weights promises."""

import io
import math

import pytest
import torch
from torch import Tensor

from plywise.nn import VSML
from plywise.nn.vsml import LayerState, estimate_gradient, meta_train


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float32)


def sequence(steps: int, sizes: tuple[int, int], episodes: int = 1, batch: int = 1) -> tuple[Tensor, Tensor]:
    labels = torch.randint(sizes[1], (steps, episodes, batch))
    return torch.randn(steps, episodes, batch, sizes[0]), torch.eye(sizes[1])[labels]


def slow(vsml: VSML, x: Tensor, y: Tensor, states: list[LayerState]) -> list[Tensor]:
    """One episode of single samples (T, in), (T, out): each LSTM by itself, one product for its gates."""
    layers = [
        {(j, k): (s.hidden[0, 0, j, k], s.cell[0, 0, j, k]) for j, k in torch.cartesian_prod(
            torch.arange(s.hidden.shape[2]), torch.arange(s.hidden.shape[3])).tolist()}
        for s in states
    ]  # fmt: skip
    shapes = [tuple(s.hidden.shape[2:4]) for s in states]
    backward = [torch.zeros(outputs, vsml.message) for _, outputs in shapes]
    error, outputs = torch.zeros(shapes[-1][1]), []
    for sample, label in zip(x, y, strict=True):
        backward[-1] = torch.zeros(shapes[-1][1], vsml.message)
        backward[-1][:, 0] = error
        forward = torch.zeros(shapes[0][0], vsml.message)
        forward[:, 0] = sample
        for index, (ins, outs) in enumerate(shapes):
            for j in range(ins):
                for k in range(outs):
                    h, c = layers[index][j, k]
                    for _ in range(vsml.ticks):
                        i, g, f, o = vsml.gates(torch.cat([forward[j], backward[index][k], h])).chunk(4)
                        c = torch.sigmoid(f + 5) * c + torch.sigmoid(i - 5) * torch.tanh(g)
                        h = torch.sigmoid(o) * torch.tanh(c)
                    layers[index][j, k] = h, c
            h = torch.stack([torch.stack([layers[index][j, k][0] for k in range(outs)]) for j in range(ins)])
            forward = vsml.up(h).mean(0)
            if index > 0:
                backward[index - 1] = vsml.down(h).mean(1)
        out = 100 * torch.tanh(forward[:, 1] / 100)
        outputs.append(out)
        error = out.softmax(0) - label
    return outputs


def test_definition():
    vsml = VSML(hidden=6, message=3)
    states = vsml.initial_state([4, 3, 2])
    x, y = sequence(5, (4, 2))
    expected = torch.stack(slow(vsml, x[:, 0, 0], y[:, 0, 0], states))
    got, _ = vsml(x, y, states)
    assert got.std() > 1e-4
    torch.testing.assert_close(got[:, 0, 0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sizes", [[2, 2], [784, 10], [20, 30, 5]])
def test_as_many_weights_for_any_network(sizes):
    vsml = VSML()
    assert sum(p.numel() for p in vsml.parameters()) == 2384
    x, y = sequence(2, (sizes[0], sizes[-1]))
    outputs, _ = vsml(x, y, vsml.initial_state(sizes))
    assert outputs.shape == (2, 1, 1, sizes[-1])


def test_inputs_have_no_order():
    """Permuted together with their rows of the state, they give the same outputs; alone, they do not."""
    vsml, order = VSML(), torch.randperm(7)
    states = vsml.initial_state([7, 4, 3])
    x, y = sequence(6, (7, 3))
    first = states[0]
    permuted = first._replace(
        hidden=first.hidden[:, :, order],
        cell=first.cell[:, :, order],
        forward_message=first.forward_message[:, :, order],
    )
    expected, _ = vsml(x, y, states)
    got, _ = vsml(x[..., order], y, [permuted, states[1]])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
    other, _ = vsml(x[..., order], y, states)
    assert (other - expected).abs().max() > 1e-8


def test_without_an_error_the_state_still_changes():
    """So it is in the authors' code: an LSTM that receives nothing goes on."""
    vsml = VSML()
    states = vsml.initial_state([3, 2])
    _, after = vsml.tick(torch.zeros(1, 1, 3), torch.zeros(1, 1, 2), states)
    assert (after[0].cell - states[0].cell).norm() > 1e-3


def test_a_label_is_seen_only_after_its_answer():
    vsml = VSML()
    states = vsml.initial_state([3, 2])
    x, y = sequence(4, (3, 2))
    before, _ = vsml(x, y, states)
    y[1] = 1 - y[1]
    after, _ = vsml(x, y, states)
    assert torch.equal(after[:2], before[:2])
    assert not torch.equal(after[2], before[2])


def test_a_sequence_in_two_parts():
    """And what was given stays as it was."""
    vsml = VSML()
    states = vsml.initial_state([3, 4, 2], episodes=2, batch=3)
    kept = [LayerState(*(t.clone() for t in s)) for s in states]
    x, y = sequence(5, (3, 2), 2, 3)
    whole, end = vsml(x, y, states)
    first, middle = vsml(x[:2], y[:2], states)
    second, other = vsml(x[2:], y[2:], middle)
    assert torch.equal(torch.cat([first, second]), whole)
    for one, two in ((end, other), (states, kept)):
        assert all(
            torch.equal(a, b) for s, t in zip(one, two, strict=True) for a, b in zip(s, t, strict=True)
        )


def test_episodes_do_not_know_of_each_other():
    vsml = VSML()
    states = vsml.initial_state([3, 2], episodes=2)
    x, y = sequence(4, (3, 2), 2)
    both, _ = vsml(x, y, states)
    alone, _ = vsml(x[:, 1:], y[:, 1:], [LayerState(*(t[1:] for t in s)) for s in states])
    torch.testing.assert_close(both[:, 1:], alone, rtol=0, atol=1e-15)


def test_a_batch_shares_half_of_what_it_learns():
    vsml = VSML()
    states = vsml.initial_state([3, 2], batch=2)
    x, y = sequence(3, (3, 2), batch=2)
    _, (after,) = vsml(x, y, states)
    _, (again,) = vsml.tick(x[0], torch.zeros(1, 2, 2), [after])
    merged = torch.cat(
        [after.cell[..., :8].mean(1, keepdim=True).expand(-1, 2, -1, -1, -1), after.cell[..., 8:]], -1
    )
    by_hand = after._replace(
        cell=merged,
        hidden=torch.cat(
            [after.hidden[..., :8].mean(1, keepdim=True).expand(-1, 2, -1, -1, -1), after.hidden[..., 8:]], -1
        ),
    )
    for k in range(2):  # each sample by itself from the merged state: nothing else is shared
        one = LayerState(*(t[:, k : k + 1] for t in by_hand))
        _, (alone,) = vsml.tick(x[0][:, k : k + 1], torch.zeros(1, 1, 2), [one])
        torch.testing.assert_close(again.cell[:, k : k + 1], alone.cell, rtol=0, atol=1e-15)
    # samples that are equal stay as one
    _, (twins,) = vsml(x[:, :, :1].expand(-1, -1, 2, -1), y[:, :, :1].expand(-1, -1, 2, -1), states)
    _, (single,) = vsml(x[:, :, :1], y[:, :, :1], [LayerState(*(t[:, :1] for t in states[0]))])
    torch.testing.assert_close(twins.cell[:, :1], single.cell, rtol=0, atol=1e-14)


def test_initial_state():
    """Half of each cell random, by the caller's generator, of deviation 1/√inputs; all else 0."""
    vsml = VSML()
    (state,) = vsml.initial_state([400, 10], episodes=2, batch=2, generator=torch.Generator().manual_seed(3))
    (same,) = vsml.initial_state([400, 10], episodes=2, batch=2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state.cell, same.cell)
    random, zeros = state.cell.chunk(2, -1)
    assert zeros.count_nonzero() == state.hidden.count_nonzero() == 0
    assert random.abs().max() <= 2 / 20
    assert 0.85 / 20 < random.std() < 0.9 / 20  # a normal cut at two deviations has 0.88 of its own
    assert torch.equal(random[:, 0], random[:, 1])
    assert not torch.equal(random[0], random[1])


def test_outputs_are_bounded():
    vsml = VSML(bound=2.0)
    torch.nn.init.constant_(vsml.up.bias, 50.0)
    x, y = sequence(2, (3, 2))
    outputs, _ = vsml(x, y, vsml.initial_state([3, 2]))
    assert 1.9 < outputs.abs().max() <= 2


def test_gradients():
    vsml = VSML(hidden=4, message=2)
    states = vsml.initial_state([2, 2, 2])
    x, y = sequence(3, (2, 2))
    names = [name for name, _ in vsml.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(vsml, given, (x, y, states))[0]

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *vsml.parameters()))


def test_state_dict():
    vsml, other = VSML(), VSML()
    file = io.BytesIO()
    torch.save(vsml.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    states = vsml.initial_state([3, 2])
    x, y = sequence(3, (3, 2))
    assert torch.equal(vsml(x, y, states)[0], other(x, y, states)[0])


def episodes(vsml: VSML, steps: int, generator: torch.Generator):
    """All of an episode's labels are one; only its errors tell which."""
    for _ in range(steps):
        y = torch.eye(2)[torch.randint(2, (1, 16, 1), generator=generator)].expand(6, -1, -1, -1)
        x = torch.randn(6, 16, 1, 2, generator=generator)
        yield x, y, vsml.initial_state([2, 2], episodes=16, generator=generator)


def test_meta_training_finds_a_rule_that_learns():
    """By chance the loss is ln 2, and nothing is known when the first sample comes."""
    vsml, generator = VSML(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(vsml.parameters(), 0.03)
    losses = meta_train(vsml, episodes(vsml, 80, generator), optimizer, clip=1.0)
    assert len(losses) == 80
    assert sum(losses[-5:]) < 0.6 * 5 * math.log(2)
    ((x, y, states),) = episodes(vsml, 1, generator)
    right = (vsml(x, y, states)[0].argmax(-1) == y.argmax(-1)).double().mean((1, 2))
    assert right[-1] > 0.9


def test_meta_training_clips():
    """A gradient of any length moves plain SGD by no more than the clip."""
    vsml, generator = VSML(), torch.Generator().manual_seed(0)
    before = [p.detach().clone() for p in vsml.parameters()]
    meta_train(vsml, episodes(vsml, 1, generator), torch.optim.SGD(vsml.parameters(), 1.0), clip=1e-3)
    moved = sum((p - q).square().sum() for p, q in zip(vsml.parameters(), before, strict=True)).sqrt().item()
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("noise", [0.5, 1e-4])
def test_an_evolution_strategy_by_its_formula(noise):
    """Episode by episode; with a small push it is the slope along it times the push, over its variance."""
    vsml, generator = VSML(hidden=4, message=2), torch.Generator().manual_seed(0)
    x, y = sequence(4, (3, 2), episodes=5, batch=2)
    states = vsml.initial_state([3, 3, 2], episodes=5, batch=2)
    weights = {name: p.detach().clone() for name, p in vsml.named_parameters()}
    loss, found = estimate_gradient(vsml, x, y, states, noise, generator)
    drawn = torch.Generator().manual_seed(0)
    pushes = {name: noise * torch.randn(5, *w.shape, generator=drawn) for name, w in weights.items()}

    def loss_of(episode: int) -> Tensor:
        one = [LayerState(*(part[episode : episode + 1] for part in layer)) for layer in states]
        part = slice(episode, episode + 1)
        outputs, _ = vsml(x[:, part], y[:, part], one)
        return -(y[:, part] * outputs.log_softmax(-1)).sum(-1).mean()

    expected = {name: torch.zeros_like(w) for name, w in weights.items()}
    ends, along = [], {name: torch.zeros_like(w) for name, w in weights.items()}
    for episode in range(5):
        both = []
        for sign in (1, -1):
            for name, parameter in vsml.named_parameters():
                parameter.data = weights[name] + sign * pushes[name][episode]
            both.append(loss_of(episode).item())
        for name, parameter in vsml.named_parameters():
            parameter.data = weights[name]
        ends += both
        gradient = torch.autograd.grad(loss_of(episode), list(vsml.parameters()))
        slope = sum((g * pushes[name][episode]).sum() for name, g in zip(weights, gradient, strict=True))
        for name, push in pushes.items():
            expected[name] += (both[0] - both[1]) / (2 * noise**2) * push[episode] / 5
            along[name] += slope / noise**2 * push[episode] / 5
    assert loss.item() == pytest.approx(sum(ends) / 10, rel=1e-12)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)
        if noise < 1e-3:
            torch.testing.assert_close(gradient, along[name], rtol=1e-4, atol=1e-7)


def test_meta_training_steps_by_the_evolution_strategy():
    vsml = VSML()
    before = {name: p.detach().clone() for name, p in vsml.named_parameters()}
    (lesson,) = episodes(vsml, 1, torch.Generator().manual_seed(0))
    loss, estimate = estimate_gradient(vsml, *lesson, 0.05, torch.Generator().manual_seed(1))
    assert sum(g.square().sum() for g in estimate.values()).sqrt() < 25  # no longer than the clip
    optimizer = torch.optim.SGD(vsml.parameters(), 0.1)
    losses = meta_train(vsml, [lesson], optimizer, noise=0.05, generator=torch.Generator().manual_seed(1))
    assert losses == [loss.item()]
    for name, parameter in vsml.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), before[name] - 0.1 * estimate[name], rtol=0, atol=1e-12
        )


def test_meta_training_stops_at_what_is_not_finite():
    vsml, generator = VSML(), torch.Generator().manual_seed(0)
    before = [p.detach().clone() for p in vsml.parameters()]
    bad = [(x * float("nan"), y, s) for x, y, s in episodes(vsml, 1, generator)]
    with pytest.raises(RuntimeError, match="non-finite"):
        meta_train(vsml, bad, torch.optim.SGD(vsml.parameters(), 1.0))
    assert all(torch.equal(p, q) for p, q in zip(vsml.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"message": 1}, "message must be at least 2, not 1"),
        ({"hidden": 0}, "hidden must be a whole number above 0"),
        ({"ticks": 1.5}, "ticks must be a whole number above 0"),
        ({"bound": 0.0}, "bound must be a finite number above 0"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        VSML(**settings)


def test_a_push_of_no_size_is_refused():
    vsml = VSML()
    with pytest.raises(ValueError, match="noise must be"):
        meta_train(vsml, [], torch.optim.SGD(vsml.parameters(), 1.0), noise=0.0)


def test_wrong_calls():
    vsml = VSML()
    with pytest.raises(ValueError, match="sizes must be of inputs and outputs"):
        vsml.initial_state([3])
    with pytest.raises(ValueError, match=r"sizes\[1\] must be a whole number above 0, not 0"):
        vsml.initial_state([3, 0])
    states = vsml.initial_state([3, 2])
    x, y = sequence(4, (3, 2))
    for inputs, labels in ((x[..., :2], y), (x, y[..., :1]), (x[:2], y), (x[:, 0], y)):
        with pytest.raises(ValueError, match="as the states are"):
            vsml(inputs, labels, states)
    with pytest.raises(ValueError, match="clip must be a finite number above 0"):
        meta_train(vsml, [], torch.optim.SGD(vsml.parameters(), 1.0), clip=0)
