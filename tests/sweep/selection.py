"""Which checks run on which sample, for the quick sweep and the full one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .attaching import KINDS, RULES
from .database import Sample, list_samples, make_module
from .gradient_checks import check_as_torch
from .passes import UnusableError
from .promises import Subject, check_rule, make_subject
from .report import Report

QUICK_RULES = ("backprop", "half-speed", "proxprop", "foof")
QUICK_RULES_OF_ALL_KINDS = ("backprop", "half-speed")
QUICKLY_COPIED = ("backprop", "foof")
"""Rules whose models the quick sweep copies: one without running state, one with."""

ATTEMPTS = 12
"""So many inputs of a module are tried until plain torch has finite gradients for one."""


@dataclass(frozen=True)
class Settings:
    """What is checked of each sample.

    Attributes:
        rules: names of cases for the promises.
        kinds: what rules are asked to handle.
        promises: whether to check the promises.
        as_torch: whether to run torch's own checks under the identity.
        alone: whether to check the module without layers around it, too, under the quick sweep's rules.
        thorough: whether to copy the model under every rule, and to check second gradients by finite
            differences, too.
    """

    rules: tuple[str, ...] = tuple(RULES)
    kinds: tuple[str, ...] = KINDS
    promises: bool = True
    as_torch: bool = True
    alone: bool = True
    thorough: bool = True


def sweep_sample(sample: Sample, settings: Settings) -> Report:
    """All checks of one sample."""
    report = Report(subject=str(sample))
    for alone in (False, True) if settings.alone else (False,):
        try:
            subject = make_subject(sample, alone=alone)
        except UnusableError as reason:
            report.skip(str(reason))
            continue
        if not alone and not (subject.model.before or subject.model.after):
            report.skip("no layer can be put around an empty tensor")
            continue
        if alone and not any(True for _ in subject.model.parameters()):
            continue
        rules = [name for name in settings.rules if name in QUICK_RULES] if alone else settings.rules
        check_subject(sample, subject, replace(settings, rules=tuple(rules)), report)
    return report


def check_subject(sample: Sample, subject: Subject, settings: Settings, report: Report) -> None:
    for kinds in settings.kinds:
        if settings.promises:
            for name in settings.rules:
                copies = name in QUICKLY_COPIED or (settings.thorough and kinds == KINDS[0])
                check_rule(subject, RULES[name], kinds, report, copies=copies)
        if settings.as_torch:
            check_as_torch(sample, subject, kinds, report, thorough=settings.thorough)


def pick_quick_samples(module: str, dtype: torch.dtype) -> list[Sample]:
    """The first inputs of a module in training mode, best first."""
    return [s for s in list_samples(module, (dtype,)) if s.training][:ATTEMPTS]


def sweep_quickly(module: str) -> Report:
    """Promises in float32 and torch's checks in float64, for the first input that plain torch can run."""
    quick = Settings(alone=False, thorough=False)
    parts = [
        (replace(quick, rules=QUICK_RULES, kinds=KINDS[:1], as_torch=False), torch.float32),
        (replace(quick, kinds=KINDS[-1:], promises=False), torch.float64),
    ]
    if has_parameters(module):  # without its own, the layers around it are linear: all kinds are the default
        of_all_kinds = replace(quick, rules=QUICK_RULES_OF_ALL_KINDS, kinds=KINDS[1:], as_torch=False)
        parts.append((of_all_kinds, torch.float32))
    report = Report()
    for settings, dtype in parts:
        for sample in pick_quick_samples(module, dtype):
            part = sweep_sample(sample, settings)
            report.add(part)
            if part.held or part.problems:
                break
    return report


def has_parameters(module: str) -> bool:
    """Whether a module, as its first quick samples make it, has parameters of its own."""
    samples = pick_quick_samples(module, torch.float32)
    return any(True for sample in samples for _ in make_module(sample).parameters())


def list_all_samples(modules: list[str], dtypes: tuple[torch.dtype, ...], most: int) -> Iterator[Sample]:
    """All samples of these modules, at most ``most`` (0: no limit) for each module, dtype and mode.

    Of more, evenly spaced ones are taken: neighbours in torch's lists differ in one option.
    """
    for module in modules:
        samples = list(list_samples(module, dtypes))
        for dtype in dtypes:
            for training in (True, False):
                group = [s for s in samples if s.dtype == dtype and s.training == training]
                if most and len(group) > most:
                    group = [group[i * len(group) // most] for i in range(most)]
                yield from group
