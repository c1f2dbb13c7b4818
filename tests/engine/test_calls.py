"""Small models on which an engine that recognises classes of layers does the wrong thing."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from small_nets import RULES, X, grads, net, sgd
from torch import Tensor, nn

import plywise as pw

# ---- forwards that are not the plain map -----------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_added_by_hand_keeps_its_gradient(when: str) -> None:
    found = []
    for attached in (False, True):
        model = net()
        torch.manual_seed(1)
        up, down = nn.Linear(2, 8), nn.Linear(6, 2)
        layer, forward = model[0], model[0].forward
        rule = pw.Backprop()
        if attached and when == "after":
            rule.attach(model, sgd(model))
        layer.forward = lambda t, f=forward, u=up, d=down: f(t) + u(d(t))
        if attached and when == "before":
            rule.attach(model, sgd(model))
        model(X).square().sum().backward()
        found.append([*grads(model).values(), up.weight.grad, down.weight.grad])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_convolution_patched_on_the_instance() -> None:
    x, found = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1)), []
    for attached in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 4, 3, padding=1)

        def circular(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

        conv._conv_forward = circular
        if attached:
            rule = pw.Backprop().attach(conv)
        conv(x).square().sum().backward()
        found.append(list(grads(conv).values()))
    assert rule.explain().share == 1
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_weight_used_by_its_layer_and_by_hand_is_handled_in_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(self.enc(x)), self.enc.weight.t())

    torch.manual_seed(0)
    model, calls = Tied().double(), []
    rule = pw.ProxProp(tau=2.0).attach(model)
    with rule.observing(lambda call, update, below: calls.append((call, update))):
        model(X.double()).square().sum().backward()
    assert len(calls) == 2
    total = torch.zeros_like(model.enc.weight)
    with torch.no_grad():
        for call, update in calls:
            rows = call.rows(torch.float64)[0]
            system = rows.T @ rows + 0.5 * torch.eye(rows.shape[1], dtype=torch.float64)
            move = torch.linalg.solve(system, rows.T @ call.delta).T[:, : call.width]
            torch.testing.assert_close(update.weight, move)
            total += move if move.shape == total.shape else move.T
    torch.testing.assert_close(model.enc.weight.grad, total)


def test_a_weight_tied_to_a_use_that_is_not_taken_is_left_whole() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 6))
            self.mid = nn.Linear(6, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.mid(F.embedding(ids, self.table)), self.table)

    ids = torch.tensor([0, 3, 3, 1])
    torch.manual_seed(0)
    model = Tied()
    plain = copy.deepcopy(model)
    rule = pw.ProxProp().attach(model, exclude="mid")
    for _ in range(2):  # the first pass, too, in which the other use is only found
        for net_ in (model, plain):
            net_.zero_grad()
            net_(ids).square().sum().backward()
        assert torch.equal(model.table.grad, plain.table.grad)
    (row,) = [row for row in rule.explain().rows if row.name == "table"]
    assert not row.handled
    assert "'embedding'" in row.reason


# ---- double backward -------------------------------------------------------------------------------


def test_a_gradient_penalty_reaches_the_critic() -> None:
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        critic = nn.Linear(6, 1)
        if attached:
            pw.Backprop().attach(critic, sgd(critic))
        x = X.clone().requires_grad_()
        out = critic(x)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.mean() + 10 * (g.norm(dim=1) - 1).square().mean()).backward()
        found.append(critic.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0])
    assert found[0].norm() > 1


@pytest.mark.parametrize("build", [net, lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten())])
def test_second_derivatives_are_autograds_under_the_identity(build) -> None:
    torch.manual_seed(0)
    model = build().double()
    pw.Backprop().attach(model)
    x = X.double() if isinstance(model[0], nn.Linear) else X.double().unsqueeze(1)
    parameters = tuple(p.detach().clone().requires_grad_() for p in model.parameters())

    def run(*values: Tensor) -> Tensor:
        for p, value in zip(model.parameters(), values[1:], strict=True):
            p.data.copy_(value.detach())
        return model(values[0])

    assert torch.autograd.gradcheck(lambda t: run(t, *parameters), (x.clone().requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda t: run(t, *parameters), (x.clone().requires_grad_(),))


# ---- threads, pauses, odd inputs -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Backprop", "ProxProp", "NLMS"])
def test_threads_do_not_disturb_each_other(name: str) -> None:
    model, errors = net(), []
    RULES[name]().attach(model)

    def work() -> None:
        try:
            for _ in range(40):
                model(torch.randn(5, 6)).sum().backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


@pytest.mark.parametrize("name", list(RULES))
def test_paused_is_plain_autograd(name: str) -> None:
    model, plain = net(), net()
    optimizer = sgd(model)
    rule = RULES[name]().attach(model, optimizer)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with rule.paused():
        model(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert all(torch.equal(grads(model)[n], g) for n, g in grads(plain).items())
    assert torch.equal(x.grad, y.grad)
    assert all(not row.passes for row in rule.explain().rows)
    model.zero_grad()
    model(X).square().sum().backward()
    assert all(row.passes for row in rule.explain().rows)


@pytest.mark.parametrize("name", list(RULES))
def test_an_empty_batch_explains(name: str) -> None:
    model = net()
    rule = RULES[name]().attach(model, sgd(model))
    model(X[:0]).sum().backward()
    assert "100 % of" in str(rule.explain())


@pytest.mark.parametrize("name", list(RULES))
def test_complex_weights_are_left_to_the_optimizer(name: str) -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.w = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            return (torch.fft.fft(self.lift(x)) @ self.w).abs()

    model = Fourier()
    optimizer = sgd(model)
    rule = RULES[name]().attach(model, optimizer)
    before = model.w.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()
    assert not torch.equal(model.w, before)
    (row,) = [row for row in rule.explain().rows if row.name == "w"]
    assert (row.handled, row.reason) == (False, "its weight is complex")


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_inputs_are_left_to_torch(name: str, layout: str) -> None:
    model = nn.Linear(6, 3, bias=False)
    optimizer = sgd(model)
    rule = RULES[name]().attach(model, optimizer)
    x = X.to_sparse() if layout == "coo" else X.to_sparse_csr()
    (x @ model.weight.T).sum().backward() if False else F.linear(X, model.weight).sum().backward
    wanted = torch.ones(5, 3).T @ X

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner.weight.T

    rule.detach()
    wrapped = Wrapped()
    rule.attach(wrapped, optimizer)
    wrapped(x).sum().backward()
    torch.testing.assert_close(model.weight.grad, wanted)
    assert not rule.explain().rows[0].handled
    assert "sparse" in rule.explain().rows[0].reason


def test_a_layer_added_while_attached_is_handled_and_new_in_the_table() -> None:
    model = net()
    optimizer = sgd(model)
    rule = pw.ProxProp().attach(model, optimizer)
    model(X).sum().backward()
    model.append(nn.Linear(3, 2))
    assert [row.handled for row in rule.explain().rows] == [True, True, False]
    optimizer.add_param_group({"params": model[3].parameters()})
    optimizer.zero_grad()
    model(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(X).sum().backward()
    (row,) = [row for row in rule.explain().rows if row.name == "3"]
    assert row.handled
    assert row.is_new
    assert row.passes >= 1
    assert "new since attach" in str(rule.explain())


def test_a_loss_with_weights_of_its_own_is_left_alone_or_right() -> None:
    loss = getattr(nn, "LinearCrossEntropyLoss", None)
    if loss is None:
        pytest.skip("torch has no LinearCrossEntropyLoss")
    target, found = torch.tensor([0, 1, 2, 1, 0]), []
    for attached in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"body": nn.Linear(6, 4), "loss": loss(4, 3)})
        if attached:
            pw.Backprop().attach(model, sgd(model))
        model["loss"](model["body"](X), target).backward()
        found.append(grads(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)
