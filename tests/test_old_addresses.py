"""Addresses of plywise 0.1 that documents and users' files name still give what they gave."""

from importlib import import_module

import pytest

ADDRESSES = {
    "plywise.rule:Rule": "plywise.engine.rule",
    "plywise.memory:MemoryRule": "plywise.engine.rule",
    "plywise.ply:Ply": "plywise.engine.call",
    "plywise.layers:LayerType": "plywise.engine.maps.registered",
    "plywise.card:card_of": "plywise.registry.card",
    "plywise.health:Health": "plywise.engine.health",
    "plywise.arena.method:Method": "plywise.arena.method",
    "plywise.arena.space:Range": "plywise.arena.space",
    "plywise.arena.task:Task": "plywise.arena.task",
    "plywise.arena.workload:Workload": "plywise.arena.workload",
    "plywise.arena.workload:Data": "plywise.data.parts",
    "plywise.local.session:trained": "plywise.training.session",
    "plywise.pipeline.pipeline:Pipeline": "plywise.pipeline.pipeline",
    "plywise.data.digits:load_digits": "plywise.data.digits",
}
"""Each with the module in which it is defined now."""


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_old_address_gives_what_has_moved(address):
    module, name = address.split(":")
    assert getattr(import_module(module), name).__module__ == ADDRESSES[address]
