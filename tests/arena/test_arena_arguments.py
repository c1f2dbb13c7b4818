"""`bench`, `diagnose` and `load` refuse arguments of a wrong kind by name, in their own words."""

import inspect

import pytest
import torch
from torch import nn

from plywise.arena import bench, diagnose, load
from plywise.errors import BenchError

OF_THE_USER = {"model", "data", "loss", "metric", "step", "device"}
"""Arguments that may be functions or objects of any kind; tests of their uses are elsewhere."""

WRONG = [
    object(),
    3 + 2j,
    b"x",
    1.5j,
    nn.Linear(2, 2),
    torch.tensor(2.0),
    torch.tensor([1.0, 2.0]),
    lambda: 3,
]


@pytest.mark.parametrize("function", [bench, diagnose, load])
def test_every_argument_of_a_wrong_kind_is_named(function):
    for name in inspect.signature(function).parameters.keys() - OF_THE_USER:
        for value in WRONG:
            with pytest.raises(BenchError, match=f"^{function.__name__}: {name} must be .*, not "):
                function(**{name: value})


@pytest.mark.parametrize(
    ("function", "words", "message"),
    [
        (bench, {"out": 3}, "bench: out must be a path, not 3."),
        (bench, {"threads": 0}, "bench: threads must be a whole number of at least 1, not 0."),
        (
            bench,
            {"workloads": [1, 2]},
            "bench: workloads must be names of workloads, in a list or",
        ),
        (bench, {"workers": True}, "bench: workers must be a whole number of at least 1, not True."),
        (bench, {"timeout_s": float("nan")}, "bench: timeout_s must be a finite number of seconds above 0"),
        (bench, {"progress": "no"}, "bench: progress must be True or False, not 'no'."),
        (diagnose, {"seed": None}, "diagnose: seed must be a whole number of at least 0, not None."),
        (load, {"folder": None}, "load: folder must be a path, not None."),
    ],
)
def test_the_message_says_what_is_wanted(function, words, message):
    with pytest.raises(BenchError) as caught:
        function(**words)
    assert message in str(caught.value)


def test_an_argument_that_there_is_not_is_named_by_python():
    with pytest.raises(TypeError, match=r"bench\(\) got an unexpected keyword argument 'modell'"):
        bench(modell=3)
