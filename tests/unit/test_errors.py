"""The error tree drawn in core/errors.py is the one of the classes."""

import inspect
import re

import pytest

from sidecar.core import errors
from sidecar.core.errors import SidecarError

CLASSES = {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, SidecarError)}


def drawn() -> dict[str, str]:
    """Class → parent, as drawn: a branch opens a class below the root, an indented line without one lists its children."""
    parents: dict[str, str] = {}
    branch = ""
    for line in (errors.__doc__ or "").splitlines():
        names = re.findall(r"\b[A-Z][A-Za-z]+\b", line.split("  ", 3)[-1] if line.startswith("     ") else line)
        known = [name for name in names if name in CLASSES]
        if re.match(r" +[├└] ", line):
            branch = known[0]
            parents[branch] = "SidecarError"
        elif re.match(r" +(│ )? +[A-Z]", line) and known and known != ["SidecarError"]:
            parents |= dict.fromkeys(known, branch)
    return parents


def test_tree_drawn_in_the_module_is_the_tree_of_the_classes() -> None:
    real = {name: cls.__mro__[1].__name__ for name, cls in CLASSES.items() if cls is not SidecarError}
    assert drawn() == real


def test_an_error_has_one_parent_so_it_has_one_fate() -> None:
    assert all(len(cls.__bases__) == 1 for cls in CLASSES.values())


@pytest.mark.parametrize("cls", [c for c in CLASSES.values() if c.__init__ in (SidecarError.__init__, errors.RecordError.__init__)])
def test_docstring_is_the_default_message(cls: type[SidecarError]) -> None:
    assert str(cls()) == (cls.__doc__ or "").strip() != ""
    assert str(cls("other")) == "other"


def test_reasons_of_dead_letters_are_those_of_the_contract() -> None:
    assert errors.MalformedRecord(reason="no_tenant").reason == "no_tenant"
    assert errors.MalformedEnvelope().reason == "malformed"
    assert errors.AuthenticationFailed().reason == "authentication_failed"


def test_configuration_error_says_what_where_and_how_to_mend() -> None:
    error = errors.ConfigurationError("no such thing", where="kms.uri", mend="name another")
    assert str(error).splitlines() == ["no such thing", "  where: kms.uri", "  mend:  name another"]


def test_unknown_is_not_shredded_and_unreachable_is_neither() -> None:
    assert not issubclass(errors.UnknownKey, errors.KeyShredded)
    assert not issubclass(errors.KmsUnavailable, errors.KeyUnavailable)
