"""A package that is missing and one that is broken are different errors."""

import pytest

from plywise import PlywiseError
from plywise._util.extras import import_extra


def test_a_missing_package_is_said_with_the_cure():
    with pytest.raises(PlywiseError) as caught:
        import_extra("nothing_of_the_kind", "plot needs nothing_of_the_kind: pip install it.")
    assert str(caught.value) == "plot needs nothing_of_the_kind: pip install it."


def test_a_broken_package_is_said_to_be_broken(user_module):
    user_module("half_installed", "from os import no_such_name\n")
    with pytest.raises(PlywiseError, match=r"^plot needs it\. It cannot be imported: .*no_such_name"):
        import_extra("half_installed", "plot needs it.")


def test_a_submodule_is_returned_itself():
    assert import_extra("os.path", "unused").join("a", "b") == "a/b"
