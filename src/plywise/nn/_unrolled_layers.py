"""Torch's recurrent layers without their kernels: everything except the equation of a step."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from plywise.nn._recurrent_steps import STEPS, Recurrent, State, run_steps


class UnrolledSequence(nn.RNNBase):
    """Base class of the twins of `torch.nn.RNN`, `torch.nn.LSTM` and `torch.nn.GRU`.

    torch caches the list of weights that its kernel takes. There is no such cache here: weights are read by
    name, once in each forward. So the layer uses what replaces a weight (by a parametrization, a functional
    call or a hook), and no cached tensor prevents a ``deepcopy``.
    """

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        pass

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: no kernel wants the weights in one piece of memory."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over a batch of sequences.

        Args:
            input: (L, N, features), (N, L, features) with ``batch_first``, (L, features), or a
                `torch.nn.utils.rnn.PackedSequence`.
            hx: the state at the start, (layers · directions, N, features of the state), without N for an
                input without N; for an LSTM a pair of them. Default zeros.

        Returns:
            The outputs, laid out as ``input`` is, and the state at the end, laid out as ``hx`` is.
        """
        run = self._run_packed if isinstance(input, PackedSequence) else self._run_padded
        output, state = run(input, hx)
        return output, state if self.mode == "LSTM" else state[0]

    def _run_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, State]:
        sizes = input.batch_sizes.tolist()
        state = self._read_state(hx, input.data, (sizes[0],))
        if input.sorted_indices is not None:
            state = tuple(part.index_select(1, input.sorted_indices) for part in state)
        output, state = self._run_layers(input.data, sizes, state)
        if input.unsorted_indices is not None:
            state = tuple(part.index_select(1, input.unsorted_indices) for part in state)
        return input._replace(data=output), state

    def _run_padded(self, input: Tensor, hx: Any) -> tuple[Tensor, State]:
        if input.dim() not in (2, 3):
            raise ValueError(f"{self._get_name()}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        transpose = self.batch_first and input.dim() == 3
        by_step = input.transpose(0, 1) if transpose else input
        length, batch = len(by_step), tuple(by_step.shape[1:-1])
        state = self._read_state(hx, input, batch)
        if length == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if not batch:
            output, state = self._run_layers(input, [1] * length, tuple(part.unsqueeze(1) for part in state))
            return output, tuple(part.squeeze(1) for part in state)
        output, state = self._run_layers(by_step.flatten(0, 1), [*batch] * length, state)
        output = output.unflatten(0, (length, *batch))
        return output.transpose(0, 1) if transpose else output, state

    def _read_state(self, hx: Any, input: Tensor, batch: tuple[int, ...]) -> State:
        """Check the state at the start, or make one of zeros."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        shapes = [(count, *batch, self.proj_size or self.hidden_size)]
        if self.mode == "LSTM":
            shapes.append((count, *batch, self.hidden_size))
        state = _read_parts(hx, input, shapes)
        for part in state:
            if part.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
                raise RuntimeError(f"Input and hidden tensors differ in dtype: {input.dtype}, {part.dtype}")
        return state

    def _run_layers(self, rows: Tensor, sizes: list[int], state: State) -> tuple[Tensor, State]:
        """Run all layers over rows that lie time step by time step, ``sizes`` of them in each."""
        weights = dict(zip(self._flat_weights_names, self._flat_weights, strict=True))
        self._check_rows(rows, weights["weight_ih_l0"].dtype)
        starts = list(zip(*(part.unbind(0) for part in state), strict=True))
        ends: list[State] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0 and self.training:
                rows = F.dropout(rows, self.dropout)
            outputs = []
            for suffix in ("", "_reverse") if self.bidirectional else ("",):
                input_weight, input_bias, recurrent = _pick_weights(weights, f"l{layer}{suffix}")
                gates = F.linear(rows, input_weight, input_bias)
                # under autocast the gates have fewer bits than the start
                start = tuple(part.to(gates.dtype) for part in starts[len(ends)])
                output, end = run_steps(STEPS[self.mode], gates.split(sizes), start, recurrent, bool(suffix))
                outputs.append(output)
                ends.append(end)
            rows = torch.cat(outputs, 1) if self.bidirectional else outputs[0]
        return rows, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))

    def _check_rows(self, rows: Tensor, dtype: torch.dtype) -> None:
        if rows.dtype != dtype and not torch.is_autocast_enabled(rows.device.type):
            raise ValueError(
                f"RNN input dtype ({rows.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({rows.dtype})"
            )
        if rows.dim() != 2 or rows.shape[1] != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {rows.shape[-1]}"
            )


class UnrolledCell(nn.RNNCellBase):
    """Base class of the twins of `torch.nn.RNNCell`, `torch.nn.LSTMCell` and `torch.nn.GRUCell`."""

    @property
    def _equation(self) -> str:
        """The name in torch of the mode of a layer with this equation."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Do a step.

        Args:
            input: (N, features) or (features,).
            hx: the state before, (N, features of the state), without N for an input without N; for an LSTM
                a pair of them. Default zeros.

        Returns:
            The state after, laid out as ``hx`` is.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"{self._get_name()}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.shape[-1]} expected {self.input_size}"
            )
        if self._equation not in STEPS:
            raise RuntimeError(f"Unknown nonlinearity: {self._equation}")
        parts = 2 if self._equation == "LSTM" else 1
        state = _read_parts(hx, input, [(*input.shape[:-1], self.hidden_size)] * parts)
        if input.dim() == 1:
            state = tuple(part.unsqueeze(0) for part in state)
        gates = F.linear(torch.atleast_2d(input), self.weight_ih, self.bias_ih)
        state = STEPS[self._equation](gates, state, Recurrent(self.weight_hh, self.bias_hh))
        if input.dim() == 1:
            state = tuple(part.squeeze(0) for part in state)
        return state if self._equation == "LSTM" else state[0]


def _read_parts(hx: Any, input: Tensor, shapes: list[tuple[int, ...]]) -> State:
    """Check the parts of a state, two for an LSTM, or make them of zeros."""
    if hx is None:
        return tuple(input.new_zeros(shape) for shape in shapes)
    state = tuple(hx) if len(shapes) == 2 else (hx,)
    actual = [tuple(part.shape) for part in state]
    if actual != shapes:
        raise RuntimeError(f"Expected hidden size {shapes}, got {actual}")
    return state


def _pick_weights(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor | None, Recurrent]:
    """Pick the weights of a layer and a direction: those for its input, and those for its state."""
    recurrent = Recurrent(
        weights[f"weight_hh_{name}"], weights.get(f"bias_hh_{name}"), weights.get(f"weight_hr_{name}")
    )
    return weights[f"weight_ih_{name}"], weights.get(f"bias_ih_{name}"), recurrent
