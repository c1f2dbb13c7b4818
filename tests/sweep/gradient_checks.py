"""torch's `test_grad`, `test_gradgrad` and `test_errors` with `plywise.Backprop` attached."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from plywise import AttachError

from .database import Sample, find_reason_to_skip, load_infos
from .host import Host
from .passes import ROUNDING, UnusableError, copy_tensors, describe_difference, quiet, seeded
from .promises import Subject
from .report import Report
from .torch_checks import CHECKS, attached


def check_grad(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """Finite differences agree with the gradients."""
    return differentiate(sample, subject, kinds, gradcheck)


def check_gradgrad(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """Gradients of gradients are plain autograd's."""
    if not load_infos()[sample.module].supports_gradgrad:
        raise UnusableError("torch has no double backward for it")
    model = copy.deepcopy(subject.model)
    function, tensors = make_function(model, subject)
    with quiet():
        try:
            plain = find_second_gradients(function, tensors)
        except Exception as error:
            raise UnusableError(f"plain double backward raises {type(error).__name__}") from error
        with attached(model, kinds):
            second = find_second_gradients(function, tensors)
    parameters = [name for name, _ in model.named_parameters()]
    names = [f"input {i}" for i in range(len(tensors) - len(parameters))] + parameters
    largest = max((float(g.abs().max()) for g in plain if g.numel()), default=0.0)
    for name, have, want in zip(names, second, plain, strict=True):
        problem = describe_difference(have, want, ROUNDING[sample.dtype] * largest)
        if problem:
            return f"second gradient of {name}: {problem}"
    return None


def check_gradgrad_numerically(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """Finite differences of the gradients agree with the gradients of gradients."""
    if not load_infos()[sample.module].supports_gradgrad:
        raise UnusableError("torch has no double backward for it")
    return differentiate(sample, subject, kinds, gradgradcheck)


def find_second_gradients(function: Callable[..., Any], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of the gradients."""
    outputs = function(*tensors)
    generator = torch.Generator().manual_seed(16)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    weights = [draw(output) for output in outputs]
    first = torch.autograd.grad(outputs, tensors, weights, create_graph=True, materialize_grads=True)
    total = sum((gradient * draw(gradient)).sum() for gradient in first)
    return torch.autograd.grad(total, tensors, materialize_grads=True)


def differentiate(sample: Sample, subject: Subject, kinds: str, check: Callable[..., bool]) -> str | None:
    """``check`` must pass under the identity if it passes in plain torch."""
    if sample.dtype != torch.float64:
        raise UnusableError("finite differences need float64")
    tolerance = load_infos()[sample.module].gradcheck_nondet_tol
    model = copy.deepcopy(subject.model)
    function, tensors = make_function(model, subject)
    with quiet():
        try:
            check(function, tensors, nondet_tol=tolerance, fast_mode=True)
        except Exception as error:
            raise UnusableError(f"plain torch does not pass {check.__name__}") from error
        with attached(model, kinds):
            check(function, tensors, nondet_tol=tolerance, fast_mode=True)
    return None


def make_function(model: nn.Module, subject: Subject) -> tuple[Callable[..., Any], list[Tensor]]:
    """The model as a function of its arguments and parameters (which are perturbed in place)."""
    leaves, form = tree_flatten(copy_tensors((subject.args, subject.kwargs)))
    places: dict[int, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            places.setdefault(id(leaf), []).append(place)
    inputs = [leaves[first] for first, *_ in places.values()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        current = list(leaves)
        for tensor, where in zip(tensors, places.values(), strict=False):
            for place in where:
                current[place] = tensor
        args, kwargs = tree_unflatten(current, form)
        with seeded(14):
            outputs = tree_leaves(model(*args, **kwargs))
        return tuple(output for output in outputs if isinstance(output, Tensor) and output.requires_grad)

    return function, [*inputs, *model.parameters()]


def check_errors(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """Wrong arguments raise what they raise in plain torch."""
    info = load_infos()[sample.module]
    if info.module_error_inputs_func is None or sample.index:
        raise UnusableError("torch lists no wrong arguments")
    wrong = info.module_error_inputs_func(
        info, device="cpu", dtype=sample.dtype, requires_grad=True, training=sample.training
    )
    for case in wrong:
        given = case.module_error_input
        if case.error_on.name != "FORWARD_ERROR":
            continue
        construct, forward = given.constructor_input, given.forward_input
        model = Host(info.module_cls(*construct.args, **construct.kwargs), {}, {0: nn.Linear(2, 2)}, False)
        model.to(sample.dtype)
        plain = find_error(model, forward)
        with attached(model, kinds):
            got = find_error(model, forward)
        if got != plain:
            return f"raises {got}, plain torch {plain}"
    return None


def find_error(model: nn.Module, forward: Any) -> str:
    try:
        model(*forward.args, **forward.kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


ALL_CHECKS = {**CHECKS, "test_errors": check_errors, "test_grad": check_grad, "test_gradgrad": check_gradgrad}


def check_as_torch(
    sample: Sample, subject: Subject, kinds: str, report: Report, *, thorough: bool = True
) -> None:
    """All of torch's checks for one model under the identity.

    Second gradients are compared with plain autograd's; ``thorough`` adds finite differences of gradients,
    which take longest of all, and longer still where they disagree.
    """
    report.subject, report.rule = subject.label, f"identity kinds={kinds}"
    if subject.alone and not is_attachable(subject, kinds):
        return report.skip("the rule finds no layer in the module alone: torch's checks")
    for name, check in ALL_CHECKS.items():
        reason = find_reason_to_skip(sample, name)
        if reason is not None:
            report.skip(reason)
            continue
        problems = len(report.problems)
        with report.catching(False, name):
            report.record(name, check(sample, subject, kinds))
            if thorough and check is check_gradgrad and len(report.problems) == problems:
                report.record("test_gradgradcheck", check_gradgrad_numerically(sample, subject, kinds))
    return None


def is_attachable(subject: Subject, kinds: str) -> bool:
    """Whether the identity finds a layer in the model."""
    try:
        with attached(copy.deepcopy(subject.model), kinds):
            return True
    except AttachError:
        return False
