"""The table of docs/kms.md, from the providers' traits.    python -m tests.unit.kms_page    writes it anew."""

from importlib import import_module
from pathlib import Path

from sidecar.core.kms import KmsTraits
from sidecar.kms import PROVIDERS

PAGE = Path(__file__).parents[2] / "docs" / "kms.md"
START, END = "<!-- providers -->\n", "<!-- /providers -->"
COLUMNS = ("provider", "destroys", "after", "can be cancelled", "may outlive it", "takes associated data", "production", "this release ran against")


def traits() -> list[KmsTraits]:
    return [import_module(module).TRAITS for module, _, _ in PROVIDERS.values()]


def _row(of: KmsTraits) -> str:
    destroys = {"version": "single versions", "key": "whole keys"}[of.destroys]
    after = f"{of.delay.days} days or more" if of.delay else "at once"
    cells = (f"`{of.provider}:`", destroys, after, _yes(of.reversible), of.outlives, _yes(of.takes_aad), _yes(of.production), of.ran_against)
    return f"| {' | '.join(cells)} |"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def table(providers: list[KmsTraits]) -> str:
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(_row, providers)])


def filled(page: str, providers: list[KmsTraits] | None = None) -> str:
    """The page with its table as it must be."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError("the page has no table of providers")
    return f"{before}{start}{table(providers or traits())}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
