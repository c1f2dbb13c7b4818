"""Finds the layers with running statistics that take part in a step, the same on all processes."""

from collections.abc import Mapping, Sequence

from torch.optim import Optimizer

from plywise._util.optimizers import list_parameters
from plywise.engine.processes.training_processes import TrainingProcesses
from plywise.engine.sharding import is_any_nonzero
from plywise.engine.sites import ParameterEntry
from plywise.engine.statistics.agreement import Agreement
from plywise.engine.statistics.gathered import GatheredEvidence
from plywise.engine.statistics.known_layers import KnownLayers
from plywise.engine.statistics.layer_handle import LayerHandle
from plywise.engine.statistics.saved_state import SavedState
from plywise.engine.statistics.shard_exchange import find_held


class TakingPart:
    """Finds the layers that take part in a step.

    As for torch, a parameter that has been frozen after backward still takes part: it has a gradient.

    Args:
        entries: the model's parameters.
        known: the layers.
        saved: their states.
        gathered: the evidence of the step.
        processes: the processes that share the states.
    """

    def __init__(
        self,
        entries: Sequence[ParameterEntry],
        known: KnownLayers,
        saved: SavedState,
        gathered: GatheredEvidence,
        processes: TrainingProcesses,
    ) -> None:
        self._entries = entries
        self._known = known
        self._saved = saved
        self._pending = gathered.pending
        self._processes = processes
        self._agreement = Agreement()
        self._held_biases: list[LayerHandle] = []

    def have_settled(self, entry: ParameterEntry) -> bool:
        """Return whether all processes learn a weight's layers together."""
        return self._agreement.has_settled(entry)

    def find(self, optimizer: Optimizer) -> list[LayerHandle]:
        """Return the layers that this optimizer steps, in the model's order.

        What has been learned of weights that are left to the optimizer by now is dropped, and so is the
        evidence of gradients that are not there any more.
        """
        stepped = set(map(id, list_parameters(optimizer)))
        layers = []
        for layer in self._known.list_in_order():
            if layer.gone or layer.entry.excluded:
                continue
            if layer.entry.left and not self.have_settled(layer.entry):  # else the others go on with it
                if self._saved.read(layer.name).tensors:
                    self._saved.drop(layer.name)
                continue
            weight = layer.weight
            if id(weight) in stepped and (weight.requires_grad or weight.grad is not None):
                layers.append(layer)
        self._hold_biases(layers)
        marks = {name: pending.mark for name, pending in self._pending.items()}
        held = find_held(layers, marks, self._entries, self._processes.replicas)
        for name in [name for name in self._pending if name not in held]:
            del self._pending[name]
        return layers

    def _hold_biases(self, layers: list[LayerHandle]) -> None:
        """Let biases belong to their layers as in backward, if they have been frozen or thawed since."""
        self.release_biases()
        for layer in layers:
            counts = self._saved.has_column(layer.name)
            if counts == (layer.bias is not None):
                continue
            layer.counts_bias = counts
            bias = layer.bias
            if counts and (bias is None or bias.requires_grad or bias.grad is None):  # its gradient is gone
                layer.counts_bias = None
                self._pending.pop(layer.name, None)
            else:
                self._held_biases.append(layer)

    def release_biases(self) -> None:
        """Let biases belong to their layers if they train: the step is over."""
        for layer in self._held_biases:
            layer.counts_bias = None
        self._held_biases.clear()

    def have_evidence(self, layers: list[LayerHandle]) -> bool:
        """Return whether a backward pass leads to this step; the same on all processes."""
        if self._processes.size == 1:
            part_taken = bool(self._pending) or any(layer.entry.arrived for layer in layers)
            return part_taken and any(layer.has_gradient for layer in layers)
        # a process whose rows all went elsewhere has no evidence, but the averaged gradients
        parameters = [entry.parameter() for entry in self._find_weights()]
        return is_any_nonzero([p.grad for p in parameters if p is not None and p.grad is not None])

    def find_reached(self, names: list[str], active: Mapping[str, LayerHandle]) -> list[str]:
        """Return which of these layers a backward pass has reached, on any process."""
        flags = [name in self._pending or active[name].entry.arrived for name in names]
        if names and self._processes.size > 1:
            flags = self._processes.replicas.agree(flags, active[names[0]].device)
        return [name for name, flag in zip(names, flags, strict=True) if flag]

    def find_active(self, layers: list[LayerHandle]) -> list[LayerHandle]:
        """Return the layers that are called somewhere, or have learned before; the same on all processes."""
        if self._processes.size == 1:
            return [layer for layer in layers if layer.site is not None or layer.entry.arrived]
        settled = self._agreement.settle(self._processes.replicas, layers, self._find_weights())
        return [layer for layer in layers if layer.entry in settled]

    def _find_weights(self) -> list[ParameterEntry]:
        """List the weights that may be learned, called here or not: the same list on all processes."""
        entries = [e for e in self._entries if not e.excluded and e.may_hold_weights]
        return [
            e for e in entries if (p := e.parameter()) is not None and (p.requires_grad or p.grad is not None)
        ]
