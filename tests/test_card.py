"""The docstring of each method is complete, and its card says what the docstring says."""

import doctest
import importlib
import inspect
import io
from dataclasses import dataclass

import pytest
import torch

import plywise as pw
from plywise._util.suggest import suggestion
from plywise.errors import PlywiseError
from plywise.registry.card import SECTIONS, STATUSES, TAGLINE_WIDTH, HyperParameter, read_card
from plywise.registry.find import LEARNERS, ROOMS, RULES, find, find_rule

HELPERS = {"unroll", "adapt_activations", "fuse_slice", "input_gradient_difference"}
"""Public, but part of a method and none of its own."""

NAMES = [name for names in ROOMS.values() for name in names]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_whole_card(name):
    method = find(name)
    card = read_card(method)
    assert card.name == method.__name__ == name
    for section in SECTIONS:
        text = getattr(card, section.lower().replace(" ", "_"))
        assert section == "Code" or text.endswith((".", ")")), section
        assert text.split()[0] in method.__doc__
        assert not any(f" {other}: " in text for other in SECTIONS), f"{section} runs on into another section"
    assert card.status_word in STATUSES
    assert 0 < len(card.tagline) <= TAGLINE_WIDTH
    assert "…" not in card.tagline, "the first line of the file should say the idea in one line"
    assert 1900 < card.year < 2100
    arguments = inspect.signature(method).parameters.values()
    assert [p.name for p in card.hyper_parameters] == [p.name for p in arguments]
    for parameter, argument in zip(card.hyper_parameters, arguments, strict=True):
        assert (parameter.default == "required") == (argument.default is argument.empty)
        assert parameter.meaning


@pytest.mark.parametrize("name", NAMES)
def test_the_example_on_every_card_runs(name):
    method = find(name)
    example = doctest.DocTestParser().get_doctest(read_card(method).example, {}, name, None, None)
    assert example.examples, "an example is lines that run"
    torch.manual_seed(0)
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example, out=said.write).failed == 0, said.getvalue()


def test_catalogue_holds_every_public_rule():
    public = {getattr(pw, name) for name in pw.__all__ if isinstance(getattr(pw, name), type)}
    rules = {
        one.__name__ for one in public if issubclass(one, pw.Rule) and one not in (pw.Rule, pw.StatefulRule)
    }
    assert rules == set(RULES)
    learners = {
        one.__name__
        for one in public
        if issubclass(one, pw.Learner) and one not in (pw.Learner, pw.OneWayLearner)
    }
    assert learners == set(LEARNERS)


@pytest.mark.parametrize("room", ["optim", "nn", "losses", "init"])
def test_catalogue_holds_everything_that_a_room_shows(room):
    assert set(ROOMS[room]) | HELPERS == set(importlib.import_module(f"plywise.{room}").__all__) | HELPERS


def test_years_are_years_of_papers():
    # 2003.05164 is a number of arXiv's, not a year
    assert read_card(pw.Consequentialism).year == 2021
    assert read_card(pw.ProxProp).year == 2018
    assert read_card(pw.NLMS).year == 1960


DOCSTRING = """A rule.

    Idea: one idea,
        told in two lines. Note: a word with a colon.
    Equation: D = G.
    Use when: always.
    Do not use when: never.
    Layers: all.
    Cost: none.
    Status: faithful.
    Source: Someone (1999).
    Code: none found.
    Results: none.
    Limits: none.

    Args:
        size: the size: in
            metres. Default 1. Range 0.1 to 1e3.

    Example:
        >>> 1 + 1
        2
    """


def rule_with(docstring):
    @dataclass(frozen=True, eq=False)
    class Mine(pw.Backprop):
        size: float = 1.0

    Mine.__doc__ = docstring
    return Mine


def test_card_of_a_rule_of_ones_own():
    card = read_card(rule_with(DOCSTRING))
    assert card.idea == "one idea, told in two lines. Note: a word with a colon."
    assert card.hyper_parameters == (
        HyperParameter("size", "1.0", "the size: in metres. Default 1.", "0.1 to 1e3"),
    )
    assert card.example == ">>> 1 + 1\n2"
    assert card.year == 1999


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    Limits: none.\n", "", "Mine has no section 'Limits'"),
        ("Cost: none.", "Cost:", "'Cost'"),
        ("(1999)", "", "no year"),
        ("size: the size", "weight: the size", "does not explain size"),
        (" Range 0.1 to 1e3.", "", "where to look for size"),
        ("Status: faithful", "Status: fine", "begins with none of faithful"),
        (">>> 1 + 1\n        2\n", "", "'Example'"),
    ],
)
def test_a_hole_in_the_docstring_raises(old, new, said):
    assert old in DOCSTRING
    with pytest.raises(PlywiseError, match=said):
        read_card(rule_with(DOCSTRING.replace(old, new)))


def test_unknown_rule_suggests():
    assert find_rule("NLMS") is find_rule("nlms") is pw.NLMS
    with pytest.raises(PlywiseError, match=r"'ProxPop'.*Did you mean ProxProp"):
        find_rule("ProxPop")
    assert suggestion("zzz", RULES) == ""
