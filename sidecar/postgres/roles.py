"""Database roles: what each plane may do, as group roles without a login; grant them to the users that the planes log in as.

    PREFIX_data       stores events and makes keys; deletes nothing, and touches no hold, command, fence or key that is gone
    PREFIX_control    carries out commands; adds to audit trail and ledger, and can change neither
    PREFIX_worker     what data may, and seals stored events anew; it neither shreds nor lifts a fence
    PREFIX_reader     reads through views in a schema of that name, of the one tenant in the session's `sidecar.tenant`, or of all where it is *
    PREFIX_migrator   owns the tables; a member of it runs `sidecar db migrate`

Row-level security of Postgres itself cannot stand on these tables: it forbids COPY FROM, which the data plane's speed comes from. Barrier
views give readers the same wall. Whoever may run SQL as a reader may also set `sidecar.tenant`: the wall is against mistakes.
"""

# ruff: noqa: S608 (names of roles and tables: the prefix is checked, the rest is from the catalogue or from here)

import re
from typing import Any, Final

from sidecar.core.errors import ConfigurationError
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

ROLES: Final = ("data", "control", "worker", "reader", "migrator")

DATA_READS = """tenants tenant_keys encryption_keys erased_scopes erased_refs encryption_policies policy_version streams stream_key_history
  source_topics messages partition_leases instances audit_log dead_letters refusals shred_barriers views seal_epochs ledger ledger_watermark
  legal_holds policy_history consumer_checkpoints consumer_set_aside schema_migrations foretold imports blind_index"""
NOT_FOR_DATA = "jobs control_cursors quarantined_keys commands receipts residue certificates audit_checkpoints"
_DATA_INSERTS = """tenants tenant_keys encryption_keys encryption_policies streams stream_key_history source_topics messages partition_leases
  instances audit_log dead_letters refusals views seal_epochs policy_history consumer_checkpoints consumer_set_aside foretold
  imports blind_index"""
_DATA_UPDATES = {
    "encryption_keys": "is_active, retired_at, uses_reserved, used_outside, outside_class",
    "streams": "position, is_encrypted, encrypted_from_position, encryption_key_id, encryption_algorithm, key_rotation_count, last_key_rotation",
    "stream_key_history": "used_to_position",
    "partition_leases": "epoch, owner, next_offset",
    "instances": "transactional_id, guard_pid, guard_started, state, heartbeat_at, kind",
    "views": "definition, topic, key_mode, earlier",
    "policy_version": "version",
    "ledger_watermark": "deployment, topic_id, next_offset, system_identifier, timeline",
    "imports": "after, imported, refused, updated_at, verified_at",
    "consumer_checkpoints": "transaction_id, global_position, listening_until, updated_at",
    "consumer_set_aside": "error, at",
    # a row lock needs the right to update some column: these mean nothing
    "encryption_policies": "updated_at",
    "seal_epochs": "created_at",
}
_WORKER_UPDATES = {
    "messages": "data, data_encrypted, metadata",
    "jobs": "state, attempts, resealed, left_alone, worker, done_at",
}
_CONTROL_DELETES = "messages, stream_key_history, quarantined_keys, residue, erased_refs, shred_barriers, foretold, blind_index"
_CONTROL_UPDATES_ONLY = {
    "audit_log": "",
    "schema_migrations": "",
    "certificates": "",
    "policy_history": "",
    "ledger": "published_at",
    "audit_checkpoints": "published_at",
}
_CONTROL_MAINTAINS = "tenant_keys, encryption_keys, quarantined_keys, messages, blind_index"
_HIDDEN = {"certificates": {"salt"}, "ledger": {"envelope", "command_id", "tenant_ref"}}
_FOR_ALL = {"ledger"}
"""A reader of one tenant must see which entries the database has, or it would take it for one that lacks them."""
_NOT_FOR_READERS = {"quarantined_keys"}

_TENANT = "current_setting('sidecar.tenant', true)"


