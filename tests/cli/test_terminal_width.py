"""What commands print in a terminal: lines break between words, at any width."""

import re

import pytest

from plywise.cli import doctor

COMMANDS = {
    "methods": ["methods"],
    "workloads": ["workloads"],
    "topics": ["help"],
    "topic": ["help", "bench-error"],
    "doctor": ["doctor"],
    "papers": ["reproduce"],
}


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_word_breaks(plywise, monkeypatch, name, columns):
    monkeypatch.setattr(doctor, "self_check", lambda: {"Backprop": "the loss does not fall"})
    plain = plywise(*COMMANDS[name]).out
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", plywise(*COMMANDS[name]).out)
    wide = [line for line in shown.splitlines() if len(line.rstrip()) > columns and " " in line.strip()]
    assert not wide
    sentences = " ".join(line for line in shown.splitlines() if not line.startswith(" "))
    assert list_words(sentences) <= list_words(plain)


def list_words(text):
    """List the words without marks of Markdown, which a terminal does not show."""
    return set(re.sub("[─•]", " ", re.sub("[`*]", "", text)).split())
