"""RLS for recurrent layers: the recursion over batch and time, against torch's equations step by step."""

import copy

import pytest
import torch
from algebra import relative
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import plywise as pw

pytestmark = pytest.mark.usefixtures("double")


class Reader(nn.Module):
    """Two recurrent layers in both directions, and a head at the last time step."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(3, 4, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def run_by_hand(model: Reader, x: Tensor) -> dict[str, Tensor]:
    """The rows that meet each weight, over batch and time, by torch's own cells."""
    cells = {nn.RNN: nn.RNNCell, nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell}
    kind = next(kind for kind in cells if isinstance(model.rnn, kind))
    rows, inputs = {}, x.transpose(0, 1)
    for layer in range(2):
        outputs = []
        for suffix in ("", "_reverse"):
            name = f"l{layer}{suffix}"
            cell = cells[kind](inputs.shape[2], 4)
            cell.load_state_dict({k: getattr(model.rnn, f"{k}_{name}") for k in cell.state_dict()})
            h = torch.zeros(len(x), 4)
            state = (h, torch.zeros(len(x), 4)) if kind is nn.LSTM else h
            states, found = [], []
            for frame in inputs.flip(0) if suffix else inputs:
                states.append(state[0] if kind is nn.LSTM else state)
                state = cell(frame, state)
                found.append(state[0] if kind is nn.LSTM else state)
            outputs.append(torch.stack(found[::-1] if suffix else found))
            rows[f"rnn.weight_ih_{name}"] = inputs.flatten(0, 1)
            rows[f"rnn.weight_hh_{name}"] = torch.cat(states)
        inputs = torch.cat(outputs, 2)
    rows["head"] = inputs[-1]
    return {name: row.detach() for name, row in rows.items()}


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_weight_has_one_inverse_over_batch_and_time(kind):
    """D = G P / h with ū the mean of the rows of all time steps; P is corrected once a step."""
    torch.manual_seed(0)
    fused = Reader(kind)
    model = pw.nn.unroll(fused)
    rule_settings = {"forgetting": 0.999, "gain": 0.5, "ridge": 2.0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    rule = pw.RLS(**rule_settings).attach(model, optimizer)
    autocorrelation: dict[str, Tensor] = {}
    for _ in range(5):
        x, y = torch.randn(6, 7, 3) + 0.5, torch.randint(5, (6,))
        fused.load_state_dict(model.state_dict())
        fused.zero_grad()
        cross_entropy(fused(x), y).backward()
        plain = dict(fused.named_parameters())
        rows = run_by_hand(fused, x)
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        after = model.state_dict()
        for name, row in rows.items():
            weight = name if "weight" in name else f"{name}.weight"
            bias = weight.replace("weight", "bias")
            u = pad(row.mean(0), (0, 1), value=1.0)
            A = autocorrelation.get(name, 2.0 * torch.eye(len(u)))
            P = torch.linalg.inv(A)
            G = torch.cat([plain[weight].grad, plain[bias].grad[:, None]], 1)
            moved = torch.cat([before[weight] - after[weight], (before[bias] - after[bias])[:, None]], 1)
            assert relative(moved, 0.2 * G @ P / (0.999 + 0.5 * u @ P @ u)) < 1e-9, name
            autocorrelation[name] = 0.999 * A + 0.5 * torch.outer(u, u)
    assert set(rule.statistics) == set(autocorrelation)
    assert rule.explain(6).share == 1


def test_padded_time_steps_are_not_in_the_mean():
    """A packed batch has the rows of its sequences only."""
    torch.manual_seed(0)
    x, lengths = torch.randn(4, 6, 3), torch.tensor([6, 5, 2, 1])
    found = []
    for change in (0.0, 100.0):
        torch.manual_seed(1)
        model = pw.nn.unroll(nn.GRU(3, 4, batch_first=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rule = pw.RLS().attach(model, optimizer)
        padded = x.clone()
        for row, length in zip(padded, lengths, strict=True):
            row[length:] = change
        out, _ = pad_packed_sequence(model(pack_padded_sequence(padded, lengths, batch_first=True))[0])
        out.square().sum().backward()
        optimizer.step()
        u = pad(torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]).mean(0), (0, 1), value=1.0)
        inverse = rule.statistics["weight_ih_l0"]["inverse"][0]
        assert relative(inverse, torch.linalg.inv(torch.eye(4) + 0.1 * torch.outer(u, u))) < 1e-12
        found.append(inverse)
    assert torch.equal(*found)


def test_it_learns_to_count_in_fewer_steps_than_plain_descent():
    """Whether most of a sequence's signs are positive, from inputs that share an offset."""

    def train(use_rule: bool) -> float:
        torch.manual_seed(0)
        model = pw.nn.unroll(Reader(nn.LSTM))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        if use_rule:
            pw.RLS(gain=0.1).attach(model, optimizer)
        for step in range(60):
            torch.manual_seed(step)
            signs = torch.randn(32, 7, 3).sign()
            y = (signs.sum((1, 2)) > 0).long()
            loss = cross_entropy(model(signs + 3), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert train(True) < 0.7 * train(False)
