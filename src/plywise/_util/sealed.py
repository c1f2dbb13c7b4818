"""JSON with a digest of itself at its end, ``check``, which shows whether it is undamaged."""

import hashlib
import json
import re
from typing import Any

_CHECK = re.compile(r',\s*"check": "([0-9a-f]{16})"\s*\}\s*$')
_LIKE_A_CHECK = re.compile(r',\s*"[^"]{5}": "[^"]{16}"\s*\}\s*$')


def seal(text: str) -> str:
    """Return the text of a JSON object, with its check.

    Example:
        >>> seal('{"a": 1}')
        '{"a": 1, "check": "2445ef814befe2c2"}'
    """
    body = text.rstrip().removesuffix("}").rstrip()
    space = "\n " if "\n" in body else " "
    return f'{body},{space}"check": "{_digest(body)}"{space.rstrip(" ")}}}'


def is_sealed(text: str) -> bool:
    """Return whether a text has a check."""
    return _CHECK.search(text[-64:]) is not None


def unseal(text: str) -> Any:
    """Return the content of a text without its check. A text of an older version needs no check.

    Raises:
        ValueError: it is not JSON, does not fit its check, or the check itself is damaged.

    Example:
        >>> unseal('{"a": 1, "check": "2445ef814befe2c2"}')
        {'a': 1}
        >>> unseal('{"a": 2, "check": "2445ef814befe2c2"}')
        Traceback (most recent call last):
        ValueError: it does not fit its check
    """
    start = max(0, len(text) - 64)
    found = _CHECK.search(text[start:])
    if found is not None:
        body = text[: start + found.start()]
        if _digest(body) != found[1]:
            raise ValueError("it does not fit its check")
        text = body + "}"
    elif _LIKE_A_CHECK.search(text[start:]):
        raise ValueError("its check is damaged")
    return json.loads(text)


def _digest(body: str) -> str:
    return hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
