"""What torch's own tests check of each module, here with `plywise.Backprop` attached.

torch's `TestModule` (test/test_modules.py) is not in the wheel; these are its checks for the CPU, written
again: each compares the model under the rule with the same model in plain torch, and is skipped where plain
torch does not pass or where torch's list says that it is not to run.
"""

import copy
import inspect
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from plywise import Backprop, PlywiseError, Rule

from .attaching import HalfSpeed, attach_rule, find_handled
from .database import Sample, load_inputs, make_module
from .passes import Pass, UnusableError, copy_tensors, find_difference, is_finite, quiet, run_pass, seeded
from .promises import Subject, find_any_difference, halve, same_outputs
from .report import find_unreadable

OTHER = {torch.float32: torch.float64, torch.float64: torch.float32}


@contextmanager
def attached(model: nn.Module, kinds: str, rule: Rule | None = None) -> Iterator[Rule]:
    """The identity, or another rule, on ``model`` for a while."""
    rule = Backprop() if rule is None else rule
    attach_rule(rule, model, kinds, on_nonfinite="propagate")
    try:
        yield rule
    finally:
        rule.detach()


def compare_with_plain(run: Callable[[nn.Module], Pass], model: nn.Module, kinds: str) -> str | None:
    """How ``run`` differs under the identity from plain torch; raise `UnusableError` if that fails."""
    plain = run_plainly(run, model)
    with attached(model, kinds) as rule:
        return judge(run(model), plain, rule, model)


def run_plainly(run: Callable[[nn.Module], Pass], model: nn.Module) -> Pass:
    try:
        with quiet():
            plain = run(model)
    except Exception as error:
        raise UnusableError(f"plain torch raises {type(error).__name__}") from error
    if not is_finite(plain):
        raise UnusableError("plain gradients are not finite")
    return plain


def judge(got: Pass, plain: Pass, rule: Rule, model: nn.Module) -> str | None:
    """How a pass under the rule differs from what it should be, in gradients, outputs or their layout."""
    handled = find_handled(rule, model)
    wanted = halve(plain, handled) if isinstance(rule, HalfSpeed) else plain
    difference = find_difference(got, wanted, handled | got.inputs.keys())
    if difference or same_outputs(got, plain):
        strides = [(a.stride(), b.stride()) for a, b in zip(got.outputs, plain.outputs, strict=True)]
        return difference or next((f"strides {a}, plain {b}" for a, b in strides if a != b), None)
    return "outputs differ"


# ---- the checks, each called with a sample, the subject made of it, and the kinds to handle ----------------


