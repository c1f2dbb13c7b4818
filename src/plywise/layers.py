"""Old address of `plywise.engine.maps.registered`."""

from plywise.engine.maps.registered import LayerType, LinearType, register_layer

__all__ = ["LayerType", "LinearType", "register_layer"]
