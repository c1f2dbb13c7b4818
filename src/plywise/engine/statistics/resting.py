"""Layers at rest: autograd alone makes their gradients, and the optimizer's step turns them into updates.

Between two steps that gather evidence, a rule with memory only changes gradients, which it can do at the
step. So no call is captured then, and forward and backward are plain.
"""

from collections.abc import Callable, Collection, Sized

from torch import Tensor, nn

from plywise.engine.contract import StatefulContract
from plywise.engine.processes.training_processes import TrainingProcesses
from plywise.engine.sites import ParameterEntry
from plywise.engine.statistics.known_layers import KnownLayers
from plywise.engine.statistics.layer_handle import LayerHandle
from plywise.engine.statistics.learning import Learning
from plywise.engine.statistics.saved_state import LayerState, SavedState


class RestingLayers:
    """All layers of one attachment between two steps that gather.

    Args:
        layers: the layers whose updates the step makes.
        states: their states.
        marks: for each of them, the key and the tensor that show whether its state is still the same.
        known: all layers, also those that have learned nothing or are frozen.

    Attributes:
        layers: those whose updates the step makes.
        states: their states by name.
        memories: the tensors of these.
    """

    def __init__(
        self,
        layers: list[LayerHandle],
        states: list[LayerState],
        marks: list[tuple[str, Tensor]],
        known: list[LayerHandle],
    ) -> None:
        self.layers = layers
        self._frozen = [layer for layer in known if not layer.entry.trains and not layer.gone]
        self._marks = {layer.name: (layer.entry, *mark) for layer, mark in zip(layers, marks, strict=True)}
        self._signatures = [(layer, _make_signature(layer)) for layer in known]
        self.states = {layer.name: state for layer, state in zip(layers, states, strict=True)}
        self.memories = {name: state.tensors for name, state in self.states.items()}

    def holds(self, saved: SavedState) -> bool:
        """Return whether these are still the states, and the layers still where they were."""
        kept = saved.state
        for entry, key, tensor in self._marks.values():
            own = kept.get(entry.parameter())
            if not own or own.get(key) is not tensor or entry.left or entry.excluded:
                return False
        for layer, signature in self._signatures:  # noqa: SIM110 - in each step, twice
            if _make_signature(layer) != signature:
                return False
        return True

    def replace(self, name: str, state: LayerState, mark: tuple[str, Tensor]) -> None:
        """Replace the state of a layer."""
        self._marks[name] = self._marks[name][0], *mark
        self.states[name], self.memories[name] = state, state.tensors

    def has_frozen_gradients(self) -> bool:
        """Return whether a frozen layer has a gradient, with which the optimizer will step it."""
        return any(layer.is_in_place and layer.has_gradient for layer in self._frozen)

    def take_arrived(self) -> tuple[list[LayerHandle], list[LayerHandle]]:
        """Return the layers whose gradients have arrived since the last step, and the others."""
        arrived = [layer for layer in self.layers if layer.entry.arrived]
        absent = [] if len(arrived) == len(self.layers) else [e for e in self.layers if not e.entry.arrived]
        for layer in arrived:
            layer.entry.arrived = False
        return arrived, absent


