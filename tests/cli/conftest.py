"""Commands run in this process like users run them."""

from typing import NamedTuple

import pytest

from plywise.cli import main


class Done(NamedTuple):
    """The result of a command: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def plywise(capsys):
    """Run a command in this process."""

    def _plywise(*words):
        with pytest.raises(SystemExit) as left:
            main(words)
        written = capsys.readouterr()
        assert "Traceback" not in written.err
        return Done(left.value.code, written.out, written.err)

    return _plywise
