"""Tenants of so many streams, each with its key, its history and one event, straight into the tables."""

import secrets

from sidecar.postgres.connection import Connection, connected

_TENANT = """
INSERT INTO tenants (tenant_id) VALUES ($1)"""
_KEK = """
INSERT INTO tenant_keys (tenant_id, generation, kek_version, kms_uri, kms_key_version, wrapped, fingerprint, state)
VALUES ($1, 1, 1, 'file:seeded', '1', $2, $3, 'active')"""
_KEYS = """
INSERT INTO encryption_keys (tenant_id, key_id, key_version, scope_kind, scope_id, generation, kek_version, key_material, commitment)
SELECT $1, md5($1 || n)::uuid, 1, 'stream', 's' || n, 1, 1, $3::bytea, sha256(n::text::bytea) FROM generate_series(1, $2::int) n"""
_STREAMS = """
INSERT INTO streams (tenant_id, stream_id, position, stream_type_class, is_encrypted, encrypted_from_position, encryption_key_id, encryption_algorithm)
SELECT $1, 's' || n, 1, 'Bench', true, 1, md5($1 || n)::uuid, 'AES-256-GCM' FROM generate_series(1, $2::int) n"""
_HISTORY = """
INSERT INTO stream_key_history (tenant_id, stream_id, key_id, key_version, used_from_position)
SELECT $1, 's' || n, md5($1 || n)::uuid, 1, 1 FROM generate_series(1, $2::int) n"""
_EVENTS = """
INSERT INTO messages (tenant_id, stream_id, stream_position, message_id, message_type, data_encrypted)
SELECT $1, 's' || n, 1, 'm' || n, 'T', '\\x4b53010100'::bytea || uuid_send(md5($1 || n)::uuid) || '\\x00000001'::bytea || $3::bytea
FROM generate_series(1, $2::int) n"""


async def seed(connection: Connection, tenant: str, streams: int) -> None:
    """Bytes that nobody can open: enough to be counted, listed and shredded."""
    await connection.execute(_TENANT, tenant)
    await connection.execute(_KEK, tenant, secrets.token_bytes(60), secrets.token_bytes(32))
    await connection.execute(_KEYS, tenant, streams, secrets.token_bytes(92))
    await connection.execute(_STREAMS, tenant, streams)
    await connection.execute(_HISTORY, tenant, streams)
    await connection.execute(_EVENTS, tenant, streams, secrets.token_bytes(200))


async def seed_all(dsn: str, sizes: list[int]) -> None:
    """`large-<size>` each."""
    async with connected(dsn) as connection:
        await connection.execute("SET synchronous_commit = off")
        for size in sizes:
            await seed(connection, name(size), size)
        await connection.execute("VACUUM ANALYZE")


def name(size: int) -> str:
    return f"large-{size}"
