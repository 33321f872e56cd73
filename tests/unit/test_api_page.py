"""docs/api.md is what the docstrings say, and each public name and operation has one."""

import pytest

import sidecar
from tests.unit import api_page


def test_page_is_what_the_docstrings_say() -> None:
    assert api_page.PAGE.read_text() == api_page.page(), "run python -m tests.unit.api_page"


def test_every_public_name_stands_in_the_page_and_every_operation_is_documented() -> None:
    assert not api_page.ungrouped()
    assert not api_page.undocumented()


def test_control_another_docstring_another_signature_and_a_new_name_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    page = api_page.PAGE.read_text()
    real = api_page.inspect.getsource
    for old, new in (("Shred a stream", "Keep a stream"), ("reason: str", "reason: str | None"), ('"""Of a class: each', 'pass  # """')):
        monkeypatch.setattr(api_page.inspect, "getsource", lambda module, old=old, new=new: real(module).replace(old, new))
        assert api_page.page() != page
    assert api_page.undocumented() == ["EncryptionPolicyService.get_policies_for_stream_type"]
    monkeypatch.undo()
    monkeypatch.setattr(sidecar, "__all__", [*sidecar.__all__, "Surprise"])
    monkeypatch.setitem(vars(sidecar), "Surprise", object)
    assert api_page.ungrouped() == {"Surprise"}