def check_forward(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """The module inside, called by itself: against torch's reference, and plain autograd."""
    given = load_inputs(sample.module, sample.dtype, sample.training)[sample.index]
    inner = subject.model.inner
    problem = compare_with_plain(subject.run, copy.deepcopy(subject.model), kinds)
    if problem or given.reference_fn is None:
        return problem
    model = copy.deepcopy(subject.model)
    args, kwargs = copy_tensors((subject.args, subject.kwargs))
    try:
        with quiet(), seeded(14):
            want = given.reference_fn(copy.deepcopy(inner), *args, **kwargs)
            assert_close(copy.deepcopy(inner)(*args, **kwargs), want)
    except Exception as error:
        raise UnusableError("plain torch does not agree with its reference") from error
    with attached(model, kinds), quiet(), seeded(14):
        assert_close(model.inner(*args, **kwargs), want)
    return None


def check_factory_kwargs(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """Made in another dtype by ``dtype=`` and ``device=``."""
    if "dtype" not in inspect.signature(type(subject.model.inner)).parameters:
        raise UnusableError("the module takes no dtype")
    other = OTHER[sample.dtype]
    model = copy.deepcopy(subject.model)
    try:
        model.inner = make_module(sample, dtype=other, device="cpu").train(sample.training)
    except Exception as error:
        raise UnusableError(f"plain torch raises {type(error).__name__}") from error
    return compare_with_plain(partial(run_in, subject, other), model.to(other), kinds)


def run_in(subject: Subject, dtype: torch.dtype, model: nn.Module) -> Pass:
    """A pass with the arguments in another dtype."""
    return run_pass(model, *copy_tensors((subject.args, subject.kwargs), partial(cast, dtype=dtype)))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()


def check_to(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """Moved to another dtype after attaching: the rule still acts."""
    return find_fault_of_moving(OTHER[sample.dtype], subject, kinds)


def find_fault_of_moving(dtype: torch.dtype, subject: Subject, kinds: str) -> str | None:
    """A step, a move to another dtype and a step, under the identity and under a rule that shows."""

    def run(model: nn.Module) -> Pass:
        subject.run(model)
        model.zero_grad()
        return run_in(subject, dtype, model.to(dtype))

    plain = run_plainly(run, copy.deepcopy(subject.model))
    for rule in (Backprop(), HalfSpeed()):
        model = copy.deepcopy(subject.model)
        with attached(model, kinds, rule):
            problem = judge(run(model), plain, rule, model)
            if problem:
                return f"{type(rule).__name__}: {problem}"
    return None


def check_to_empty(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """Attached on the meta device, then made on the CPU: the rule still acts, or says that it cannot."""
    state = subject.model.state_dict()

    def fill(model: nn.Module) -> nn.Module:
        model.to_empty(device="cpu").load_state_dict(state)
        return model

    plain = run_plainly(lambda model: subject.run(fill(model.to("meta"))), copy.deepcopy(subject.model))
    if find_any_difference(plain, subject.plain):
        raise UnusableError("plain torch keeps something outside of the state dict")
    for rule in (Backprop(), HalfSpeed()):
        model = copy.deepcopy(subject.model).to("meta")
        try:
            with attached(model, kinds, rule):
                got = subject.run(fill(model))
                problem = judge(got, plain, rule, model) if rule.explain().rows else "explain() has no rows"
        except PlywiseError as error:
            problem = find_unreadable(str(error))
        if problem:
            return f"{type(rule).__name__}: {problem}"
    return None


def check_repr(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """The text of the model is what it was."""
    model = copy.deepcopy(subject.model)
    with attached(model, kinds):
        subject.run(model)
        return None if repr(model) == repr(subject.model) else "repr() changes when a rule is attached"


def check_state_dict(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """The state dict is what it was, and loads."""
    model = copy.deepcopy(subject.model)
    with attached(model, kinds) as rule:
        subject.run(model)
        state, plain = model.state_dict(), subject.model.state_dict()
        if list(state) != list(plain):
            return f"state_dict() changes: {sorted(set(state) ^ set(plain))}"
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(plain)
        return judge(subject.run(model), subject.plain, rule, model)


def check_pickle(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """The attached model goes through a file, and comes back without the rule."""
    model = copy.deepcopy(subject.model)
    try:
        copy_by_file(model)
    except Exception as error:
        raise UnusableError("plain torch cannot save it") from error
    with attached(model, kinds, HalfSpeed()):
        subject.run(model)
        return find_any_difference(subject.run(copy_by_file(model)), subject.plain)


def copy_by_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def check_inplace(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """The module works in place on what the layer before it gives."""
    if "inplace" not in inspect.signature(type(subject.model.inner)).parameters:
        raise UnusableError("the module does not work in place")
    model = copy.deepcopy(subject.model)
    model.inner = make_module(sample, inplace=True)
    return compare_with_plain(subject.run, model, kinds)


def check_non_contiguous(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """Arguments, weights and gradients at the outputs with gaps in memory."""
    model = copy.deepcopy(subject.model)
    for parameter in model.parameters():
        parameter.data = spread(parameter.data)
    run = partial(run_pass, args=subject.args, kwargs=subject.kwargs, change=spread)
    return compare_with_plain(run, model, kinds)


def spread(tensor: Tensor) -> Tensor:
    """The same values at every second place of memory, with NaN between them."""
    gap = float("nan") if tensor.is_floating_point() else 0
    pairs = torch.stack([torch.full_like(tensor, gap), tensor], dim=-1)
    return pairs[..., 1]


def check_memory_format(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """Channels last, for tensors of four or five dimensions."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}

    def change(tensor: Tensor) -> Tensor:
        layout = formats.get(tensor.dim(), torch.contiguous_format)
        return tensor.clone(memory_format=layout)

    model = copy.deepcopy(subject.model)
    for parameter in model.parameters():
        parameter.data = change(parameter.data)
    run = partial(run_pass, args=subject.args, kwargs=subject.kwargs, change=change)
    return compare_with_plain(run, model, kinds)


def check_raising(sample: Sample, subject: Subject, kinds: str) -> str | None:
    """An error in the middle of a forward is the plain one, and leaves nothing behind."""

    def interrupt(*_: object) -> None:
        raise ZeroDivisionError("inside the module")

    model = copy.deepcopy(subject.model)
    with attached(model, kinds) as rule:
        hook = model.inner.register_forward_pre_hook(interrupt)
        try:
            subject.run(model)
        except ZeroDivisionError:
            pass
        else:
            return "the error is lost"
        hook.remove()
        return judge(subject.run(model), subject.plain, rule, model)


CHECKS: dict[str, Callable[[Sample, Subject, str], str | None]] = {
    "test_forward": check_forward,
    "test_factory_kwargs": check_factory_kwargs,
    "test_to": check_to,
    "test_to_empty": check_to_empty,
    "test_repr": check_repr,
    "test_save_load": check_state_dict,
    "test_pickle": check_pickle,
    "test_check_inplace": check_inplace,
    "test_non_contiguous_tensors": check_non_contiguous,
    "test_memory_format": check_memory_format,
    "test_raising": check_raising,
}
"""By the name of torch's test, by which torch's list skips it."""
