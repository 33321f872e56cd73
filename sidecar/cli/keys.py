"""`sidecar keys`: names and states of keys and seal epochs; no bytes of any."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

import typer

from sidecar.clean_up import Cleaned, CleanUp
from sidecar.cli.context import Cli, Exit, cli, run_async, say, who
from sidecar.core.errors import Conflict
from sidecar.core.model import duration_ms
from sidecar.kafka.ledger import LedgerTopic
from sidecar.kms import open_for
from sidecar.ledger import LedgerGate
from sidecar.postgres import seal_epochs
from sidecar.postgres.connection import Connection, Pool, open_pool, transaction
from sidecar.postgres.errors import mapped
from sidecar.sealing import Sealing
from sidecar.steps import SystemClock

app = typer.Typer(help="Keys by name, and seal epochs.", no_args_is_help=True)

EPOCH_COLUMNS = ("kms_uri", "kms_key_version", "state", "tenant_keys", "created_at", "retired_at", "backup_confirmed_at", "irrecoverable_at")
By = Annotated[str | None, typer.Option(help="Who asks; user@host by default.")]

# A DEK is gone with its tenant's KEK. Uses of a stream's key are the positions it sealed.
_KEYS = """
SELECT k.key_id, k.key_version, k.scope_kind, k.scope_id,
  CASE WHEN k.is_destroyed OR t.state <> 'active' OR k.generation < t.generation THEN 'destroyed' WHEN k.is_active THEN 'active' ELSE 'retired' END AS state,
  k.created_at,
  CASE WHEN k.scope_kind = 'stream' THEN coalesce((SELECT sum(coalesce(h.used_to_position,
      (SELECT max(m.stream_position) FROM messages m WHERE m.tenant_id = h.tenant_id AND m.stream_id = h.stream_id)) - h.used_from_position + 1)
    FROM stream_key_history h WHERE h.tenant_id = k.tenant_id AND h.stream_id = k.scope_id AND h.key_id = k.key_id AND h.key_version = k.key_version), 0)::bigint
    ELSE k.uses_reserved END AS uses
FROM encryption_keys k JOIN tenants t USING (tenant_id)
WHERE k.tenant_id = $1 AND ($2::uuid IS NULL OR (k.scope_kind, k.scope_id, k.key_version, k.key_id) > (
  SELECT a.scope_kind, a.scope_id, a.key_version, a.key_id FROM encryption_keys a WHERE a.tenant_id = $1 AND a.key_id = $2 AND a.key_version = $3))
