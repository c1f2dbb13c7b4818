"""unroll: replace recurrent layers by ones whose matrix products plywise can see."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from plywise.errors import PlywiseError
from plywise.nn._unrolled_layers import UnrolledCell, UnrolledSequence

Model = TypeVar("Model", bound=nn.Module)


def unroll(model: Model) -> Model:
    """Copy ``model`` with every recurrent layer unrolled: its products become calls of ``F.linear``.

    `torch.nn.RNN`, `torch.nn.LSTM` and `torch.nn.GRU` run as one fused kernel, and `torch.nn.RNNCell`,
    `torch.nn.LSTMCell` and `torch.nn.GRUCell` as one kernel a step. plywise sees calls of
    `torch.nn.functional.linear`, so it leaves the weights inside of these kernels to plain backpropagation.
    The unrolled layers compute the same, with one call for the inputs of all time steps and one call a time
    step for the state. An unrolled cell makes both calls in each step.

    Outputs, gradients, initial weights, ``state_dict`` keys and forward arguments are those of the fused
    layers: bidirectional, packed, projected or unbatched. A checkpoint of either loads into the other.
    Dropout between layers is drawn alike; on a CPU the masks are the same, too.

    An unrolled layer is a subclass of what it was, for three reasons. Code that asks ``isinstance(module,
    torch.nn.LSTM)``, calls ``flatten_parameters()`` or reads ``all_weights`` goes on working. torch's own
    code keeps naming, moving, saving and printing the parameters. And only the class of a copied module
    changes, so that hooks, parametrizations, modules shared under several names and weights shared between
    modules stay what they are. What it does not keep is the list of weights that torch caches for the
    kernel: it reads the weights by name in each forward. So `torch.func.functional_call` and ``deepcopy``
    work at any time, and ``flatten_parameters()`` does nothing.

    What it costs: on one thread of a CPU, forward and backward of an LSTM take 3.4 times as long as fused for
    20 steps of a batch of 16 with 32 hidden features, 1.9 times for 50 steps of 32 with 128, and 1.2 times
    for 100 steps of 32 with 256; of the other layers and the cells 1.0 to 1.2 times. An LSTM keeps less
    than half as much memory for backward, the others about as much. On a GPU each operation of each step is a
    kernel to launch, which costs more; that was not measured.

    Args:
        model: a model, or a recurrent layer itself. It stays as it is. What is not recurrent is copied
            unchanged, and so is a layer that is unrolled already. A subclass of a recurrent layer is
            unrolled as far as its forward calls ``super().forward``. A weight under a parametrization (a
            weight norm) keeps it; plywise leaves such a weight to plain backpropagation.

    Returns:
        The copy, of the class of ``model`` or a subclass of it. Its parameters are new tensors: make the
        optimizer, wrap the model for several devices and compile it afterwards. `torch.compile` keeps a
        recurrent layer, fused or unrolled, outside of its graphs unless ``torch._dynamo.config.allow_rnn``
            is set.

    Raises:
        PlywiseError: a recurrent layer is quantised, or its forward was replaced on the module itself; or a
            module, recurrent or not, is compiled by `torch.jit`. The message names the module.
        TypeError: ``model`` is not a module.

    Example:
        >>> import torch
        >>> import plywise as pw
        >>> lstm = torch.nn.LSTM(3, 5, num_layers=2, bidirectional=True)
        >>> unrolled = pw.nn.unroll(lstm)
        >>> unrolled
        UnrolledLSTM(3, 5, num_layers=2, bidirectional=True)
        >>> x = torch.randn(7, 4, 3)
        >>> torch.allclose(lstm(x)[0], unrolled(x)[0], atol=1e-6)
        True
        >>> unrolled.load_state_dict(lstm.state_dict())
        <All keys matched successfully>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unroll: model must be a torch.nn.Module, not {type(model).__name__}.")
    for name, module in model.named_modules():
        _require_plain(name, module)
    twin = _copy_model(model)
    for module in twin.modules():
        _unroll_module(module)
    return twin


class UnrolledRNN(UnrolledSequence, nn.RNN):
    """`torch.nn.RNN` with every product a call of ``F.linear``; see `unroll`."""


class UnrolledLSTM(UnrolledSequence, nn.LSTM):
    """`torch.nn.LSTM` with every product a call of ``F.linear``; see `unroll`."""


class UnrolledGRU(UnrolledSequence, nn.GRU):
    """`torch.nn.GRU` with every product a call of ``F.linear``; see `unroll`."""


