"""VSML: a network of tiny LSTMs with shared weights, which learns in its forward pass."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import linear
from torch.optim import Optimizer

from plywise._util.checks import require_positive, require_whole


class LayerState(NamedTuple):
    """The state of a layer of (inputs, outputs), for E episodes of batches of B.

    Attributes:
        hidden, cell: the states of its LSTMs, (E, B, inputs, outputs, hidden).
        forward_message: the input from the layer below, (E, B, inputs, message).
        backward_message: the input from the layer above, (E, B, outputs, message).
    """

    hidden: Tensor
    cell: Tensor
    forward_message: Tensor
    backward_message: Tensor


class VSML(nn.Module):
    """Variable shared meta learning: each weight of a network is a tiny LSTM, and all share their weights.

    Idea: replace each weight of a network by an LSTM that receives messages from the layers below and above,
        and let all LSTMs share their weights. The states of the LSTMs then play the role of weights, and the
        shared weights, which are trained slowly, are a learning rule. A few thousand numbers define the
        learning rule for a network of any size, whatever the order of its inputs.
    Equation: [i, g, f, o] = W [forward_j, backward_k, h_jk] + b; c ← σ(f + 5) c + σ(i - 5) tanh(g); h ← σ(o)
        tanh(c), twice a layer and sample; then the message up is the mean over inputs j of A h_jk, the
        message down the mean over outputs k of B h_jk. The input is channel 0 of the first message up. The
        gradient of the loss at the last output is channel 0 of the last message down. The output is channel 1
        of the last message up, bounded by 100 tanh(·/100).
    Use when: you study meta-learning: whether a rule can be found that learns from scratch, and whether it
        transfers to other tasks and sizes.
    Do not use when: you want to solve one task. Gradient descent does it with thousands of times less work.
    Layers: fully connected ones. Their sizes belong to the state, not to the module.
    Cost: inputs · outputs · 4h² · ticks multiplications for each layer and sample, and as many again for
        incoming messages. Backpropagation through an episode keeps all its states.
    Status: faithful to the authors' dense layer and its defaults. Not implemented: their convolutions, which
        are public only as JAX code, layer norm, labels as inputs, and the separate backward pass.
    Source: Kirsch, Schmidhuber, "Meta Learning Backpropagation And Improving It", NeurIPS, 2021
        (arXiv 2012.14905).
    Code: louiskirsch/vsml-neurips2021 (JAX).
    Results: not reproduced here: the paper's rule takes 10,001 iterations of a population of 1024 on 128
        nodes. examples/plot_vsml.py meta-trains for seconds on tiny tasks and prints the result.
    Limits: memory grows in proportion to the length of an episode. With a batch size above 1, half of the
        state is averaged over the batch before each sample, as in the authors' code. The state changes even
        if the error is zero.

    Args:
        hidden: h, the size of the state of an LSTM. Default 16. Range 8 to 64.
        message: numbers in a message, at least 2. Default 8. Range 4 to 16.
        ticks: how often a layer runs for each sample. Default 2. Range 1 to 4.
        bound: outputs stay within ± this. Default 100. Range 10 to 1000.

    Raises:
        ValueError: an argument is out of range, or a sequence does not fit its state.

    Example:
        >>> import torch
        >>> from plywise.nn import VSML
        >>> vsml = VSML()
        >>> sum(p.numel() for p in vsml.parameters())
        2384
        >>> state = vsml.initial_state([4, 3, 2])
        >>> x, y = torch.randn(10, 1, 1, 4), torch.eye(2)[torch.randint(2, (10, 1, 1))]
        >>> outputs, state = vsml(x, y, state)  # ten samples, each predicted before its label is seen
        >>> outputs.shape
        torch.Size([10, 1, 1, 2])
    """

    def __init__(self, hidden: int = 16, message: int = 8, ticks: int = 2, bound: float = 100.0) -> None:
        super().__init__()
        require_whole(self, hidden=hidden, message=message, ticks=ticks)
        require_positive(self, bound=bound)
        if message < 2:
            raise ValueError(
                f"VSML: message must be at least 2, not {message!r}: error and output need both."
            )
        self.hidden, self.message, self.ticks, self.bound = hidden, message, ticks, bound
        self.gates = nn.Linear(2 * message + hidden, 4 * hidden)
        self.up, self.down = nn.Linear(hidden, message), nn.Linear(hidden, message)
        for layer in (self.gates, self.up, self.down):
            _truncate(layer.weight, layer.in_features)
            nn.init.zeros_(layer.bias)

    def initial_state(
        self,
        sizes: Sequence[int],
        episodes: int = 1,
        batch: int = 1,
        generator: torch.Generator | None = None,
    ) -> list[LayerState]:
        """Make the state of an untrained network, whose layers map each of ``sizes`` to the next.

        Half of each cell is random with deviation ``1/√inputs``, so that the LSTMs differ. It is the same for
        a whole batch, and different for each episode.
        """
        if len(sizes) < 2:
            raise ValueError(f"VSML: sizes must be of inputs and outputs at least, not {list(sizes)!r}.")
        require_whole(self, **{f"sizes[{k}]": size for k, size in enumerate(sizes)})
        like = self.gates.weight
        states = []
        for inputs, outputs in pairwise(sizes):
            random = torch.empty(episodes, 1, inputs, outputs, self.hidden // 2)
            cell = like.new_zeros(episodes, batch, inputs, outputs, self.hidden)
            cell[..., : self.hidden // 2] = _truncate(random, inputs, generator).to(like)
            messages = [like.new_zeros(episodes, batch, size, self.message) for size in (inputs, outputs)]
            states.append(LayerState(torch.zeros_like(cell), cell, *messages))
        return states

    def tick(self, x: Tensor, error: Tensor, states: Sequence[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """Run one sample, inputs (E, B, in), through all layers, which receive the last error (E, B, out)."""
        states = [_average(state) for state in states]
        states[0] = states[0]._replace(forward_message=self._pad(x))
        states[-1] = states[-1]._replace(backward_message=self._pad(error))
        message = states[0].forward_message
        for index, state in enumerate(states):
            hidden, cell = self._run(state._replace(forward_message=message))
            states[index] = state._replace(hidden=hidden, cell=cell, forward_message=message)
            # a mean of linear maps is the linear map of the mean, (E, B, outputs or inputs, message)
            message = self.up(hidden.mean(-3))
            if index > 0:  # the layer below uses it when the next sample comes
                states[index - 1] = states[index - 1]._replace(backward_message=self.down(hidden.mean(-2)))
        return self.bound * (message[..., 1] / self.bound).tanh(), states

    def forward(
        self, inputs: Tensor, labels: Tensor, states: Sequence[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        """Run over a sequence, and learn from it.

        Args:
            inputs: (T, E, B, in): T samples of each of E episodes, B at a time.
            labels: one-hot or probabilities, (T, E, B, out). The error is that of softmax and cross entropy.
            states: a list of layer states, as `initial_state` makes it or an earlier call left it.

        Returns:
            The outputs (T, E, B, out), each made before its label was seen, and the states after.
        """
        states = list(states)
        shapes = states[0].forward_message.shape[:3], states[-1].backward_message.shape[:3]
        fit = inputs.shape[1:] == shapes[0] and labels.shape[1:] == shapes[1]
        if not fit or len(inputs) != len(labels):
            raise ValueError(
                f"VSML: inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)} must be of "
                f"{('T', *shapes[0])} and {('T', *shapes[1])}, as the states are."
            )
        error = states[-1].backward_message[..., 0]  # after an earlier part of the sequence: its last error
        outputs = []
        for x, label in zip(inputs, labels, strict=True):
            output, states = self.tick(x, error, states)
            error = output.softmax(-1) - label
            outputs.append(output)
        states[-1] = states[-1]._replace(backward_message=self._pad(error))
        return torch.stack(outputs), states

    def _run(self, state: LayerState) -> tuple[Tensor, Tensor]:
        parts = self.gates.weight.split([self.message, self.message, self.hidden], 1)
        from_below = linear(state.forward_message, parts[0], self.gates.bias).unsqueeze(-2)
        messages = from_below + linear(state.backward_message, parts[1]).unsqueeze(-3)
        hidden, cell = state.hidden, state.cell
        for _ in range(self.ticks):
            i, g, f, o = (messages + linear(hidden, parts[2])).chunk(4, -1)
            cell = (f + 5).sigmoid() * cell + (i - 5).sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        return hidden, cell

    def _pad(self, values: Tensor) -> Tensor:
        return nn.functional.pad(values.unsqueeze(-1), (0, self.message - 1))


def _truncate(tensor: Tensor, inputs: int, generator: torch.Generator | None = None) -> Tensor:
    deviation = inputs**-0.5
    return nn.init.trunc_normal_(
        tensor, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator
    )


def _average(state: LayerState) -> LayerState:
    """Replace half of the state by its mean over the batch, so that samples share what they taught."""
    if state.hidden.shape[1] == 1:
        return state
    shared, own = (torch.stack([state.hidden, state.cell])).chunk(2, -1)
    hidden, cell = torch.cat([shared.mean(2, keepdim=True).expand_as(shared), own], -1)
    return state._replace(hidden=hidden, cell=cell)


def meta_train(
    vsml: VSML,
    episodes: Iterable[tuple[Tensor, Tensor, list[LayerState]]],
    optimizer: Optimizer,
    clip: float = 25.0,
    noise: float | None = None,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Train the shared weights by backpropagation through whole episodes, or by an evolution strategy.

    Args:
        vsml: the network.
        episodes: inputs (T, E, B, in), labels (T, E, B, out) and a fresh state for each step.
        optimizer: an optimizer of ``vsml.parameters()``.
        clip: the norm to which the gradient is clipped. Default 25. Range 1 to 100.
        noise: use the authors' evolution strategy, with perturbations of this deviation (see
            `estimate_gradient`); theirs is 0.05. It keeps no states of an episode. Default None:
            backpropagation through time.
        generator: the source of the noise. Default torch's global one.

    Returns:
        The mean cross entropy over the episodes of each step.

    Raises:
        ValueError: ``clip`` or ``noise`` is out of range.
    """
    require_positive(vsml, clip=clip, **({} if noise is None else {"noise": noise}))
    losses = []
    for inputs, labels, state in episodes:
        optimizer.zero_grad()
        if noise is None:
            loss = _cross_entropy(vsml(inputs, labels, state)[0], labels)
            loss.backward()
        else:
            loss, gradients = estimate_gradient(vsml, inputs, labels, state, noise, generator)
            for name, parameter in vsml.named_parameters():
                parameter.grad = gradients[name]
        nn.utils.clip_grad_norm_(vsml.parameters(), clip, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
    return losses


def estimate_gradient(
    vsml: VSML,
    inputs: Tensor,
    labels: Tensor,
    states: list[LayerState],
    noise: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Estimate the gradient from losses at weights perturbed in both directions, for each episode.

    Each of E episodes has its own perturbation, ε ~ N(0, noise²): the estimate is the mean over episodes of
    ``(loss(θ + ε) - loss(θ - ε)) ε / (2 noise²)``, as in the authors' code.

    Args:
        vsml: the network.
        inputs: (T, E, B, in).
        labels: (T, E, B, out).
        states: the states of the E episodes.
        noise: the deviation of a perturbation.
        generator: the source of the perturbations. Default torch's global one.

    Returns:
        The mean loss over both directions, and the estimate for each parameter by its name.
    """
    weights = {name: parameter.detach() for name, parameter in vsml.named_parameters()}
    count = inputs.shape[1]
    pushes = {
        name: noise * torch.randn(count, *w.shape, generator=generator, dtype=w.dtype, device="cpu").to(w)
        for name, w in weights.items()
    }

    def compute_loss(moved: dict[str, Tensor], x: Tensor, y: Tensor, state: list[LayerState]) -> Tensor:
        whole = [LayerState(*(part.unsqueeze(0) for part in layer)) for layer in state]
        outputs, _ = functional_call(vsml, moved, (x.unsqueeze(1), y.unsqueeze(1), whole))
        return _cross_entropy(outputs, y.unsqueeze(1))

    each = vmap(compute_loss, in_dims=(0, 1, 1, 0))
    with torch.no_grad():
        plus, minus = (
            each({name: w + sign * pushes[name] for name, w in weights.items()}, inputs, labels, states)
            for sign in (1, -1)
        )
        slopes = (plus - minus) / (2 * noise**2)
        gradients = {name: torch.tensordot(slopes, push, 1) / count for name, push in pushes.items()}
    return (plus + minus).mean() / 2, gradients


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return -(labels * outputs.log_softmax(-1)).sum(-1).mean()
