"""`sidecar ledger`: the acts that no restore may take back, and the way back into service after one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar import ledger_replay, signing
from sidecar.cli.context import Cli, Exit, cli, fail, run_async
from sidecar.core.errors import LedgerBehind
from sidecar.kafka.admin import Admin
from sidecar.kafka.ledger import LedgerTopic
from sidecar.ledger import Ledger, LedgerGate
from sidecar.ledger_replay import Found, LedgerReplay
from sidecar.postgres import ledger, migrations
from sidecar.postgres.connection import Connection, Pool, connected, open_pool
from sidecar.steps import Steps, SystemClock

app = typer.Typer(help="The acts that no restore may take back.", no_args_is_help=True)

COLUMNS = ("offset", "act", "at", "scope_kind", "scope_ref", "command_id", "generation", "signed_by")
TrustKey = Annotated[list[Path] | None, typer.Option("--trust-key", help="A public key (.pub) of a former control plane; may stand more than once.")]


def _shown(found: Found) -> dict[str, Any]:
    entry = found.entry
    return {
        "offset": found.offset,
        "entry_id": entry.entry_id,
        "command_id": entry.command_id,
        "act": entry.act,
        "at": entry.at,
        "tenant_ref": entry.tenant_ref,
        "scope_kind": entry.kind.value,
        "scope_ref": entry.scope_ref,
        "generation": entry.generation,
        "undoes": entry.undoes,
        "signed_by": found.signed_by,
    }


def _read(here: Cli, trust: list[Path] | None) -> list[dict[str, Any]]:
    keys = ledger_replay.trusted(here.settings, trust or [])
    return [_shown(found) for found in ledger_replay.read(LedgerTopic(here.settings), here.settings.deployment, keys)]


@app.command("list")
def list_(context: typer.Context, trust_key: TrustKey = None) -> None:
    """Every entry on the topic, in order: tenants and scopes are pseudonyms."""
    here = cli(context)
    here.show(_read(here, trust_key), COLUMNS)


@app.command()
def verify(context: typer.Context, trust_key: TrustKey = None) -> None:
    """Check every entry's signature. Exit 1 if one is not signed by a trusted key."""
    here = cli(context)
    rows = _read(here, trust_key)
    bad = [row["offset"] for row in rows if not row["signed_by"]]
    here.show({"entries": len(rows), "unverified": bad})
    if bad:
        fail(f"{len(bad)} entries are not signed by a trusted key", Exit.FAILED)


@app.command()
def status(context: typer.Context) -> None:
    """Whether this database may be served, and what it knows of the ledger. Exit 1 if it may not."""
    here = cli(context)
    found = here.ask("reader", lambda connection: _status(here, connection))
    here.show(found)
    if not found["serves"]:
        fail(found["reason"], Exit.FAILED)


async def _status(here: Cli, connection: Connection) -> dict[str, Any]:
    topic = LedgerTopic(here.settings)
    server, known = await ledger.server(connection), await ledger.watermark(connection)
    reason = None
    try:
        await LedgerGate(topic, here.settings.deployment).check(connection)
    except LedgerBehind as error:
        reason = str(error)
    waiting = await ledger.count_unpublished(connection)
    return {
        "serves": reason is None,
        "reason": reason,
        "topic": topic.name,
        "next_offset": known.next_offset,
        "unpublished": waiting,
        "server": server and {"system_identifier": server.system_identifier, "timeline": server.timeline},
        "served_from": known.system_identifier and {"system_identifier": known.system_identifier, "timeline": known.timeline},
    }


@app.command()
def replay(context: typer.Context, trust_key: TrustKey = None) -> None:
    """After a restore or a failover: apply what this database lacks; then it may be served from where it is now. Repeatable."""
    here = cli(context)
    here.show(run_async(_replay(here, trust_key or [])))


async def _replay(here: Cli, trust: list[Path]) -> dict[str, Any]:
    settings = here.settings
    keys = await asyncio.to_thread(ledger_replay.trusted, settings, trust)
    own_signer = signing.control_signer(settings)
    admin = Admin(settings)
    topic = LedgerTopic(settings, admin)
    async with _database(settings.postgres.for_role("control")) as (lead, pool):
        own = Ledger(pool, topic, own_signer, settings.deployment)
        return await LedgerReplay(settings, pool, Steps(pool, admin, SystemClock(), own), topic, keys).run(lead)


@asynccontextmanager
async def _database(dsn: str) -> AsyncIterator[tuple[Connection, Pool]]:
    """A session that may hold the deployment's lead, and a pool beside it."""
    async with connected(dsn, application_name="sidecar ledger replay") as lead:
        await migrations.check(lead)
        pool = await open_pool(dsn, application_name="sidecar ledger replay")
        try:
            yield lead, pool
        finally:
            await pool.close()
