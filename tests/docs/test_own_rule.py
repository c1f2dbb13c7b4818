"""The rule and the learner of the tutorials break the promise that the page names, without what keeps it."""

import pytest

import plywise as pw
from plywise._util.import_path import load
from plywise.testing import check_learner, check_rule

from .pages import DOCS, blocks


def write_without(user_module, page, name, line):
    """A copy of a page's module that lacks a line or a part of one."""
    codes = [block.code for block in blocks(DOCS / "tutorials" / page)]
    whole = next(code for code in codes if code.startswith(f"# {name}.py\n"))
    broken = whole.replace(line, "")
    assert broken != whole
    user_module(f"broken_{name}", broken)
    return whole


def test_the_rule_without_its_damping(user_module):
    whole = write_without(user_module, "your-rule.md", "layer_rate", " + self.eps")
    assert len(whole.splitlines()) <= 40
    with pytest.raises(pw.ContractError) as caught:
        check_rule(load("broken_layer_rate:LayerRate", "the rule"), only=["scales"])
    assert any(
        "test_every_solve_ends[LayerRate-zeros-convnet]" in name for name in caught.value.result.failed
    )


def test_the_learner_without_its_check(user_module):
    write_without(user_module, "your-learner.md", "random_readout", "check_classes(y, self.classes)")
    with pytest.raises(pw.ContractError) as caught:
        check_learner(load("broken_random_readout:RandomReadout", "the learner"))
    assert all("test_a_bad_batch_is_named" in name for name in caught.value.result.failed)