async def statements(connection: Connection, prefix: str) -> list[str]:
    """The SQL that makes the roles, or makes them right again: run it after each migration. Raises ConfigurationError."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", prefix):
        raise ConfigurationError("the prefix is no plain name", where="--prefix", mend="letters, digits and _, in lower case")
    with mapped():
        schema = await connection.fetchval("SELECT quote_ident(current_schema())")
        version = await connection.fetchval("SELECT current_setting('server_version_num')::int / 10000")
        columns = await connection.fetch(
            """SELECT c.relname AS name, array_agg(a.attname::text ORDER BY a.attnum) AS columns FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
               WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped GROUP BY 1 ORDER BY 1"""
        )
        functions = await connection.fetch(
            "SELECT oid::regprocedure::text AS name FROM pg_proc WHERE pronamespace = current_schema()::regnamespace AND prokind = 'f' ORDER BY 1"
        )
    tables: dict[str, list[str]] = {row["name"]: row["columns"] for row in columns}
    if "legal_holds" not in tables:
        raise ConfigurationError("the database is not migrated", where="the database", mend="run `sidecar db migrate` first")
    role = {name: f"{prefix}_{name}" for name in ROLES}
    return [
        *(_create(name) for name in role.values()),
        f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {role['migrator']}",
        *(f"ALTER TABLE {name} OWNER TO {role['migrator']}" for name in tables),
        *(f"ALTER FUNCTION {row['name']} OWNER TO {role['migrator']}" for row in functions),
        f"GRANT USAGE ON SCHEMA {schema} TO {role['data']}, {role['control']}, {role['reader']}",
        f"REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM {role['data']}, {role['control']}, {role['worker']}, {role['reader']}",
        *_data(role["data"]),
        *_control(role["control"], list(tables), version),
        *_worker(role["worker"], role["data"]),
        *_reader(role["reader"], role["migrator"], schema, tables),
    ]


def _create(name: str) -> str:
    return f"DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{name}') THEN CREATE ROLE {name} NOLOGIN; END IF; END $$"


def _data(role: str) -> list[str]:
    return [
        f"GRANT SELECT ON {', '.join(DATA_READS.split())} TO {role}",
        f"GRANT INSERT ON {', '.join(_DATA_INSERTS.split())} TO {role}",
        *(f"GRANT UPDATE ({columns}) ON {table} TO {role}" for table, columns in _DATA_UPDATES.items()),
        f"GRANT DELETE ON consumer_set_aside TO {role}",
    ]


def _worker(role: str, data: str) -> list[str]:
    return [
        f"GRANT {data} TO {role}",
        f"GRANT SELECT ON jobs TO {role}",
        *(f"GRANT UPDATE ({columns}) ON {table} TO {role}" for table, columns in _WORKER_UPDATES.items()),
        f"GRANT DELETE ON stream_key_history TO {role}",
    ]


def _control(role: str, tables: list[str], version: int) -> list[str]:
    free = ", ".join(table for table in tables if table not in _CONTROL_UPDATES_ONLY)
    return [
        f"GRANT SELECT ON {', '.join(tables)} TO {role}",
        f"GRANT INSERT ON {', '.join(table for table in tables if table != 'schema_migrations')} TO {role}",
        f"GRANT UPDATE ON {free} TO {role}",
        *(f"GRANT UPDATE ({columns}) ON {table} TO {role}" for table, columns in _CONTROL_UPDATES_ONLY.items() if columns),
        f"GRANT DELETE ON {_CONTROL_DELETES} TO {role}",
        # it sees whose session holds the guard, and ends the one that does not let go
        f"GRANT pg_monitor, pg_signal_backend TO {role}",
        *([f"GRANT MAINTAIN ON {_CONTROL_MAINTAINS} TO {role}"] if version >= 17 else []),
    ]


def _reader(role: str, owner: str, schema: str, tables: dict[str, list[str]]) -> list[str]:
    views = [_view(role, schema, table, columns) for table, columns in tables.items() if table not in _NOT_FOR_READERS]
    return [
        f"DROP SCHEMA IF EXISTS {role} CASCADE",
        f"CREATE SCHEMA {role} AUTHORIZATION {owner}",
        *views,
        *(f"ALTER VIEW {role}.{table} OWNER TO {owner}" for table in tables if table not in _NOT_FOR_READERS),
        f"GRANT USAGE ON SCHEMA {role} TO {role}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {role} TO {role}",
    ]


def _view(role: str, schema: str, table: str, columns: list[str]) -> str:
    shown = ", ".join(f'"{column}"' for column in columns if column not in _HIDDEN.get(table, ()))
    if table in _FOR_ALL:
        own = "true"
    elif "tenant_id" in columns:
        shared = " OR t.tenant_id = '*'" if table == "encryption_policies" else " OR t.tenant_id IS NULL" if table == "seal_epochs" else ""
        own = f"({_TENANT} IN (t.tenant_id, '*'){shared})"
    elif "tenant_ref" in columns:
        own = f"({_TENANT} = '*' OR t.tenant_ref = {schema}.tenant_ref({_TENANT}))"
    elif "command_id" in columns:
        own = f"({_TENANT} = '*' OR EXISTS (SELECT FROM {schema}.commands c WHERE c.command_id = t.command_id AND c.tenant_id = {_TENANT}))"
    else:
        own = "true"
    return f"CREATE VIEW {role}.{table} WITH (security_barrier) AS SELECT {shown} FROM {schema}.{table} t WHERE {own}"


async def apply(connection: Connection, prefix: str) -> list[dict[str, Any]]:
    """In one transaction; -> the roles, as rows for people. Raises AccessDenied: it takes a role that may make roles and own the tables."""
    with mapped():
        async with connection.transaction():
            for statement in await statements(connection, prefix):
                await connection.execute(statement)
    return [{"role": f"{prefix}_{name}", "setting": f"postgres.dsn_{name}"} for name in ROLES]
