"""The docstring of each rule is complete, and its card says what the docstring says."""

from dataclasses import MISSING, dataclass, fields

import pytest

import plywise as pw
from plywise.card import SECTIONS, TAGLINE_WIDTH, card_of
from plywise.catalogue import RULES, find_rule, suggestion
from plywise.errors import PlywiseError


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_a_whole_card(name):
    rule_class = find_rule(name)
    card = card_of(rule_class)
    assert card.name == rule_class.__name__ == name
    for section in SECTIONS:
        text = getattr(card, section.lower().replace(" ", "_"))
        assert text.endswith("."), section
        assert text.split()[0] in rule_class.__doc__
        assert not any(f" {other}: " in text for other in SECTIONS), f"{section} runs on into another section"
    assert 0 < len(card.tagline) <= TAGLINE_WIDTH
    assert "…" not in card.tagline, "the first line of the file should say the idea in one line"
    assert 1900 < card.year < 2100
    assert [p.name for p in card.hyper_parameters] == [f.name for f in fields(rule_class)]
    for parameter, field in zip(card.hyper_parameters, fields(rule_class), strict=True):
        assert field.default is not MISSING
        assert parameter.default == repr(field.default)
        assert parameter.meaning


def test_catalogue_holds_every_public_rule():
    public = {getattr(pw, name) for name in pw.__all__ if isinstance(getattr(pw, name), type)}
    rules = {
        one.__name__ for one in public if issubclass(one, pw.Rule) and one not in (pw.Rule, pw.MemoryRule)
    }
    assert rules == set(RULES)


def test_years_are_years_of_papers():
    # 2003.05164 is a number of arXiv's, not a year
    assert card_of(pw.Consequentialism).year == 2021
    assert card_of(pw.ProxProp).year == 2018
    assert card_of(pw.NLMS).year == 1960


DOCSTRING = """A rule.

    Idea: one idea,
        told in two lines. Note: a word with a colon.
    Equation: D = G.
    Use when: always.
    Do not use when: never.
    Cost: none.
    Source: Someone (1999).
    Limits: none.

    Args:
        size: the size: in
            metres.
    """


def rule_with(docstring):
    @dataclass(frozen=True, eq=False)
    class Mine(pw.Backprop):
        size: float = 1.0

    Mine.__doc__ = docstring
    return Mine


def test_card_of_a_rule_of_ones_own():
    card = card_of(rule_with(DOCSTRING))
    assert card.idea == "one idea, told in two lines. Note: a word with a colon."
    assert card.hyper_parameters[0].meaning == "the size: in metres."
    assert card.hyper_parameters[0].default == "1.0"
    assert card.year == 1999


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    Limits: none.\n", "", "Mine has no section 'Limits'"),
        ("Cost: none.", "Cost:", "'Cost'"),
        ("(1999)", "", "no year"),
        ("size: the size", "weight: the size", "does not explain size"),
    ],
)
def test_a_hole_in_the_docstring_raises(old, new, said):
    assert old in DOCSTRING
    with pytest.raises(PlywiseError, match=said):
        card_of(rule_with(DOCSTRING.replace(old, new)))


def test_unknown_rule_suggests():
    assert find_rule("NLMS") is find_rule("nlms") is pw.NLMS
    with pytest.raises(PlywiseError, match=r"'ProxPop'.*Did you mean ProxProp"):
        find_rule("ProxPop")
    assert suggestion("zzz", RULES) == ""
