"""What notebooks show: explanations, health and histories as tables of HTML, all text escaped."""

from html import escape
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import plywise as pw
from plywise._util.tables import make_table
from plywise.engine.health import Health


class Cells(HTMLParser):
    """The rows of a table, and whether each tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self._open = [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def test_all_text_is_escaped():
    text = "<script>&\"'"
    html = make_table([text], [[text]], title=text, notes=[text])
    assert "<script>" not in html
    assert Cells(html).rows == [[text], [text]]


def test_an_explanation_is_the_table_that_is_printed():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2))
    rule = pw.ProxProp().attach(model)
    table = rule.explain()
    head, *rows = Cells(table._repr_html_()).rows
    assert head[:4] == ["layer", "type", "weight", "treatment"]
    assert [row[0] for row in rows] == [row.name for row in table.rows]
    assert all(cell in str(table) for row in rows for cell in row)
    assert escape(table.summary()[0]) in table._repr_html_()


def test_a_learners_explanation_is_a_table_for_each_component():
    blocks = pw.Blocks([nn.Linear(4, 3), nn.Linear(3, 2)], torch.zeros(2, 4))
    learner = pw.LocalLoss(blocks, 2, optimizer=torch.optim.Adam, rule=pw.ProxProp)
    tables = learner.explain()
    assert len(tables) == 2
    assert tables._repr_html_().count("<table>") == 2
    assert str(tables) == "\n\n".join(str(table) for table in tables)


@pytest.mark.parametrize("counts", [{}, {("0", "step skipped"): 3}])
def test_health(counts):
    health = Health()
    for (name, event), count in counts.items():
        for _ in range(count):
            health.note(name, event)
    if counts:
        assert Cells(health._repr_html_()).rows[1:] == [["0", "step skipped", "3"]]
        assert str(health) == "3× step skipped: 0"
    else:
        assert str(health) in health._repr_html_()
