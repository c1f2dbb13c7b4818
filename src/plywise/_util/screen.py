"""A console whose lines break between words."""

from textwrap import TextWrapper
from typing import Any

from rich.console import Console


class Screen(Console):
    """Prints plain text such that a terminal breaks no word, and a file or a pipe no line.

    A word that is wider than the terminal, as a path may be, is left whole, so that it can be copied. A
    command that is to be copied as a line needs ``soft_wrap=True``.
    """

    def print(self, *objects: Any, **how: Any) -> None:
        """Print as `Console.print` does."""
        if "soft_wrap" not in how and all(isinstance(one, str) for one in objects):
            how["soft_wrap"] = True
            if self.is_terminal:
                objects = tuple(wrap_words(one, self.width) for one in objects)
        super().print(*objects, **how)


def wrap_words(text: str, width: int) -> str:
    r"""Break the lines of a text at spaces where there are any.

    Example:
        >>> wrap_words("see /a/long/path\nand more", 8)
        'see\n/a/long/path\nand more'
    """
    wrapper = TextWrapper(width, break_long_words=False, break_on_hyphens=False, expand_tabs=False)
    return "\n".join("\n".join(wrapper.wrap(line)) for line in text.split("\n"))
