"""Attached, the model is the user's own; detached or dropped, nothing is left."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from plywise import AttachError, Rule
from plywise.testing.cases import Case
from plywise.testing.contract.attaching import attach
from plywise.testing.contract.models import (
    MODELS,
    compute_gradients,
    compute_loss,
    copy_gradients,
    have_same_bits,
    make_batch,
    make_convnet,
    make_mlp,
    train,
)


def is_hook_dict(name: str) -> bool:
    return "_hooks" in name


def list_contents(model: nn.Module) -> dict[str, object]:
    """List what the user may look at: everything in each module except torch's own hook dictionaries."""
    seen: dict[str, object] = {}
    for name, module in model.named_modules():
        seen[name, "type"] = type(module)
        for key, value in vars(module).items():
            if is_hook_dict(key):
                continue
            inner = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else value
            seen[name, key] = (id(value), inner)
    return seen


def list_hooks(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """List every hook on the modules, parameters, buffers and the optimizer."""
    found = []
    owners = [*model.modules(), *([optimizer] if optimizer is not None else [])]
    for owner in owners:
        found += [f"{type(owner).__name__}.{k}" for k, v in vars(owner).items() if is_hook_dict(k) and v]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(tensor, kind, None):
                found.append(f"{name}.{kind}")
    return found


def test_the_model_is_not_changed(rule: Rule) -> None:
    model = make_convnet()
    before, keys, metadata = list_contents(model), list(model.state_dict()), model.state_dict()._metadata
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule.attach(model, optimizer)
    train(model, optimizer, make_batch((2, 6, 6)), 2)
    assert list_contents(model) == before
    assert list(model.state_dict()) == keys
    assert model.state_dict()._metadata == metadata


def test_the_forward_is_not_changed(rule: Rule) -> None:
    for build, shape in MODELS.values():
        x, _ = make_batch(shape)
        expected = build()(x)
        model = build()
        attach(rule, model)
        output = model(x)
        assert torch.equal(output, expected)
        assert output.requires_grad
        rule.detach()


def test_detach_leaves_nothing(rule: Rule) -> None:
    model = make_convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rule.attach(model, optimizer)
    assert list_hooks(model, optimizer)
    train(model, optimizer, make_batch((2, 6, 6)), 1)
    rule.detach()
    assert list_hooks(model, optimizer) == []


def test_detached_gradients_are_autograds(rule: Rule) -> None:
    model, data = make_mlp(), make_batch()
    expected = compute_gradients(make_mlp(), data)
    attach(rule, model, warm=(6,))
    compute_gradients(model, data)
    rule.detach()
    assert have_same_bits(compute_gradients(model, data), expected)


def test_detach_between_forward_and_backward_is_safe(case: Case, rule: Rule) -> None:
    # the graph was made under the rule: it answers to the end
    model, data = make_mlp(), make_batch()
    attach(rule, model, warm=(6,))
    loss = compute_loss(model, data)
    rule.detach()
    loss.backward()
    reference = make_mlp()
    attach(case.make(), reference, warm=(6,))
    assert have_same_bits(copy_gradients(model), compute_gradients(reference, data))


def test_detach_twice_and_unattached_is_harmless(case: Case) -> None:
    rule = case.make()
    rule.detach()
    model = make_mlp()
    attach(rule, model)
    rule.detach()
    rule.detach()
    assert not any(module._forward_hooks for module in model.modules())


def test_attach_twice_is_refused(case: Case, rule: Rule) -> None:
    model = make_mlp()
    attach(rule, model)
    count = len(list_hooks(model))
    with pytest.raises(AttachError, match=r"attached already.*detach"):
        attach(rule, make_mlp())
    with pytest.raises(AttachError, match=r"Layer '0' is handled by a rule already.*exclude"):
        attach(case.make(), model)
    assert len(list_hooks(model)) == count


def test_attach_again_after_detach(case: Case, rule: Rule) -> None:
    data, fresh = make_batch(), make_mlp()
    attach(case.make(), fresh, warm=(6,))
    expected = compute_gradients(fresh, data)
    model = make_mlp()
    for _ in range(3):
        attach(rule, model, warm=(6,))
        assert have_same_bits(compute_gradients(model, data), expected)
        rule.detach()
    assert list_hooks(model) == []


def test_a_refused_attach_leaves_nothing(rule: Rule) -> None:
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stranger = torch.optim.SGD(make_mlp().parameters(), lr=0.1)
    for arguments in ({"layers": "nothing.like.it"}, {"optimizer": stranger}, {"exclude": nn.Module}):
        with pytest.raises(AttachError):
            attach(rule, model, **arguments)
    with pytest.raises(ValueError, match=r"'skip'.*optimizer"):
        rule.attach(model, on_nonfinite="skip")
    assert list_hooks(model, optimizer) == []
    rule.attach(model, optimizer)  # and the rule is still free


def test_dropping_the_model_frees_it(rule: Rule) -> None:
    model = make_convnet()
    attach(rule, model, warm=(2, 6, 6))
    compute_gradients(model, make_batch((2, 6, 6)))
    gone = [weakref.ref(module) for module in model.modules()]
    storage = StorageWeakRef(model[0].weight.untyped_storage())
    del model
    gc.collect()
    assert all(ref() is None for ref in gone)
    assert storage.expired()
    with pytest.raises(AttachError, match="gone"):
        rule.explain()


def test_dropping_the_model_frees_it_while_the_optimizer_lives(rule: Rule) -> None:
    model = make_convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule.attach(model, optimizer)
    train(model, optimizer, make_batch((2, 6, 6)), 1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    optimizer.step()  # and it still steps


def test_dropping_the_handle_does_not_detach(case: Case) -> None:
    data, kept, forgotten = make_batch(), make_mlp(), make_mlp()
    rule = attach(case.make(), kept, warm=(6,))
    handle = weakref.ref(attach(case.make(), forgotten, warm=(6,)))
    gc.collect()
    assert have_same_bits(compute_gradients(forgotten, data), compute_gradients(kept, data))
    assert handle() is not None  # it lives as long as the model
    del forgotten
    gc.collect()
    assert handle() is None
    rule.detach()


@pytest.mark.parametrize("runs_backward", [True, False])
def test_activations_are_freed_at_once(rule: Rule, runs_backward: bool) -> None:
    # without the garbage collector: a cycle through the graph would keep a batch of activations
    model = make_convnet()
    attach(rule, model, warm=(2, 6, 6))
    inputs: list[StorageWeakRef] = []
    deltas: list[StorageWeakRef] = []

    def watch(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        inputs.append(StorageWeakRef(args[0].untyped_storage()))

    def watch_gradient(gradient: torch.Tensor) -> None:
        deltas.append(StorageWeakRef(gradient.untyped_storage()))

    def watch_output(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(watch_gradient)

    for module in model:
        module.register_forward_pre_hook(watch)
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(watch_output)
    gc.collect()
    gc.disable()
    try:
        loss = compute_loss(model, make_batch((2, 6, 6)))
        if runs_backward:
            loss.backward()
        del loss
        assert len(inputs) == len(model)
        assert all(ref.expired() for ref in inputs), "the inputs of layers are still kept after backward"
        assert all(ref.expired() for ref in deltas), "gradients at outputs are still kept after backward"
    finally:
        gc.enable()


def test_users_hooks_stay_and_see_what_goes_on(rule: Rule) -> None:
    model, data = make_mlp(), make_batch()
    outputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    model[2].register_forward_hook(lambda module, args, output: outputs.append(output))
    model[2].weight.register_hook(lambda grad: gradients.append(grad.clone()))
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    attach(rule, model, warm=(6,))
    out = compute_loss(model, data)
    outputs[-1].retain_grad()
    out.backward()
    assert outputs[-1].grad is not None  # the hook got the very tensor that the next layer reads
    assert torch.equal(gradients[-1], model[2].weight.grad)
    rule.detach()
    assert len(model[2]._forward_hooks) == 1


def test_two_rules_share_a_model(case: Case, rule: Rule) -> None:
    model, data = make_mlp(), make_batch()
    other = case.make()
    attach(rule, model, layers="0")
    attach(other, model, exclude="0")
    together = compute_gradients(model, data)
    rule.detach()
    other.detach()
    assert list_hooks(model) == []
    assert together.keys() == dict(model.named_parameters()).keys()
