"""`sidecar events`: what the store holds, decrypted."""

import base64
import sys
from typing import Annotated, Any

import orjson
import typer

from sidecar.blind_index import BlindIndex, Found
from sidecar.cli.context import Cli, Exit, cli, fail, run_async
from sidecar.core.model import Erased, Event
from sidecar.event_store import EventStore
from sidecar.kafka.ledger import LedgerTopic
from sidecar.keys import KeyManagement
from sidecar.kms import open_for
from sidecar.ledger import LedgerGate
from sidecar.postgres.connection import open_pool

app = typer.Typer(help="Stored events.", no_args_is_help=True)
_COLUMNS = ("stream_id", "position", "message_id", "type", "status", "value", "error")


async def _read(here: Cli, tenant: str, **wanted: Any) -> list[dict[str, Any]]:
    pool = await open_pool(here.settings.postgres.for_role("reader"), application_name="sidecar events")
    try:
        gate = LedgerGate(LedgerTopic(here.settings), here.settings.deployment)
        store = EventStore(pool, KeyManagement(open_for(here.settings.kms, "reader")), gate)
        found = await store.read(tenant, **wanted)
    finally:
        await pool.close()
    return [_shown(row, held) for row, held in found]


def _shown(row: Any, held: Any) -> dict[str, Any]:
    out = {
        "tenant_id": row["tenant_id"],
        "stream_id": row["stream_id"],
        "position": row["stream_position"],
        "message_id": row["message_id"],
        "type": row["message_type"],
        "status": "error",
        "value_base64": None,
        "error": None,
    }
    if isinstance(held, Event):
        value = None if held.value is None else base64.b64encode(held.value).decode()
        return out | {"status": "ok", "value_base64": value, "is_tombstone": held.value is None}
    if isinstance(held, Erased):
        return out | {"status": "erased"}
    return out | {"error": f"{type(held).__name__}: {held}"}


def _show(here: Cli, rows: list[dict[str, Any]]) -> None:
    if here.as_json:
        here.show(rows)
    else:
        here.show([row | {"value": _text(row["value_base64"])} for row in rows], _COLUMNS)
    if any(row["status"] == "error" for row in rows):
        raise typer.Exit(int(Exit.FAILED))


def _text(value: str | None) -> str:
    text = base64.b64decode(value).decode("utf-8", "replace") if value else ""
    return text if len(text) <= 60 else text[:59] + "…"


@app.command("list")
def list_(
    context: typer.Context,
    tenant: Annotated[str, typer.Option(help="The tenant.")],
    stream: Annotated[str | None, typer.Option(help="Only this stream, by position.")] = None,
    stream_class: Annotated[str | None, typer.Option("--class", help="Only this class.")] = None,
    subject: Annotated[str | None, typer.Option(help="Only this person's, where a policy seals them by person.")] = None,
    from_: Annotated[int, typer.Option("--from", help="From this position on.")] = 1,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000)] = 1000,
) -> None:
    """Events, decrypted; erased ones are shown as such. Exit 1 if any cannot be opened."""
    here = cli(context)
    _show(here, run_async(_read(here, tenant, stream=stream, stream_class=stream_class, subject=subject, from_position=from_, limit=limit)))


@app.command()
def get(context: typer.Context, tenant: Annotated[str, typer.Option()], stream: Annotated[str, typer.Option()], position: int) -> None:
    """One event."""
    here = cli(context)
    rows = [r for r in run_async(_read(here, tenant, stream=stream, from_position=position, limit=1)) if r["position"] == position]
    if not rows:
        fail(f"error: stream {stream} of tenant {tenant} has no position {position}")
    _show(here, rows)


@app.command()
def find(
    context: typer.Context,
    tenant: Annotated[str, typer.Option(help="The tenant.")],
    field: Annotated[str, typer.Option(help="The pointer, as a policy's blind_index has it: /email")],
    value: Annotated[str, typer.Option(help="A text; - reads it from standard input, which no history keeps.")],
    number: Annotated[bool, typer.Option("--json", help="The value is JSON: a number, true or false.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000)] = 1000,
) -> None:
    """Where events are whose encrypted field has this value. Erased events are not found."""
    here = cli(context)
    said = sys.stdin.read().rstrip("\n") if value == "-" else value
    try:
        wanted = orjson.loads(said) if number else said
    except orjson.JSONDecodeError:
        fail("error: the value is no JSON", Exit.USAGE)
    found = run_async(_find(here, tenant, field, wanted, limit))
    here.show([{"tenant_id": tenant, "stream_id": event.stream, "position": event.position} for event in found])


async def _find(here: Cli, tenant: str, field: str, value: Any, limit: int) -> list[Found]:
    pool = await open_pool(here.settings.postgres.for_role("reader"), application_name="sidecar events")
    try:
        gate = LedgerGate(LedgerTopic(here.settings), here.settings.deployment)
        return await BlindIndex(pool, KeyManagement(open_for(here.settings.kms, "reader")), gate).find_by_field(tenant, field, value, limit=limit)
    finally:
        await pool.close()
