"""Captures calls of linear maps while an unmodified model runs, so that A and Δ reach a rule.

Hooks of the modules that own parameters enter and leave a `torch.overrides.TorchFunctionMode`. While it is
entered, `plywise.engine.readers` looks at each call of a torch function that can be linear in a parameter.
Such a call runs as the forward of a `torch.autograd.Function` (`plywise.engine.capture.captured_call`), whose
backward asks the rule for both of its answers. So

- whatever else makes a module's output (an adapter, a patched forward) keeps its own graph;
- nothing is computed twice and nothing is kept that autograd would not keep (the input, the weight);
- gradients arrive through autograd: accumulation, clipping, GradScaler and DDP see the rule's update;
- a forward leaves no trace unless a backward passes through it.
"""

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from plywise._util.uncompiled import WHY_CALLS, leave_out
from plywise.engine.capture.checkpointed import REASON, is_run_again_by_hand
from plywise.engine.capture.table import ParameterTable
from plywise.engine.maps.base import LinearMap
from plywise.engine.maps.layouts import Layout
from plywise.engine.sites import TRANSFORM, Site, is_tracer

EXPLORED = 3
"""Forwards of each outermost module, with a graph, in which uses of parameters are noted."""

_push: Callable[[TorchFunctionMode], None] = torch._C._push_on_torch_function_stack
_pop: Callable[[], TorchFunctionMode] = torch._C._pop_torch_function_stack
_grad_enabled = torch.is_grad_enabled
_tracing_state: Callable[[], Any] = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_dynamo_compiling  # in each call: the other look is two functions deep
_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_symbolic_trace = torch.fx._symbolic_trace
_is_tracing_symbolically: Callable[[], bool] = getattr(  # the second one for torch 2.9
    _symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing
)


class ModelHook:
    """A hook of plywise on a user's module, which copies of the module do not inherit.

    In its place, a copied or unpickled model has a function of the standard library that does nothing.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # deepcopy and pickle of the model go this way. The fresh handle makes the unpickling process
        # number its own hooks after ours: hook ids are per process, and flags are kept by id.
        return getattr, (nullcontext(RemovableHandle(OrderedDict())), "__exit__")

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # torch.jit.script asks for it, and would try to compile the hook
            raise AttributeError("torch.jit.script cannot take a model with a rule: call rule.detach() first")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class CaptureMode(TorchFunctionMode):
    """Sees each call of a torch function while a module of the model runs."""

    def __init__(self, readers: dict[Any, Callable[..., Any]], capture: "Capture") -> None:
        super().__init__()
        self._readers = readers
        self._capture = capture

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Hand the call to its reader, if there is one."""
        if _is_compiling():
            if not _has_parameter(args) and not (kwargs and _has_parameter(kwargs.values())):
                return func(*args, **kwargs) if kwargs else func(*args)
            _hold_back_compiler()  # until the compiled function has run
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """Make a call: captured, if its reader finds a parameter that the rule takes."""
        reader = self._readers.get(func)
        if reader is None or not _grad_enabled() or _functorch_active():
            if reader is not None and _functorch_active():
                self._capture.note_transform((*args, *kwargs.values()) if kwargs else args)
            output = func(*args, **kwargs) if kwargs else func(*args)
            if self._capture.exploring:
                self._capture.note_use(func, args, kwargs, output, captured=False)
            return output
        if forward_ad._current_level >= 0:
            return _read_dual(reader, self._capture, func, args, kwargs or {})
        if not self._capture.exploring:
            return reader(self._capture, func, args, kwargs or {})
        before = self._capture.local.captured
        output = reader(self._capture, func, args, kwargs or {})
        self._capture.note_use(func, args, kwargs, output, self._capture.local.captured > before)
        return output


def _has_parameter(values: Iterable[Any]) -> bool:
    """Return whether a parameter is among these arguments of a call, or in a list of them."""
    for value in values:
        if isinstance(value, nn.Parameter) or (isinstance(value, list | tuple) and _has_parameter(value)):
            return True
    return False