class Resting:
    """Decides for each step whether the layers rest in it.

    Args:
        rule: the rule.
        saved: the states.
        known: the layers.
        entries: the model's parameters.
        learning: says which steps gather.
        processes: the processes that share the states.
        waits: whether a layer's gradient waits for the step.
        observers: observers that need each call; None if each call must be captured in any case.
        watch: watches gradients arrive in a parameter: where no call is captured, only this shows them.

    Attributes:
        rests_on: whether all layers have been found at rest in this step, for compiled models.
    """

    def __init__(
        self,
        rule: StatefulContract,
        saved: SavedState,
        known: KnownLayers,
        entries: list[ParameterEntry],
        learning: Learning,
        processes: TrainingProcesses,
        waits: Callable[[str], bool],
        observers: Sized | None,
        watch: Callable[[ParameterEntry], None],
    ) -> None:
        self._rule = rule
        self._saved = saved
        self._known = known
        self._layers = known.by_name
        self._entries = entries
        self._learning = learning
        self._processes = processes
        self._waits = waits
        self._observers = observers
        self._watch = watch
        self.rests_on = False
        self._may_rest = True
        self._is_step_plain = False
        self._is_checked = False
        self._planned: tuple[int, int, int] | None = None
        self._frozen: set[int] = set()
        self._resting: RestingLayers | None = None

    def find(self) -> RestingLayers | None:
        """Return the resting layers of this step; None if they do not rest, or if something has changed."""
        resting = self._resting
        if resting is None or self._learning.gathers or not resting.holds(self._saved):
            return None
        return resting

    def follow(self, rested: RestingLayers, names: Collection[str]) -> None:
        """Follow a refresh during rest: the layers still rest if the step makes their updates."""
        states = {name: self._saved.read(name) for name in names}
        if rested is not self._resting or self._planned is None:
            return
        if any(state.in_backward or not state.tensors for state in states.values()):
            return  # the statistics have changed, so that the next forward looks again
        for name, state in states.items():
            rested.replace(name, state, self._saved.find_mark(name))
        self._planned = self._saved.version, *self._planned[1:]

    def begin_step(self) -> None:
        """Begin a step: the last one is over, so the next forward has to look again."""
        self._is_checked = self.rests_on = False

    def forget(self) -> None:
        """Forget the plan: the optimizer's parameters may have changed, so the next forward looks again."""
        self._planned = None
        self._is_checked = False

    def check(self, module: nn.Module) -> bool:
        """Return whether forward and backward of all layers are left to autograd until the next step.

        All modules ask, but one check in each step is enough, unless a weight of the module that asks was
        frozen then: `find` checks again at the step itself.
        """
        may_rest = self._observers is not None and not self._observers
        key = self._saved.version, len(self._layers), self._saved.step
        is_checked = self._is_checked and not (self._frozen and self._has_thawed(module))
        if is_checked and may_rest == self._may_rest and key == self._planned:
            return self._resting is not None
        is_same = self._planned is not None and self._planned[:2] == key[:2] and may_rest == self._may_rest
        rests_on = is_same and self.find() is not None
        self._may_rest, self._is_checked = may_rest, True
        if not rests_on:
            self._plan()
            key = self._saved.version, len(self._layers), self._saved.step
        self._planned = key
        self.rests_on = self._resting is not None
        return self.rests_on

    def _plan(self) -> None:
        """Find the layers whose forward and backward are plain in this step: the step makes their updates."""
        # the optimizer's state may have been cleared: that is a new start
        learned = self._find_learned()
        may_rest = self._may_rest and learned is not None and self._processes.are_known
        may_rest = may_rest and not self._processes.is_pipelined and not self._learning.gathers
        may_rest = may_rest and self._rule.acts_at_step and not self._saved.holds
        self._is_step_plain = may_rest
        learned = learned or set()
        # a resumed run finds layers in another order: stacks must not depend on it, or bits would
        layers = [layer for layer in self._known.list_in_order() if layer.entry.trains]
        entries = [entry for entry in self._entries if entry.trains]
        awake = {layer.entry for layer in layers if not may_rest or self._must_act(layer)}
        # what calls do with others is not known yet: they may be new, or have statistics from before a resume
        known = {layer.entry for layer in layers if layer.name in learned}
        awake |= {e for e in entries if e not in known and (self._saved.has_state(e) or e.is_unknown)}
        # frozen ones do not rest: they may be thawed before the step, as a GAN's discriminator is
        everything = {*self._entries, *(layer.entry for layer in self._layers.values())}
        for entry in everything:
            entry.rests = may_rest and entry.trains and entry not in awake
            if entry.rests:
                self._watch(entry)  # it may have been frozen so far
        self._frozen = {id(entry.parameter()) for entry in everything if not entry.trains}
        self._resting = None
        if may_rest and not awake:
            resting = [e for e in layers if e.name in learned and not e.gone and not e.entry.why_left]
            states = [self._saved.read_moved(layer.name, layer.statistic_like) for layer in resting]
            marks = [self._saved.find_mark(layer.name) for layer in resting]
            self._resting = RestingLayers(resting, states, marks, list(self._layers.values()))

    def _has_thawed(self, module: nn.Module) -> bool:
        """Return whether a parameter of this very module was frozen when the step was planned."""
        own = module._parameters.values()
        return any(p is not None and p.requires_grad and id(p) in self._frozen for p in own)

    def settle(self, layer: LayerHandle) -> None:
        """Let a layer rest from its first call on, if its statistics are from before a resume.

        No known class of module had announced its calls, so the plan treated it as a layer that has learned
        nothing. Without the interruption it would have rested in this step, and the bits must be the same.
        """
        if not self._is_step_plain or not self._is_checked or self._saved.count_uses(layer.entry) != 1:
            return  # of several uses the first one does not know of the others
        self._saved.follow_bias(layer.name)
        if self._saved.read(layer.name).tensors and not self._must_act(layer):
            layer.entry.rests = True

    def _find_learned(self) -> set[str] | None:
        """Return the layers that have statistics; None if other tensors stand in the place of parameters.

        Those of `torch.func.functional_call` are gone by the step, which refuses others.
        """
        layers = {name: layer for name, layer in self._layers.items() if layer.entry.trains}
        for name, layer in layers.items():
            if not layer.gone and layer.entry.dimensions:
                if not layer.is_in_place:
                    return None
                self._saved.follow_bias(name)
        return {name for name in layers if self._saved.read(name).tensors}

    def _must_act(self, layer: LayerHandle) -> bool:
        """Return whether a layer's calls have to be captured in a step that gathers nothing."""
        if layer.entry.sharding is not None or not self._waits(layer.name):
            return True
        is_new = not self._saved.read(layer.name).tensors
        return is_new and not layer.gone and not layer.entry.why_left


def _make_signature(layer: LayerHandle) -> tuple[object, ...]:
    """Return what the statistics of a layer depend on."""
    weight = layer.entry.parameter()
    if weight is None:
        return ()
    return weight.dtype, weight.device, weight.requires_grad, layer.bias is not None
