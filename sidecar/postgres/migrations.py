"""Numbered SQL files under an advisory lock, with checksums. Expand and contract: the previous release runs on the new schema.

A file says of itself, in its first line, whether it is `kind: expand` or `kind: contract`; a database that has a newer
contract migration than this release knows is refused.
"""

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sidecar.core.errors import ConfigurationError
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

_LEDGER = """
CREATE TABLE IF NOT EXISTS schema_migrations (
  version INT PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, checksum TEXT NOT NULL, applied_at TIMESTAMPTZ NOT NULL DEFAULT now()
)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """A file of schemas/postgres/migrations."""

    version: int
    name: str
    kind: str
    sql: str

    @property
    def checksum(self) -> str:
        return sha256(self.sql.encode()).hexdigest()


def _folder() -> Path:
    package = Path(__file__).resolve().parent.parent
    shipped = package / "_schemas"
    return (shipped if shipped.is_dir() else package.parent / "schemas") / "postgres" / "migrations"


def known() -> list[Migration]:
    """All migrations of this release, in order."""
    found = []
    for file in sorted(_folder().glob("[0-9]*.sql")):
        sql = file.read_text()
        kind = re.search(r"kind: (expand|contract)", sql.splitlines()[0])
        if kind is None:
            raise ValueError(f"{file.name}: the first line says no kind")
        found.append(Migration(version=int(file.name[:4]), name=file.stem, kind=kind.group(1), sql=sql))
    return found


async def status(connection: Connection) -> list[dict[str, Any]]:
    """A row per migration: version, name, state (applied, pending, changed, newer), applied_at."""
    with mapped():
        exists = await connection.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL")
        rows = await connection.fetch("SELECT * FROM schema_migrations ORDER BY version") if exists else []
    applied = {row["version"]: row for row in rows}
    out: list[dict[str, Any]] = []
    for migration in known():
        row = applied.pop(migration.version, None)
        state = "pending" if row is None else "applied" if row["checksum"] == migration.checksum else "changed"
        out.append({"version": migration.version, "name": migration.name, "state": state, "applied_at": row and row["applied_at"]})
    out += [{"version": v, "name": r["name"], "state": f"newer ({r['kind']})", "applied_at": r["applied_at"]} for v, r in applied.items()]
    return out


async def check(connection: Connection) -> None:
    """Raises ConfigurationError unless this release may run on the schema."""
    for row in await status(connection):
        if row["state"] in ("pending", "changed", "newer (contract)"):
            mend = "run `sidecar db migrate`" if row["state"] == "pending" else "run the release that the database was migrated with"
            raise ConfigurationError(f"migration {row['name']} is {row['state']}", where="the database", mend=mend)


async def check_or_migrate(connection: Connection, *, may_migrate: bool) -> None:
    """What a plane does at its start: `check`; a development profile first applies what is pending."""
    if may_migrate and any(row["state"] == "pending" for row in await status(connection)):
        await migrate(connection)
    await check(connection)


async def migrate(connection: Connection) -> list[str]:
    """Apply what is pending, each in a transaction of its own; answers the names. Safe to run from many places at once."""
    with mapped():
        await connection.execute("SELECT pg_advisory_lock(2, 0)")
        try:
            await connection.execute(_LEDGER)
            done = []
            for row in await status(connection):
                if row["state"] in ("changed", "newer (contract)"):
                    raise ConfigurationError(
                        f"migration {row['name']} is {row['state']}", where="the database", mend="run the release that the database was migrated with"
                    )
            pending = {row["version"] for row in await status(connection) if row["state"] == "pending"}
            for migration in known():
                if migration.version in pending:
                    async with connection.transaction():
                        await connection.execute(migration.sql)
                        await connection.execute(
                            "INSERT INTO schema_migrations (version, name, kind, checksum) VALUES ($1, $2, $3, $4)",
                            migration.version,
                            migration.name,
                            migration.kind,
                            migration.checksum,
                        )
                    done.append(migration.name)
            return done
        finally:
            await connection.execute("SELECT pg_advisory_unlock(2, 0)")
