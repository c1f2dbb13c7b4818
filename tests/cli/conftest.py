"""Commands as their users run them, in this process."""

from typing import NamedTuple

import pytest

from plywise.cli import main


class Done(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

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
