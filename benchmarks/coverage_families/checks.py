"""What is checked of one family under one rule: share, plain gradients, resuming, detaching."""

import copy
import io
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode

import plywise
from coverage_families.family import Family
from plywise.errors import PlywiseError

ROUNDING = 1e-4
"""Differences below this part of a gradient's largest entry may come from another order of summation."""

EQUAL, ROUNDED, WRONG = "bit-equal", "equal to rounding", "wrong"

TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Attributes of a tensor that keep its hooks."""

Bits = dict[str, Tensor | None]


@dataclass
class Plain:
    """What a family does without any rule.

    Attributes:
        parameters: number of them.
        gradients: those of the first step, by the parameter's name; None where there is none.
        seconds: time of a forward and a backward pass, the second of two.
    """

    parameters: int
    gradients: Bits
    seconds: float


@dataclass
class Result:
    """What was found for one family under one rule.

    Attributes:
        family: its name.
        rule: its name.
        share: handled parts of the parameters after one step, 0 to 1.
        refused: the message of the PlywiseError that attach or the first two steps raised, or "".
        failed: any other error, or "".
        gradients: whether parameters left alone have the plain gradients; with Backprop, all parameters.
        worst: the parameter with the largest difference, and the difference, or "".
        unmoved: share of the parameters that are handled and yet have their plain gradient, if not zero.
            It should be 0, but for Backprop and for rules that begin later or choose layers.
        resume: whether a fresh copy takes the second step with the same bits; None if not tried.
        detach: whether nothing is left after detach and a plain step has the same bits; None if not tried.
        notes: why something of the above is not as it should be.
        left: number of parameters left alone, by the reason given.
        events: number of fallbacks and skipped steps, by what happened.
        seconds: time of all of it.
    """

    family: str
    rule: str
    share: float = 0.0
    refused: str = ""
    failed: str = ""
    gradients: str = ""
    worst: str = ""
    unmoved: float = 0.0
    resume: bool | None = None
    detach: bool | None = None
    notes: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def is_wrong(self) -> bool:
        """Say whether something is wrong that was not refused."""
        return bool(self.failed) or self.gradients == WRONG or self.resume is False or self.detach is False


def list_rules() -> tuple[str, ...]:
    """Return the names of plywise's rules."""
    from plywise.registry.find import RULES

    return RULES


