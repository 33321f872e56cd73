"""What people see of a value is the value, whatever stands in it."""

import pytest

from sidecar.cli.context import Cli


@pytest.mark.parametrize("text", ["[red]stream", "a[/]b", "[bold]", "\\\\[x]"])
@pytest.mark.parametrize("in_list", [True, False])
def test_value_that_looks_like_markup_is_shown_as_it_is(text: str, in_list: bool, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"stream_id": text}
    Cli(output="table").show([row] if in_list else row)
    assert text in capsys.readouterr().out
