"""torch's own list of modules with ready inputs (`module_db`), which every torch wheel contains.

Importing it takes about five seconds, wants the package ``expecttest`` and changes some switches of torch
and of hypothesis for the whole process. Here it is imported late, does without the package, and the
switches are set back.
"""

import re
import sys
import types
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .passes import copy_tensors, quiet, seeded

DATABASE = "torch.testing._internal.common_modules"


@dataclass(frozen=True)
class Sample:
    """One input of one module: which of torch's module inputs, in which dtype and mode."""

    module: str
    index: int = 0
    dtype: torch.dtype = torch.float32
    training: bool = True

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{self.module}[{self.index}] {str(self.dtype).removeprefix('torch.')} {mode}"


def find_names() -> list[str]:
    """The names of all modules in torch's list, read from its source without importing it."""
    text = Path(find_spec(DATABASE).origin).read_text(encoding="utf-8")
    return [f"nn.{name}" for name in re.findall(r"^    ModuleInfo\(torch\.nn\.(\w+)", text, re.MULTILINE)]


@cache
def load_infos() -> dict[str, Any]:
    """torch's `ModuleInfo` objects by name."""
    with quiet(), _keep_switches():
        if "expecttest" not in sys.modules and find_spec("expecttest") is None:
            _stand_in_for_expecttest()
        from torch.testing._internal.common_modules import module_db
    return {info.name: info for info in module_db}


def _stand_in_for_expecttest() -> None:
    """torch's test classes derive from its `TestCase`; none of them runs here."""
    module = types.ModuleType("expecttest", __doc__)
    module.TestCase = unittest.TestCase
    sys.modules["expecttest"] = module


@contextmanager
def _keep_switches() -> Iterator[None]:
    """Set back what the import changes for the whole process, so that other tests do not notice it."""
    names = ("ScriptFunction", "ScriptMethod")
    calls = {name: getattr(torch._C, name).__call__ for name in names}
    flag = "__allow_nonbracketed_mutation_flag"
    allowed = getattr(torch.backends, flag)
    profile = None
    if find_spec("hypothesis") is not None:
        from hypothesis import settings

        profile = settings.get_current_profile_name()
    with seeded(0):
        yield
    setattr(torch.backends, flag, allowed)
    for name in names:
        getattr(torch._C, name).__call__ = calls[name]
    if profile is not None:
        settings.load_profile(profile)


@cache
def load_inputs(module: str, dtype: torch.dtype, training: bool) -> list[Any]:
    """torch's `ModuleInput` objects for this module, always the same ones."""
    info = load_infos()[module]
    with seeded(11), quiet():
        return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def list_samples(module: str, dtypes: tuple[torch.dtype, ...]) -> Iterator[Sample]:
    """All samples of a module in these dtypes; in evaluation mode too where torch says that it differs."""
    info = load_infos()[module]
    for dtype in dtypes:
        if dtype in info.supported_dtypes("cpu"):
            for training in (True, False) if info.train_and_eval_differ else (True,):
                for index in range(len(load_inputs(module, dtype, training))):
                    yield Sample(module, index, dtype, training)


def make_module(sample: Sample, **changes: Any) -> nn.Module:
    """The sample's module with freshly drawn weights, always the same ones."""
    info = load_infos()[sample.module]
    construct = load_inputs(sample.module, sample.dtype, sample.training)[sample.index].constructor_input
    with seeded(12), quiet():
        module = info.module_cls(*construct.args, **{**construct.kwargs, **changes})
    return module.to(sample.dtype).train(sample.training)


def copy_arguments(sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the sample's forward, as new leaf tensors.

    A tensor that stands there several times does so in the copy: attention treats that case differently.
    """
    forward = load_inputs(sample.module, sample.dtype, sample.training)[sample.index].forward_input
    return copy_tensors((forward.args, forward.kwargs))


def find_reason_to_skip(sample: Sample, test: str) -> str | None:
    """Why torch's list says that ``test`` of torch's `TestModule` is not to run (or not to pass) here."""
    parameters = {"training": sample.training, "dtype": sample.dtype}
    info = load_infos()[sample.module]
    for decorate in info.get_decorators("TestModule", test, "cpu", sample.dtype, parameters):

        def probe(self: object) -> None: ...

        decorated = decorate(probe)
        if getattr(decorated, "__unittest_skip__", False):
            return f"torch skips {test}"
        if getattr(decorated, "__unittest_expecting_failure__", False):
            return f"torch expects {test} to fail"
    return None
