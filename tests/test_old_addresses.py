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
    "plywise.local.session:open_session": "plywise.training.session",
    "plywise.pipeline.pipeline:Pipeline": "plywise.pipeline.pipeline",
    "plywise.data.digits:load_digits": "plywise.data.digits",
}
"""Each with the module in which it is defined now."""


RENAMED = {
    "plywise:MemoryRule": "plywise:StatefulRule",
    "plywise:Move": "plywise:Update",
    "plywise:Ply": "plywise:LinearCall",
    "plywise.arena.method:Setting": "plywise.arena.method:TrialContext",
    "plywise.local.session:trained": "plywise.training.session:load_trained",
}
"""Old names, each with what it is called now."""


def load(address):
    module, name = address.split(":")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("address", RENAMED)
def test_an_old_name_warns_and_works(address):
    new = RENAMED[address]
    with pytest.warns(DeprecationWarning, match=f"is called .*{new.split(':')[1]} since"):
        assert load(address) is load(new)


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_old_address_gives_what_has_moved(address):
    assert load(address).__module__ == ADDRESSES[address]
