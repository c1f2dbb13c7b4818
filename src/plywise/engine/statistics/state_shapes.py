"""Whether tensors that were saved are a rule's statistics of a layer, by their shapes."""

from plywise.engine.contract import State, StatefulContract
from plywise.engine.statistics.layer_handle import LayerHandle
from plywise.errors import StateError


def check_shapes(rule: StatefulContract, layer: LayerHandle, tensors: State) -> bool:
    """Raise StateError unless these tensors are the rule's statistics of this layer.

    Returns:
        Whether they have a column for the bias, which may have been frozen or thawed since they were made.
    """
    trains = layer.bias is not None
    if layer.gone or not layer.entry.dimensions:
        return trains
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    wanted = _find_wanted(rule, layer, tensors)
    if layer.site is None and wanted != found:  # its calls may use the weight without the bias
        layer.expects_bias = False
        layer.expects_bias = _find_wanted(rule, layer, tensors) != found
        wanted = _find_wanted(rule, layer, tensors)
    if wanted != found:
        with layer.with_bias(not trains):
            if _find_wanted(rule, layer, tensors) == found:
                return not trains
    for key in sorted(wanted.keys() | found.keys()):
        mine, its = (shapes.get(key, "missing") for shapes in (wanted, found))
        if mine != its:
            raise StateError(
                f"The saved memory of layer {layer.name!r} does not fit this model: its {key!r} is "
                f"{its}, and should be {mine}. It comes from another architecture, or from a rule with "
                "other settings; or the weight has got another shape while the rule was attached: then "
                "rule.reset() begins a new memory.",
                see="state-memory",
            )
    return layer.bias is not None


def find_shapes(rule: StatefulContract, layer: LayerHandle) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a rule's statistics of a layer."""
    shape = layer.shape
    wanted = {**rule.learned_shapes(shape), **rule.refreshed_shapes(shape)}
    return {key: tuple(size) for key, size in wanted.items()}


def _find_wanted(rule: StatefulContract, layer: LayerHandle, tensors: State) -> dict[str, tuple[int, ...]]:
    """Return the shapes that these statistics should have; those of an earlier version may lack some."""
    shapes = find_shapes(rule, layer)
    return {key: size for key, size in shapes.items() if key in tensors or key not in rule.later_statistics}