ORDER BY k.scope_kind, k.scope_id, k.key_version, k.key_id LIMIT $4"""


@app.command("list")
def list_(
    context: typer.Context,
    tenant: Annotated[str, typer.Option(help="The tenant.")],
    limit: Annotated[int | None, typer.Option(min=1, help="So many at a time; all by default.")] = None,
    after: Annotated[str | None, typer.Option(metavar="KEY_ID/VERSION", help="Go on behind this one.")] = None,
) -> None:
    """Every key version of a tenant, by scope."""
    here, last = cli(context), _named(after)

    async def read(connection: Connection) -> list[dict[str, Any]]:
        with mapped():
            return [dict(row) for row in await connection.fetch(_KEYS, tenant, *last, limit)]

    found = here.ask("reader", read)
    here.show(found)
    if limit is not None and len(found) == limit:
        say(f"there may be more: --after {found[-1]['key_id']}/{found[-1]['key_version']}")


def _named(key: str | None) -> tuple[UUID | None, int | None]:
    if key is None:
        return None, None
    key_id, _, version = key.partition("/")
    try:
        return UUID(key_id), int(version)
    except ValueError:
        raise typer.BadParameter("a key is named KEY_ID/VERSION, as the list has them", param_hint="--after") from None


@app.command()
def epochs(context: typer.Context) -> None:
    """Seal epochs: the versions of the KMS key, and how far each is on its way to destruction."""
    here = cli(context)
    here.show(here.ask("reader", seal_epochs.listed), EPOCH_COLUMNS)


@app.command("roll-epoch")
def roll_epoch(
    context: typer.Context,
    by: By = None,
    wait: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Wait until the KMS destroyed the old versions, else exit 4.")] = None,
) -> int:
    """A new version of the KMS key wraps from now on, and what lives moves to it; goes on with a roll that was cut short.

    Runs here, with the control plane's database role and KMS rights.
    """
    here = cli(context)

    async def main() -> list[dict[str, Any]]:
        async with _sealing(here) as (pool, sealing):
            if not await sealing.roll(by or who()):
                raise Conflict("another process is rolling; `sidecar keys epochs` shows how far it is")
            deadline = time.monotonic() + (wait or 0)
            while True:
                found = await _listed(pool)
                if not wait or _settled(found) or time.monotonic() > deadline:
                    return found
                await asyncio.sleep(0.5)
                await sealing.follow_up()

    found = run_async(main())
    here.show(found, EPOCH_COLUMNS)
    if any(row["state"] == "retired" and row["backup_confirmed_at"] is None for row in found) and here.settings.kms.backup == "confirmed":
        say("next: back up database and KMS, then `sidecar keys confirm-backup`: the old version is destroyed after that, and not before")
    return Exit.DONE if wait is None or _settled(found) else Exit.PENDING


@app.command("clean-up")
def clean_up(
    context: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    older_than: Annotated[str, typer.Option(metavar="DURATION", help="Only versions retired longer ago than this: 30d, 12h, 0s.")] = "30d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing, say what would be destroyed.")] = False,
    by: By = None,
) -> int:
    """Destroy retired key versions that no stored event and no dead letter needs any more.

    Runs here, with the control plane's database role. Exit 4: a batch under way did not let go in time, try again.
    """
    here, actor = cli(context), by or who()
    try:
        age = timedelta(milliseconds=duration_ms(older_than))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--older-than") from None

    async def main() -> list[Cleaned]:
        pool = await open_pool(here.settings.postgres.for_role("control"), application_name="sidecar keys")
        try:
            return await CleanUp(pool, SystemClock()).run(tenant=tenant, older_than=age, dry_run=dry_run, actor=actor)
        finally:
            await pool.close()

    found = run_async(main())
    names = ("key_id", "key_version", "scope_kind", "scope_id")
    here.show(
        [{"tenant_id": c.tenant} | {n: getattr(c.version, n) for n in names} | {"outcome": c.outcome} for c in found],
        ("tenant_id", *names, "outcome"),
    )
    return Exit.PENDING if any(c.outcome == "busy" for c in found) else Exit.DONE


@app.command("confirm-backup")
def confirm_backup(
    context: typer.Context,
    by: By = None,
    epoch: Annotated[str | None, typer.Option(metavar="VERSION", help="Only this retired version of the KMS key.")] = None,
) -> None:
    """A backup of the database and of the KMS exists that was made after the roll: older ones open nobody's data from now on.

    The retired versions of the KMS key are destroyed; where the KMS delays that, the control plane sees to its end.
    """
    here, actor = cli(context), by or who()

    async def main() -> list[dict[str, Any]]:
        async with _sealing(here) as (pool, sealing):
            await sealing.confirm_backup(epoch, actor)
            await sealing.follow_up()
            return await _listed(pool)

    here.show(run_async(main()), EPOCH_COLUMNS)


@asynccontextmanager
async def _sealing(here: Cli) -> AsyncIterator[tuple[Pool, Sealing]]:
    pool = await open_pool(here.settings.postgres.for_role("control"), application_name="sidecar keys")
    try:
        async with transaction(pool) as connection:
            # what was shredded since the backup of this database was taken must not move to a new version
            await LedgerGate(LedgerTopic(here.settings), here.settings.deployment).check(connection)
        yield pool, Sealing(pool, SystemClock(), open_for(here.settings.kms, "control"), here.settings.kms)
    finally:
        await pool.close()


async def _listed(pool: Pool) -> list[dict[str, Any]]:
    async with transaction(pool) as connection:
        return await seal_epochs.listed(connection)


def _settled(epochs: list[dict[str, Any]]) -> bool:
    return all(row["state"] in ("active", "destroyed") for row in epochs)