def _read_dual(
    reader: Callable[..., Any], capture: "Capture", func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Leave forward differentiation to autograd: take its tangents, and the captured call's primal values."""

    def primal(value: Any) -> Any:
        return forward_ad.unpack_dual(value).primal if isinstance(value, Tensor) else value

    tangent = forward_ad.unpack_dual(func(*args, **kwargs)).tangent
    bare = reader(
        capture, func, tuple(map(primal, args)), {name: primal(value) for name, value in kwargs.items()}
    )
    return bare if tangent is None else forward_ad.make_dual(bare, tangent)


class PlainSteps(Protocol):
    """Knows the steps in which all calls are left to autograd.

    Attributes:
        rests_on: whether this step has been found to be such a step.
    """

    rests_on: bool

    def check(self, module: nn.Module) -> bool:
        """Return whether all calls are left to autograd until the next step; ``module`` is about to run."""


class _Running(threading.local):
    """The modules that run in a thread, and how many of its calls have had a site, in the first forwards.

    ``compiler`` is what torch.compile calls on each new frame, while it is held back.
    """

    def __init__(self) -> None:
        self.outermost: nn.Module | None = None
        self.innermost: nn.Module | None = None
        self.captured = 0
        self.compiler: Any = None


class Capture:
    """Enters and leaves the mode as modules of one model run; each thread for itself.

    Args:
        readers: a reader for each torch function (`plywise.engine.readers`).
        table: finds the parameters behind tensors.
        takes: whether the rule may take a parameter.
        alters: whether the rule replaces gradients at the inputs of calls, so that a captured call must send
            them down itself.

    Attributes:
        exploring: whether uses of parameters that no reader knows are noted, in the first forwards.
        paused: whether calls are left to autograd for now.
        resting: weak reference to what decides whether calls are left to autograd until the next step.
    """

    def __init__(
        self,
        readers: dict[Any, Callable[..., Any]],
        table: ParameterTable,
        takes: Callable[[Tensor | None], bool],
        alters: bool,
    ) -> None:
        self.takes = takes
        self.alters = alters
        self._mode = CaptureMode(readers, self)
        self._table = table
        self._handles: list[RemovableHandle] = []
        self.local = _Running()
        self.exploring = True
        self.paused = False
        self.resting: weakref.ref[PlainSteps] | None = None

    def note_use(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, output: Any, captured: bool
    ) -> None:
        """Remember which function used a parameter, to explain a gradient that comes without a captured call.

        If the call has been captured, this concerns the other parameters in it.
        """
        if not isinstance(output, Tensor) or output.grad_fn is None or is_tracer(output):
            return
        if output._base is None or output._base.grad_fn is not None:  # a view of a parameter does not use it
            values = (*args, *kwargs.values()) if kwargs else args
            self._table.note_use(getattr(func, "__name__", str(func)), values, captured)

    def note_transform(self, args: tuple[Any, ...]) -> None:
        """Remember the parameters that a call under a torch.func transform uses: it is left to autograd."""
        self._table.note_use(TRANSFORM, args)

    # ---- for readers -----------------------------------------------------------------------------

    @contextmanager
    def reenter(self) -> Iterator[None]:
        """Turn the mode on again while a reader runs a function that calls others."""
        _push(self._mode)
        try:
            yield
        finally:
            self._pop_mode()

    def find_site(
        self,
        weight: Tensor,
        map_: LinearMap,
        layout: Layout,
        bias: Tensor | None,
        x: Tensor,
        by_role: bool = True,
    ) -> Site | None:
        """Return the site of a call; None if autograd must do it alone (see `ParameterTable.find_site`)."""
        site = self._table.find_site(weight, map_, layout, bias, x, self.local.innermost, by_role)
        if site is not None and is_run_again_by_hand(self._enters):
            self.leave_alone(site, REASON)
            return None
        if self.exploring and site is not None:
            self.local.captured += 1
        return site

    def _enters(self, module: nn.Module) -> bool:
        """Return whether a module enters the mode when it runs."""
        hooks = module._forward_pre_hooks.values()
        return any(isinstance(hook, EnterHook) and hook.capture is self for hook in hooks)

    def is_parameter(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter of the model or a view of one, and so no input."""
        return self._table.is_parameter(tensor)

    def leave_alone(self, site: Site, reason: str) -> None:
        """Leave a site's parameter to the optimizer from the next forward on."""
        self._table.leave(site.entry, reason)

    def install(self, modules: list[nn.Module]) -> None:
        """Register the hooks that enter the mode; those that leave it follow where they are needed."""
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(EnterHook(self), prepend=True))

    def is_resting(self, module: nn.Module) -> bool:
        """Return whether calls are left to autograd until the next step; ``module`` is about to run."""
        if self.resting is None or _tracing_state() is not None:  # what is traced is always the same
            return False
        resting = self.resting()
        return resting is not None and resting.check(module)

    def enter(self, module: nn.Module) -> None:
        """Begin a run: this module runs and no other does, unless the last run was interrupted."""
        local = self.local
        if local.outermost is module:
            if runs_twice(nn.Module._call_impl.__code__, module):  # a recursive model
                return
            self._pop_mode()  # an interrupt (Ctrl-C) has skipped the hook that leaves
        local.outermost = local.innermost = local.compiler = None
        if self.paused or _is_tracing():  # a traced copy is a plain one
            return
        self._table.begin_pass()
        self.exploring = self._find_leave_hook(module).explores()
        local.outermost = local.innermost = module
        _push(self._mode)

    def _find_leave_hook(self, module: nn.Module) -> "LeaveHook":
        """Return the hook that ends the runs of an outermost module; register it if this is the first run."""
        for hook in module._forward_hooks.values():
            if isinstance(hook, LeaveHook) and hook.capture is self:
                return hook
        made = LeaveHook(self)
        self._handles.append(module.register_forward_hook(made, always_call=True))
        return made

    def leave(self, module: nn.Module) -> None:
        """End a run: the module has returned or failed."""
        local = self.local
        if local.outermost is module:
            local.outermost = local.innermost = None
            self._pop_mode()
            if local.compiler is not None:
                _set_compiler(local.compiler)
                local.compiler = None

    def close(self) -> None:
        """Remove the hooks; take the mode off this thread's stack if an interrupt has left it there."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.local.outermost is not None:
            self.local.outermost = self.local.innermost = None
            self._pop_mode()

    def _pop_mode(self) -> None:
        others = []
        while torch._C._len_torch_function_stack():
            mode = _pop()
            if mode is self._mode:
                break
            others.append(mode)  # another rule's, entered after ours
        for mode in reversed(others):
            _push(mode)


def _is_tracing() -> bool:
    """Return whether torch.jit.trace or torch.fx.symbolic_trace runs the model."""
    return torch._C._is_tracing() or _is_tracing_symbolically()


def runs_twice(code: CodeType, owner: object) -> bool:
    """Return whether the frames of this thread show that a method of ``owner`` runs already."""
    count, frame = 0, sys._getframe()
    while frame is not None:
        count += frame.f_code is code and frame.f_locals.get("self") is owner
        frame = frame.f_back  # type: ignore[assignment]
    return count > 1


class EnterHook(ModelHook):
    """Forward pre-hook of a module with parameters in it."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Enter the mode, if this module is the outermost."""
        if _is_compiling():
            resting = None if self.capture.resting is None else self.capture.resting()
            if (resting is None or not resting.rests_on) and _enter(self.capture, module):
                compiler = _hold_back_compiler()
                if self.capture.local.outermost is module:
                    self.capture.local.compiler = compiler
            return
        _enter(self.capture, module)


class LeaveHook(ModelHook):
    """Forward hook of the same module; called after exceptions, too."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self._passes = 0

    def explores(self) -> bool:
        """Return whether uses of parameters are noted in the run that begins.

        Runs without a graph (an evaluation before training) do not count: no gradient will come of them.
        """
        self._passes += _grad_enabled()
        return self._passes <= EXPLORED and _grad_enabled()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Leave the mode, if this module is the outermost."""
        if not _is_compiling():  # what is compiled has not entered it
            self.capture.leave(module)


@leave_out(WHY_CALLS)
def _enter(capture: Capture, module: nn.Module) -> bool:
    """Enter the mode if this module is the outermost; return whether calls are captured while it runs."""
    local = capture.local
    if local.outermost is None or local.outermost is module:
        if not capture.is_resting(module):
            capture.enter(module)
    else:
        local.innermost = module
    return local.outermost is not None


# torch.compile cannot trace code that enters a mode or looks at its data. If each such call ran outside of
# the compiled graphs, nothing would be left to compile, and torch would still try. So in steps that capture
# calls the compiler is held back until the model has run; in steps at rest the graph ends once.
_set_compiler: Callable[[Any], Any] = torch._C._dynamo.eval_frame.set_eval_frame


@leave_out(WHY_CALLS, with_calls=False)  # else the compiler would be put back as this function returns
def _hold_back_compiler() -> Any:
    """Let what follows run without the compiler; return what torch.compile would call on each new frame."""
    return _set_compiler(None)
