"""A step that did not happen leaves no trace."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from plywise import Rule, UncapturedLayerError
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import (
    MODELS,
    assert_close,
    compute_gradients,
    compute_loss,
    copy_gradients,
    copy_weights,
    have_same_bits,
    make_batch,
    make_mlp,
)

Data = tuple[Tensor, Tensor]


class BreakError(Exception):
    """Raised by a test."""


def raise_break(*_: object) -> None:
    raise BreakError


def exception_in_forward(model: nn.Module, data: Data) -> None:
    handle = list(model.children())[-1].register_forward_pre_hook(raise_break)
    with pytest.raises(BreakError):
        model(data[0])
    handle.remove()


def exception_in_a_users_forward_hook(model: nn.Module, data: Data) -> None:
    handle = model[0].register_forward_hook(raise_break)
    with pytest.raises(BreakError):
        model(data[0])
    handle.remove()


def exception_in_backward(model: nn.Module, data: Data) -> None:
    h = model[0](data[0])
    h.register_hook(raise_break)
    with pytest.raises(BreakError):
        model[1:](h).sum().backward()
    model.zero_grad()


def wrong_shape(model: nn.Module, data: Data) -> None:
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))


def no_grad(model: nn.Module, data: Data) -> None:
    with torch.no_grad():
        model(data[0] * 3)


def inference_mode(model: nn.Module, data: Data) -> None:
    with torch.inference_mode():
        model(data[0] * 3)


def eval_forward(model: nn.Module, data: Data) -> None:
    model.eval()
    model(data[0] * 3)
    model.train()


def discarded_graph(model: nn.Module, data: Data) -> None:
    compute_loss(model, data)
    kept = compute_loss(model, (data[0] * 3, data[1]))
    del kept


def backward_then_zero_grad(model: nn.Module, data: Data) -> None:
    compute_loss(model, (data[0] * 3, data[1])).backward()
    model.zero_grad()


def backward_then_zeroed_in_place(model: nn.Module, data: Data) -> None:
    compute_loss(model, (data[0] * 3, data[1])).backward()
    model.zero_grad(set_to_none=False)


def gradient_of_the_input_only(model: nn.Module, data: Data) -> None:
    x = data[0].clone().requires_grad_()
    torch.autograd.grad(compute_loss(model, (x, data[1])), x)


def gradient_without_accumulation(model: nn.Module, data: Data) -> None:
    torch.autograd.grad(compute_loss(model, data), list(model.parameters()))


DISTURBANCES: list[Callable[[nn.Module, Data], None]] = [
    exception_in_forward,
    exception_in_a_users_forward_hook,
    exception_in_backward,
    wrong_shape,
    no_grad,
    inference_mode,
    eval_forward,
    discarded_graph,
    backward_then_zero_grad,
    backward_then_zeroed_in_place,
    gradient_of_the_input_only,
    gradient_without_accumulation,
]


def record_history(case: Case, disturb: Callable[[nn.Module, Data], None] | None) -> list[dict[str, Tensor]]:
    """Copy the gradients of two steps and the final weights, with or without a disturbance before each."""
    build, shape = MODELS["convnet"]
    model, data, found = build(), make_batch(shape), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rule = attach(case.make(), model, optimizer, warm=shape)
    for step in range(2):
        if disturb is not None:
            before = {k: v.clone() for k, v in model.named_buffers()}
            disturb(model, make_batch(shape, seed=10 + step))
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])  # batch norm's own memory of forwards is torch's affair
        compute_loss(model, data).backward()
        found.append(copy_gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    assert not rule.health.counts
    return [*found, copy_weights(model)]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[dict[str, Tensor]]]:
    """Histories by rule, made once each."""
    return {}


@pytest.mark.one_of_family
@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
def test_what_did_not_happen_leaves_no_trace(
    case: Case,
    undisturbed: dict[str, list[dict[str, Tensor]]],
    disturb: Callable[[nn.Module, Data], None],
) -> None:
    if case.name not in undisturbed:
        undisturbed[case.name] = record_history(case, None)
    for fresh, again in zip(undisturbed[case.name], record_history(case, disturb), strict=True):
        assert have_same_bits(fresh, again)


@pytest.mark.parametrize("kind", list(MODELS))
def test_second_backward_through_a_retained_graph_doubles(rule: Rule, kind: str) -> None:
    build, shape = MODELS[kind]
    model = build()
    attach(rule, model, warm=shape)
    loss = compute_loss(model, make_batch(shape))
    loss.backward(retain_graph=True)
    once = copy_gradients(model)
    loss.backward()
    assert have_same_bits(copy_gradients(model), {name: 2 * g for name, g in once.items()})


def test_two_losses_on_one_forward(case: Case, rule: Rule) -> None:
    # the moves of a sum of losses are the sum of the moves
    if case.not_linear:
        pytest.skip(case.not_linear)
    data, together, apart = make_batch(dtype=torch.float64), make_mlp(torch.float64), make_mlp(torch.float64)
    # with optimizers, so that a cap waits for the step
    attach(rule, together, torch.optim.SGD(together.parameters(), lr=0.1), warm=(6,))
    other = attach(case.make(), apart, torch.optim.SGD(apart.parameters(), lr=0.1), warm=(6,))
    out = together(data[0])
    (out.square().mean() + out.sin().mean()).backward()
    out = apart(data[0])
    out.square().mean().backward(retain_graph=True)
    out.sin().mean().backward()
    other.detach()
    for name, g in copy_gradients(together).items():
        assert torch.allclose(g, copy_gradients(apart)[name], rtol=1e-10, atol=1e-14), name


def test_partial_backward_moves_what_it_reached(rule: Rule) -> None:
    model, data = make_mlp(), make_batch()
    attach(rule, model, warm=(6,))
    h = model[:3](data[0])
    model[3:](h.detach()).sum().backward()
    assert set(copy_gradients(model)) == {"4.weight", "4.bias"}


def test_backward_to_chosen_parameters(rule: Rule) -> None:
    model, data = make_mlp(), make_batch()
    attach(rule, model, warm=(6,))
    everything = compute_gradients(model, data)
    model.zero_grad()
    chosen = [model[2].weight, model[2].bias]
    compute_loss(model, data).backward(inputs=chosen)
    assert have_same_bits(copy_gradients(model), {name: everything[name] for name in ("2.weight", "2.bias")})


@pytest.mark.parametrize(
    "before", [gradient_without_accumulation, exception_in_backward], ids=lambda f: f.__name__
)
def test_unfinished_backward_does_not_blind_the_watch(rule: Rule, before: Callable) -> None:
    model, data = make_mlp(), make_batch()
    attach(rule, model, warm=(6,))
    before(model, data)
    with pytest.raises(UncapturedLayerError, match=r"'2\.weight'"):
        (model[2].weight.sum() * 2).backward()


def test_an_update_has_the_derivative_of_the_plain_gradient(case: Case, rule: Rule) -> None:
    # create_graph=True: the rule's value, autograd's second derivative; never a silent None
    plain, model = make_mlp(torch.float64), make_mlp(torch.float64)
    data = make_batch(dtype=torch.float64)
    attach(rule, model, warm=(6,))
    expected = compute_gradients(model, data)["0.weight"]
    seconds = []
    for net in (plain, model):
        net.zero_grad()
        (g,) = torch.autograd.grad(compute_loss(net, data), net[0].weight, create_graph=True)
        if net is model and not rule.alters_backward:  # a differentiated backward sends plain values down
            assert torch.allclose(g, expected, rtol=1e-10)
        with rule.paused():
            (second,) = torch.autograd.grad(g.sum(), net[0].weight, retain_graph=True)
        seconds.append(second)
    if case.is_backprop:
        assert torch.allclose(*seconds, rtol=1e-10)
    assert torch.isfinite(seconds[1]).all()


def test_a_penalty_on_input_gradients_is_not_lost(case: Case, rule: Rule) -> None:
    # the penalty's part of a weight's gradient is plain, the loss's part the rule's
    plain, model = make_mlp(torch.float64), make_mlp(torch.float64)
    attach(rule, model, torch.optim.SGD(model.parameters(), lr=0.1), warm=(6,))
    found = []
    for net in (plain, model):
        x = make_batch(dtype=torch.float64)[0].requires_grad_()
        out = net(x)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (0 * out.sum() + 10 * (g.norm(dim=1) - 1).square().mean()).backward()
        found.append(copy_gradients(net))
    assert found[0].keys() == found[1].keys()
    if case.is_backprop:
        assert_close(*found, 1e-10)
    assert found[1]["4.weight"].any()


def test_overwritten_tensors_are_noticed_as_in_torch(rule: Rule) -> None:
    model, data = make_mlp(), make_batch()
    attach(rule, model, warm=(6,))
    h = model[:2](data[0])
    out = model[2:](h)
    with torch.no_grad():
        h.add_(1)  # the input that layer 2 keeps
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    loss = compute_loss(model, data)
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
