"""Addresses of plywise 0.1 that documents and users' files name still give what they gave."""

from importlib import import_module

import pytest
from torch import nn

import plywise as pw
from plywise.pipeline.pipeline import Pipeline

ADDRESSES = {
    "plywise.rule:Rule": "plywise.engine.rule",
    "plywise.memory:MemoryRule": "plywise.engine.rule",
    "plywise.ply:Ply": "plywise.engine.call",
    "plywise.layers:LayerType": "plywise.engine.maps.registered",
    "plywise.card:read_card": "plywise.registry.card",
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
    "plywise.card:card_of": "plywise.registry.card:read_card",
    "plywise.arena.method:Setting": "plywise.arena.method:TrialContext",
    "plywise.arena.method:cosine": "plywise.arena.method:make_cosine",
    "plywise.arena.method:of_class": "plywise.arena.method:wrap_class",
    "plywise.arena.method:of_optimizer": "plywise.arena.method:wrap_optimizer",
    "plywise.pipeline.cuts:measured_cuts": "plywise.pipeline.cuts:measure_cuts",
    "plywise.data.arrays:tensor_of": "plywise.data.arrays:make_tensor",
    "plywise.data.sets:cifar10": "plywise.data.sets:load_cifar10",
    "plywise.data.store:find": "plywise.data.store:find_file",
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


OLD_ARGUMENTS = {
    "CoDA": lambda **given: pw.losses.CoDA(nn.Linear(3, 1), pw.losses.AUCMargin(), **given),
    "Pipeline": lambda **given: Pipeline(None, **given),
}
"""Calls that check ``timeout_s``, which 0.1 called ``patience``, and refuse its value."""


@pytest.mark.parametrize("name", OLD_ARGUMENTS)
def test_an_old_argument_warns_and_works(name):
    with pytest.raises((ValueError, pw.PlywiseError)) as new:
        OLD_ARGUMENTS[name](timeout_s=-1.0)
    with (
        pytest.warns(DeprecationWarning, match=r"patience is called timeout_s") as warned,
        pytest.raises(type(new.value)) as old,
    ):
        OLD_ARGUMENTS[name](patience=-1.0)
    assert str(old.value) == str(new.value)
    assert warned[0].filename == __file__
    with pytest.raises(TypeError, match="patience"):
        OLD_ARGUMENTS[name](patience=-1.0, timeout_s=-1.0)
