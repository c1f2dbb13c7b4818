"""`plywise completion`: the Tab key completes commands and flags."""

from typing import Literal

from plywise.cli.console import console
from plywise.cli.training import Switch


def completion(
    shell: Literal["bash", "zsh", "fish", "powershell"] | None = None, /, *, install: Switch = False
) -> None:
    """Print the script by which a shell completes plywise's commands and flags, or install it.

    For example:

        plywise completion --install             # for the shell that you are in
        plywise completion bash > ~/.local/share/bash-completion/completions/plywise

    Args:
        shell: bash, zsh, fish or powershell. Default: the one that this runs in.
        install: put it where the shell looks for it, and have the shell's start-up file read it.
    """
    from cyclopts.completion.detect import ShellDetectionError

    from plywise.cli import app
    from plywise.errors import CommandError

    try:
        if install:
            path = app.install_completion(shell=shell)
            console().print(f"Written: {path}. Start a new shell.")
        else:
            print(app.generate_completion(shell=shell))
    except ShellDetectionError as error:
        raise CommandError(
            "Which shell this runs in is not clear: name it, as in plywise completion bash."
        ) from error
