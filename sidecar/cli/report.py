"""`sidecar report`: the compliance report of a tenant, or of all."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from sidecar.cli.context import Exit, cli, fail, say
from sidecar.report_page import render
from sidecar.reports import SECTIONS, report

DAYS = 30


def add_to(app: typer.Typer) -> None:
    app.command("report")(show)


def _moment(text: str | None, default: datetime, hint: str) -> datetime:
    """A day (its beginning) or a moment; without a zone it is UTC."""
    try:
        found = datetime.fromisoformat(text) if text else default
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no day and no moment; write 2026-11-01 or 2026-11-01T12:00:00Z", param_hint=hint) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def show(
    context: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant, with nothing of any other.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Of all tenants.")] = False,
    from_: Annotated[str | None, typer.Option("--from", help=f"A day or a moment, UTC; by default {DAYS} days before --to.", metavar="WHEN")] = None,
    to: Annotated[str | None, typer.Option("--to", help="Up to here, not including it; by default now.", metavar="WHEN")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one HTML file, to be printed or filed.", metavar="FILE")] = None,
) -> None:
    """Policies, keys, rotations due and done, shreds with certificates and residue, holds, refusals, and who did what."""
    here, now = cli(context), datetime.now(UTC)
    if (tenant is None) != all_:
        raise typer.BadParameter("--tenant T, or --all")
    end = _moment(to, now, "--to")
    start = _moment(from_, end - timedelta(days=DAYS), "--from")
    if start >= end:
        raise typer.BadParameter("the period ends before it begins", param_hint="--from")
    found = here.ask("control", lambda connection: report(connection, here.settings, tenant, start, end, now))
    if html is not None:
        try:
            html.write_text(render(found), encoding="utf-8")
        except OSError as error:
            fail(f"error: {html} cannot be written: {error.strerror}", Exit.USAGE)
        say(f"written: {html}")
    elif here.as_json:
        here.show(found)
    else:
        here.show({name: value for name, value in found.items() if not isinstance(value, list | dict)} | found["summary"])
        for section in SECTIONS:
            rows, total = found[section.name], found["totals"][section.name]
            typer.echo(f"\n{section.title}" + (f" (the first {len(rows)} of {total})" if len(rows) < total else ""))
            here.show(rows, list(rows[0]) if rows else ())