def attach_rule(rule: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Attach a rule to a model with all kinds of maps that the engine knows."""
    rule.attach(model, optimizer, kinds="all")


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with a rate so small that two steps change little, and a state that can be saved."""
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def measure_plain(family: Family) -> Plain:
    """Run a family's first step twice without any rule: once for the gradients, once for the time."""
    model = family.build()
    family.loss(model).backward()
    gradients = copy_gradients(model)
    start = time.perf_counter()
    family.loss(model).backward()
    seconds = time.perf_counter() - start
    return Plain(sum(p.numel() for p in model.parameters()), gradients, seconds)


def check(family: Family, rule_name: str, plain: Plain) -> Result:
    """Check one family under one rule; whatever goes wrong is in the result."""
    result, start = Result(family.name, rule_name), time.perf_counter()
    try:
        _check_steps(family, rule_name, plain, result)
    except PlywiseError as error:
        result.refused = f"{type(error).__name__}: {error}"
    except Exception as error:
        result.failed = f"{type(error).__name__}: {error}"
    while torch._C._len_torch_function_stack():
        _pop_mode()
        result.failed = result.failed or "a torch function mode was left on"
    result.seconds = time.perf_counter() - start
    return result


def _check_steps(family: Family, rule_name: str, plain: Plain, result: Result) -> None:
    model, rule = family.build(), getattr(plywise, rule_name)()
    optimizer = make_optimizer(model)
    attach_rule(rule, model, optimizer)
    take_step(family, model, optimizer, 0)
    read_explanation(model, rule, result)
    compare_gradients(model, rule, plain, result)
    saved = save(model, optimizer)
    take_step(family, model, optimizer, 1)
    if any(not p.isfinite().all() for p in model.parameters()):
        result.failed = "weights are not finite after two steps"
    result.events = count_events(rule)
    if result.events.get("step skipped"):
        result.failed = "a step was skipped"
    result.resume = _try(check_resume, (family, rule_name, saved, model, optimizer), result)
    result.detach = _try(check_detach, (family, rule, model, optimizer), result)


def _try(checker: Any, arguments: tuple[Any, ...], result: Result) -> bool:
    """Call a checker that returns what is wrong; note that, or the error that it raises."""
    try:
        trouble = checker(*arguments)
    except Exception as error:
        trouble = f"{checker.__name__}: {type(error).__name__}: {error}"
    if trouble:
        result.notes.append(trouble)
    return not trouble


def take_step(family: Family, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Take one training step on the batch of this seed; the gradients stay."""
    optimizer.zero_grad()
    family.loss(model, seed).backward()
    optimizer.step()


# ---- what the rule handles ---------------------------------------------------------------------------


def read_explanation(model: nn.Module, rule: Any, result: Result) -> None:
    """Read the share of the parameters that a rule handles, and why the others are left alone."""
    explanation = rule.explain()
    handled = find_handled(explanation.rows)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    share = sum(size for name, size in sizes.items() if name in handled) / max(1, sum(sizes.values()))
    result.share = explanation.share
    if abs(result.share - share) > 1e-6:
        result.notes.append(f"explain: its share is {result.share:.3f}, that of its rows {share:.3f}")
    reasons = {key: row.reason for row in explanation.rows for key in row.keys}
    for name in sizes.keys() - handled:
        reason = reasons.get(name, "no row")
        result.left[reason] = result.left.get(reason, 0) + sizes[name]


def find_handled(rows: list[Any]) -> set[str]:
    """Return the names of the parameters that are handled according to these rows."""
    return {key for row in rows if row.handled for key in row.keys}


def count_events(rule: Any) -> dict[str, int]:
    """Count a rule's fallbacks and skipped steps by what happened."""
    events: Counter[str] = Counter()
    for (_, event), count in rule.health.counts.items():
        events[event] += count
    return dict(events)


# ---- gradients ---------------------------------------------------------------------------------------


def copy_gradients(model: nn.Module) -> Bits:
    """Return copies of all gradients by the parameter's name."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def compare_gradients(model: nn.Module, rule: Any, plain: Plain, result: Result) -> None:
    """Compare gradients that should be plain with those of the model without a rule.

    Those are the gradients of parameters that the rule leaves alone. Under Backprop those of handled
    parameters should be plain but for rounding.
    """
    handled = find_handled(rule.explain().rows)
    largest = max((float(g.abs().max()) for g in plain.gradients.values() if g is not None), default=0.0)
    result.gradients, worst = EQUAL, 0.0
    for name, gradient in copy_gradients(model).items():
        expected = plain.gradients[name]
        same = is_same(gradient, expected)
        if name in handled and expected is not None and expected.any():
            result.unmoved += same * expected.numel() / plain.parameters
        if same or (name in handled and result.rule != "Backprop"):
            continue
        difference = find_difference(gradient, expected, 0.01 * largest)
        if not difference < ROUNDING:
            result.gradients = WRONG
        elif name not in handled and result.gradients == EQUAL:
            result.gradients = ROUNDED
        if not difference <= worst:
            worst, result.worst = difference, f"{name}: {difference:.1e}"


def find_difference(gradient: Tensor | None, expected: Tensor | None, floor: float) -> float:
    """Return the largest difference relative to the largest expected entry, or to ``floor`` if larger."""
    if gradient is None or expected is None:
        return float("inf")
    scale = max(float(expected.abs().max()), floor)
    return float((gradient - expected).abs().max()) / scale if scale else float("inf")


# ---- resuming and detaching --------------------------------------------------------------------------


def save(model: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    """Return the states of a model and its optimizer as `torch.save` writes them."""
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    return buffer.getvalue()


def check_resume(
    family: Family, rule_name: str, saved: bytes, model: nn.Module, optimizer: torch.optim.Optimizer
) -> str:
    """Load the state after the first step into a fresh copy, take the second step, and compare."""
    fresh = family.build(seed=5)
    fresh_optimizer = make_optimizer(fresh)
    attach_rule(getattr(plywise, rule_name)(), fresh, fresh_optimizer)
    model_state, optimizer_state = torch.load(io.BytesIO(saved), weights_only=True)
    fresh.load_state_dict(model_state)
    fresh_optimizer.load_state_dict(optimizer_state)
    take_step(family, fresh, fresh_optimizer, 1)
    if not is_same(fresh.state_dict(), model.state_dict()):
        return "resume: the next step gives other weights"
    if not is_same(fresh_optimizer.state_dict(), optimizer.state_dict()):
        return "resume: the next step leaves another state"
    return ""


def check_detach(family: Family, rule: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Detach, compare a plain step with that of a model never attached, and look for what is left."""
    state = copy.deepcopy(model.state_dict())
    rule.detach()
    never = family.build(seed=5)
    never.load_state_dict(state)
    never_optimizer = make_optimizer(never)
    optimizer.state.clear()
    take_step(family, model, optimizer, 2)
    take_step(family, never, never_optimizer, 2)
    left = count_traces(model, optimizer)
    left.subtract(count_traces(never, never_optimizer))
    if any(left.values()):
        return f"detach: left behind { ({kind: count for kind, count in left.items() if count}) }"
    if not is_same(copy_gradients(model), copy_gradients(never)):
        return "detach: gradients are not those of a model never attached"
    if not is_same(model.state_dict(), never.state_dict()):
        return "detach: a step is not that of a model never attached"
    if not is_same(optimizer.state_dict(), never_optimizer.state_dict()):
        return "detach: the optimizer's state is not that of one never attached"
    return ""


def count_traces(model: nn.Module, optimizer: torch.optim.Optimizer) -> Counter[str]:
    """Count hooks of a model's modules, its parameters and its optimizer, by kind, and its attributes."""
    counts: Counter[str] = Counter()
    for owner in (*model.modules(), *model.parameters(), optimizer):
        names = (
            TENSOR_HOOKS if isinstance(owner, Tensor) else [name for name in vars(owner) if "hook" in name]
        )
        for name in names:
            hooks = getattr(owner, name)
            counts[f"{type(owner).__name__}.{name}"] += len(hooks) if hasattr(hooks, "__len__") else 0
    for module in model.modules():
        counts[f"attributes of {type(module).__name__}"] += len(vars(module))
    return counts


def is_same(one: Any, two: Any) -> bool:
    """Say whether two states are equal in every bit, whatever they are made of."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return (
            isinstance(two, dict) and one.keys() == two.keys() and all(is_same(one[k], two[k]) for k in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(is_same, one, two))
    return bool(one == two)
