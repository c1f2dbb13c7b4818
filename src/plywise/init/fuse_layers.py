"""Layer fusion: replace two layers by the one that approximates them best on data."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from plywise._util.checks import require_kind
from plywise._util.modes import evaluating
from plywise.engine.maps.base import LinearMap
from plywise.engine.maps.convolution import read_convolution_module
from plywise.engine.maps.matmul import MATRIX_PRODUCT
from plywise.engine.selection import predict_kind
from plywise.errors import NonFiniteError, PlywiseError

Batches = Tensor | Iterable[Tensor | Sequence[Tensor]]
"""One batch of inputs, or several: tensors, or pairs (x, y) as from a DataLoader, of which y is ignored."""

Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Size (pixels from the first to the last that is read), stride and zero padding, for each axis."""

CONVOLUTIONS: dict[int, type[_ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def fuse_layers(run: nn.Sequential, inputs: Batches, *, damping: float = 1e-6) -> nn.Linear | _ConvNd:
    """Replace consecutive layers by the one layer with the smallest mean squared difference on data.

    Idea: a shallower network can start from a deeper one that is already trained. The best affine map from
        the inputs of ``second(activation(first(x)))`` to its outputs is a least-squares problem with a closed
        form, and a good start for further training.
    Equation: C = E[(x − x̄)(x − x̄)ᵀ], W = E[(y − ȳ)(x − x̄)ᵀ] (C + damping·I)⁻¹, b = ȳ − W x̄; x the input
        of the run, y its output. Convolutions: x the patches that an output position sees, a kernel of
        k₁ + (k₂ − 1)s₁, stride s₁s₂, padding p₁ + p₂s₁.
    Use when: you want to remove layers from a trained network, one pair after the other, with training in
        between.
    Do not use when: the nonlinearity between the layers matters most. Measure the accuracy of the fused
        network first.
    Layers: Linear → Linear gives a Linear on the last dimension; Conv1d/2d/3d → convolution of as many
        dimensions gives one (groups and dilations become a dense kernel); convolution → Linear gives a Linear
        on flattened inputs. Whatever lies between (activation, norm, dropout, pooling, Flatten) is fused too.
    Cost: one forward pass over the data, a d×d Gram in float64 (8d² bytes, d²/2 products a row) and its
        Cholesky factor (d³/3); d is the input size, channels · kernel for a convolution.
    Status: faithful for what the authors' code fuses (the last convolution and the dense head). The fusion of
        two convolutions, and sums over batches instead of one matrix of all data, are ours.
    Source: Ghods, Lan, Goldstein, Studer, "MSE-Optimal Neural Network Initialization via Layer Fusion",
        CISS 2020, arXiv 2001.10509.
    Code: raminaghods/FuseInit (Keras).
    Results: the paper's figures are not reproduced here, because they take 50 epochs in ten trials each. On
        digits, after fusion to 3 and to 2 layers, the accuracy is 0.933 and 0.945 before further training;
        the deeper network had ended at 0.928 and 0.947 (examples/plot_fuse_layers.py, medians of 5 seeds).
    Limits: at a padded border the fused convolution reads zeros where the second layer read outputs of the
        first one's padding, so there it is only an approximation even without a nonlinearity. Only chains of
        layers can be fused, not residual blocks. The sums are in float64, which Apple's MPS does not have.

    Args:
        run: the layers, an ``nn.Sequential``, for example a slice of a longer one (``model[2:5]``). It runs
            in eval mode, without gradients, and is not changed.
        inputs: inputs of these layers, a tensor or batches.
        damping: added to the covariance's diagonal, in units of inputs squared. 0 means plain least squares,
            with the solution of minimum norm where inputs do not determine it. Default 1e-6. Range 0 to 1.

    Returns:
        A new layer with bias, on the device and in the dtype of ``run``.

    Raises:
        ValueError: ``damping`` is negative or not finite.
        PlywiseError: the layers are not a chain that can be fused, or there is no data.
        NonFiniteError: inputs or outputs of the layers are not finite.

    Example:
        >>> import torch
        >>> from plywise.init import fuse_layers
        >>> run = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> fuse_layers(run, torch.randn(100, 8))
        Linear(in_features=8, out_features=3, bias=True)
    """
    if not (isinstance(damping, int | float) and 0 <= damping < math.inf):
        raise ValueError(f"fuse_layers: damping must be a finite number from 0 on, not {damping!r}.")
    require_kind("fuse_layers", "run", run, nn.Module, "layers (an nn.Sequential)")
    fused: nn.Linear | _ConvNd | None = None
    with torch.no_grad(), evaluating(run):
        for batch in _list_batches(inputs):
            x = batch.to(torch.float64, copy=True)  # before an in-place activation changes it
            y = run(batch)
            if fused is None:
                fused = _make_empty(run, x, y)
                sums = _Sums(fused)
            sums.add(_shape_inputs(fused, x, y), y.to(torch.float64))
        if fused is None:
            raise PlywiseError("fuse_layers: there is no input. Give a tensor with rows, or batches.")
        weight, bias = sums.solve(damping)
        fused.weight.copy_(weight.reshape(fused.weight.shape))
        if fused.bias is not None:
            fused.bias.copy_(bias)
    return fused


def fuse_slice(
    model: nn.Sequential, start: int, stop: int, inputs: Batches, *, damping: float = 1e-6
) -> nn.Sequential:
    """Return a copy of ``model`` with ``model[start:stop]`` fused to one layer (see `fuse_layers`).

    A convolution fused with a Linear becomes a Flatten and a Linear, so that the result can be fused again.

    Args:
        model: the network. It is not changed; the new one holds copies of its modules.
        start: position of the first module to fuse.
        stop: position after the last one.
        inputs: inputs of the model, a tensor or batches.
        damping: see `fuse_layers`.

    Returns:
        A new Sequential, whose modules are numbered from 0.

    Raises:
        PlywiseError: there is no such slice, or see `fuse_layers`.

    Example:
        >>> import torch
        >>> from plywise.init import fuse_slice
        >>> from torch import nn
        >>> deep = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        >>> fuse_slice(deep, 0, 4, torch.randn(100, 1, 8, 8))
        Sequential(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=64, out_features=10, bias=True)
        )
    """
    if not (isinstance(model, nn.Sequential) and 0 <= start < stop <= len(model)):
        length = f"{len(model)} modules" if isinstance(model, nn.Sequential) else f"a {type(model).__name__}"
        raise PlywiseError(
            f"fuse_slice: positions {start} to {stop} are not a slice of {length}. Give an nn.Sequential and "
            "0 ≤ start < stop ≤ its length."
        )
    parts = list(model)
    run = nn.Sequential(*parts[start:stop])
    fused = fuse_layers(run, _run_through(nn.Sequential(*parts[:start]), inputs), damping=damping)
    flat = isinstance(fused, nn.Linear) and isinstance(_find_ends(run)[0], _ConvNd)
    kept = list(copy.deepcopy(nn.ModuleList(parts[:start] + parts[stop:])))
    kept[start:start] = [nn.Flatten(), fused] if flat else [fused]
    return nn.Sequential(*kept)


class _Sums:
    """Sums over batches: AᵀA, Aᵀ1, YᵀA, Yᵀ1 and the number of rows, in float64."""

    def __init__(self, layer: nn.Linear | _ConvNd) -> None:
        self.map: LinearMap = MATRIX_PRODUCT
        self.pad: Callable[[Tensor], Tensor] = lambda x: x
        if not isinstance(layer, nn.Linear):
            self.map, self.pad = read_convolution_module(layer)
        self.layer, self.rows = layer, 0
        self.cross = torch.zeros_like(layer.weight, dtype=torch.float64)
        outputs, inputs = self.cross.flatten(1).shape
        self.inputs, self.outputs = self.cross.new_zeros(inputs), self.cross.new_zeros(outputs)
        self.gram = self.cross.new_zeros(inputs, inputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch. The patches of a convolution are unfolded only where that is cheaper."""
        if not (x.sum().isfinite() and y.sum().isfinite()):
            raise NonFiniteError("fuse_layers: inputs or outputs of the run hold a NaN or an infinity.")
        x = self.pad(x)
        self.gram += self.map.gram(x)[0]
        self.inputs += self.map.sums(x)[0]
        self.cross += self.map.weight_gradient(x, y, self.cross)
        self.outputs += self.map.bias_gradient(y)
        self.rows += self.map.row_count(y)

    def solve(self, damping: float) -> tuple[Tensor, Tensor]:
        """Compute W, as a matrix, and b."""
        mean, mean_output = self.inputs / self.rows, self.outputs / self.rows
        covariance = (self.gram.tril() + self.gram.tril(-1).T) / self.rows - mean.outer(mean)
        covariance.diagonal().add_(damping)
        joint = self.cross.flatten(1) / self.rows - mean_output.outer(mean)
        weight = _solve(covariance, joint.T).T
        return weight, mean_output - weight @ mean


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Compute ``matrix⁻¹ right``, or the solution of minimum norm if the matrix is singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    noise = len(matrix) * torch.finfo(matrix.dtype).eps
    if not failed and pivots.min() > noise * pivots.max():
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    inverse = torch.where(values > noise * values[-1].abs(), 1 / values, torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def _make_empty(run: nn.Sequential, x: Tensor, y: Tensor) -> nn.Linear | _ConvNd:
    """Make a layer with the shapes of the inputs and outputs; its weights are set later."""
    first, last = _find_ends(run)
    like: dict[str, Any] = {"device": first.weight.device, "dtype": first.weight.dtype}
    if isinstance(last, nn.Linear):
        if isinstance(first, nn.Linear) and x.shape[:-1] == y.shape[:-1]:
            return nn.Linear(x.shape[-1], y.shape[-1], **like)
        if isinstance(first, _ConvNd) and y.dim() == 2 and len(x) == len(y):
            return nn.Linear(x[0].numel(), y.shape[1], **like)
        raise _make_misfit_error(x, y, "one row of outputs for each row of inputs")
    if not isinstance(first, _ConvNd):
        raise PlywiseError("fuse_layers: a Linear followed by a convolution makes no convolution.")
    axes = len(first.kernel_size)
    if x.dim() != axes + 2:
        raise _make_misfit_error(x, y, f"batches of {axes}-dimensional images")
    reach, stride, padding = _compose(run, axes)
    sizes = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[2:], reach, stride, padding, strict=True)]
    if list(y.shape[2:]) != sizes:
        raise _make_misfit_error(
            x, y, f"images of {sizes}, those of a convolution of {reach}, stride {stride}"
        )
    return CONVOLUTIONS[axes](x.shape[1], y.shape[1], reach, stride, padding, **like)


def _make_misfit_error(x: Tensor, y: Tensor, wanted: str) -> PlywiseError:
    return PlywiseError(
        f"fuse_layers: the run makes {tuple(y.shape)} of {tuple(x.shape)}, not {wanted}. Some module in it "
        "changes the shape in a way that no single layer can."
    )


def _shape_inputs(fused: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Reshape inputs as the fused layer reads them."""
    return x.flatten(1) if isinstance(fused, nn.Linear) and x.dim() != y.dim() else x


def _find_ends(run: nn.Sequential) -> tuple[nn.Linear | _ConvNd, nn.Linear | _ConvNd]:
    layers = [part for part in _list_chain(run) if isinstance(part, nn.Linear | _ConvNd)]
    if not layers:
        raise PlywiseError("fuse_layers: there is no Linear or convolution in this run.")
    return layers[0], layers[-1]


def _list_chain(run: nn.Module) -> Iterator[nn.Module]:
    """List the modules of nested Sequentials, in order."""
    if isinstance(run, nn.Sequential):
        for part in run:
            yield from _list_chain(part)
        return
    if isinstance(run, nn.Linear | _ConvNd):
        plain = predict_kind(run, "weight")[0] in ("linear", "conv") and not getattr(run, "transposed", False)
    else:  # a module that holds several others may have parallel paths
        plain = not (any(True for _ in run.children()) and any(True for _ in run.parameters()))
    if not plain:
        raise PlywiseError(
            f"fuse_layers: a {type(run).__name__} is in the run. Only chains of Linear or of convolutions "
            "fuse, with plain modules between them: leave this one out of the slice."
        )
    yield run


def _compose(run: nn.Sequential, axes: int) -> Window:
    """Compose the windows of consecutive convolutions and poolings into one window on the input."""
    reach, stride, padding = (1,) * axes, (1,) * axes, (0,) * axes
    for part in _list_chain(run):
        if isinstance(part, _ConvNd | _MaxPoolNd | _AvgPoolNd):
            k, s, p = _read_window(part, axes)
            reach = tuple(r + (n - 1) * t for r, n, t in zip(reach, k, stride, strict=True))
            padding = tuple(q + n * t for q, n, t in zip(padding, p, stride, strict=True))
            stride = tuple(t * n for t, n in zip(stride, s, strict=True))
    return reach, stride, padding


def _read_window(part: _ConvNd | _MaxPoolNd | _AvgPoolNd, axes: int) -> Window:
    size, stride, dilation = (
        _repeat(value, axes) for value in (part.kernel_size, part.stride, getattr(part, "dilation", 1))
    )
    if isinstance(part, _ConvNd):
        around = part._reversed_padding_repeated_twice
        if part.padding_mode != "zeros" or around[::2] != around[1::2]:
            raise PlywiseError(
                f"fuse_layers: {part} pads with something else than zeros, or more on one side than on the "
                "other. Only equal zero padding is composed."
            )
        padding = tuple(reversed(around[::2]))
    else:
        padding = _repeat(part.padding, axes)
    return tuple(d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True)), stride, padding


def _repeat(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * axes


def _list_batches(inputs: Batches) -> Iterator[Tensor]:
    require_kind("fuse_layers", "inputs", inputs, Iterable, "a tensor or batches")
    for batch in [inputs] if isinstance(inputs, Tensor) else inputs:
        x: Any = batch[0] if isinstance(batch, list | tuple) and batch else batch
        require_kind("fuse_layers", "each of inputs", x, Tensor, "a tensor, or a tuple with one first")
        if len(x):
            yield x


def _run_through(before: nn.Sequential, inputs: Batches) -> Iterator[Tensor]:
    """Run batches through ``before`` in eval mode, and yield the outputs."""
    for batch in _list_batches(inputs):
        with torch.no_grad(), evaluating(before):
            x = before(batch.clone())  # because an in-place activation may come first
        yield x