class UnrolledRNNCell(UnrolledCell, nn.RNNCell):
    """`torch.nn.RNNCell` with both products a call of ``F.linear``; see `unroll`."""

    @property
    def _equation(self) -> str:
        return f"RNN_{self.nonlinearity.upper()}"


class UnrolledLSTMCell(UnrolledCell, nn.LSTMCell):
    """`torch.nn.LSTMCell` with both products a call of ``F.linear``; see `unroll`."""

    _equation = "LSTM"


class UnrolledGRUCell(UnrolledCell, nn.GRUCell):
    """`torch.nn.GRUCell` with both products a call of ``F.linear``; see `unroll`."""

    _equation = "GRU"


_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: UnrolledRNN,
    nn.LSTM: UnrolledLSTM,
    nn.GRU: UnrolledGRU,
    nn.RNNCell: UnrolledRNNCell,
    nn.LSTMCell: UnrolledLSTMCell,
    nn.GRUCell: UnrolledGRUCell,
}
_ALL_TWINS = dict(_TWINS)
"""The same with the classes of users: two modules of a class then have twins of the same class."""

_NAMES = {fused.__name__ for fused in _TWINS}


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, tuple(_TWINS)) and not isinstance(module, UnrolledSequence | UnrolledCell)


def _require_plain(name: str, module: nn.Module) -> None:
    """Refuse a module that cannot be unrolled, or not be copied."""
    if isinstance(module, torch.jit.ScriptModule):
        problem = (
            "compiled by torch.jit: its kernels are fixed, and gradients of a copy of it would go to the "
            "original. Unroll the model before you compile it."
        )
    elif type(module).__module__.startswith("torch.ao.nn.quantized.") and type(module).__name__ in _NAMES:
        problem = "quantised: it has no weights to train. Unroll the model before you quantise it."
    elif _is_fused(module) and "forward" in vars(module):
        problem = (
            "replaced in its forward on the module itself (accelerate's hooks do so), and what replaces it "
            "may call the fused kernel. Unroll the model before the forward is replaced."
        )
    else:
        return
    where = f"module {name!r}" if name else "the model itself"
    raise PlywiseError(f"unroll: {where}, a {type(module).__name__}, is {problem}")


def _copy_model(model: Model) -> Model:
    """Copy deeply, though a module may hold a tensor that is computed from its parameters."""
    memo: dict[int, Any] = {}
    lists = []  # torch may replace these while it copies, and an id is unique only while its object lives
    for module in model.modules():
        for attribute in vars(module).values():
            if isinstance(attribute, Tensor) and not attribute.is_leaf:
                memo[id(attribute)] = attribute.detach().clone()
        if "_flat_weights" in vars(module):
            lists.append(module._flat_weights)
            memo[id(module._flat_weights)] = []
    return copy.deepcopy(model, memo)


def _unroll_module(module: nn.Module) -> None:
    """Turn a fused layer into its twin by changing its class."""
    if not _is_fused(module):
        return
    vars(module).pop("_flat_weights", None)  # the kernel's list
    vars(module).pop("_compiled_call_impl", None)  # it calls the module that was copied
    fused = type(module)
    if not parametrize.is_parametrized(module):
        module.__class__ = _find_twin(fused)
        return
    # torch gives a parametrized module a class of its own, which holds the weights as properties
    twin = _find_twin(fused.__bases__[0])
    content = {name: value for name, value in vars(fused).items() if name not in ("__slotnames__", "__doc__")}
    module.__class__ = type(f"Parametrized{twin.__name__}", (twin,), content)


def _find_twin(fused: type[nn.Module]) -> type[nn.Module]:
    """Find the unrolled class of a recurrent class; make it, once, for a subclass of the user's."""
    if fused not in _ALL_TWINS:
        twin = next(_TWINS[base] for base in fused.__mro__ if base in _TWINS)
        content = {"__module__": fused.__module__, "__doc__": fused.__doc__, "__reduce_ex__": _reduce}
        _ALL_TWINS[fused] = type(f"Unrolled{fused.__name__}", (fused, twin), content)
    return _ALL_TWINS[fused]


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle a twin made here by the class that it was made from, since no module has its class."""
    return _make_empty, (type(module).__bases__[0],), module.__getstate__()


def _make_empty(fused: type[nn.Module]) -> nn.Module:
    twin = _find_twin(fused)
    return twin.__new__(twin)
