"""Promise: no plaintext of encrypted streams and no key bytes in a dump, data files, WAL, logs or dead letters. The control shows that the scan can see."""

import asyncio
import base64
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.model import Scope, ScopeKind
from sidecar.keys import KeyManagement, dek_row, kek_row, open_dek
from sidecar.kms import open_for
from sidecar.testing.local_stack import LocalStack
from tests.acceptance.world import World, blocking, build


def forms(raw: bytes) -> list[bytes]:
    """A secret as it could stand in a file: raw, hex, Base64 (both alphabets; without the ends, which depend on what is around)."""
    return [raw, raw.hex().encode(), raw.hex().upper().encode(), base64.b64encode(raw)[:-4], base64.urlsafe_b64encode(raw)[:-4]]


def found_in(files: dict[str, bytes], secrets_by_name: dict[str, bytes]) -> set[tuple[str, str]]:
    """(secret, where) of all that is there to be found."""
    return {(name, where) for where, content in files.items() for name, raw in secrets_by_name.items() if any(f in content for f in forms(raw))}


def dump(world: World) -> bytes:
    """All rows of all tables as text, as pg_dump would write them."""
    tables = [
        row[0]
        for row in world.sql(
            "SELECT quote_ident(relname) FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace WHERE relkind = 'r' AND nspname = 'public'"
        )
    ]
    lines = [str(row[0]) for table in tables for row in world.sql(f"SELECT x::text FROM {table} x")]
    return "\n".join(lines).encode()


def everything_at_rest(world: World) -> dict[str, bytes]:
    """By place: the database's own files and WAL, a dump, our logs, the dead letter, receipts, control and view-less topics."""
    world.sql("CHECKPOINT")
    files: dict[str, bytes] = {"dump": dump(world)}
    for path in sorted((world.stack.dir / "postgres").rglob("*")):
        if path.is_file():
            part = "WAL" if "pg_wal" in path.parts else "data files"
            files[f"{part}: {path.name}"] = path.read_bytes()
    for plane in world.planes:
        files[f"log: {plane.log.name}"] = plane.log.read_bytes()
    for path in world.stack.dir.glob("*.log"):
        files[f"log: {path.name}"] = path.read_bytes()
    for topic in (world.settings.dead_letters.topic, world.settings.control.receipts):
        parts = [part for m in world.records(topic) for part in (m.key(), m.value(), *[v for _, v in m.headers() or ()]) if part]
        files[f"topic {topic}"] = b"\0".join(parts)
    return files


async def live_keys(world: World) -> dict[str, bytes]:
    """Every key of the store, opened; and the file's."""
    keys = KeyManagement(open_for(world.settings.kms, "reader"))
    out = {"kms": await asyncio.to_thread((world.folder / "kek").read_bytes)}
    out["kms"] = out["kms"][-32:]
    keks: dict[tuple[str, int], Any] = {}
    for row in world.sql("SELECT * FROM tenant_keys WHERE wrapped IS NOT NULL"):
        kek = keks[row["tenant_id"], row["kek_version"]] = await keys.open_kek(kek_row(row))
        out[f"kek {row['tenant_id']}"] = bytes(kek._secret)
    for row in world.sql("SELECT * FROM encryption_keys WHERE key_material IS NOT NULL"):
        kek = keks[row["tenant_id"], row["kek_version"]]
        out[f"dek {row['scope_id']}/{row['key_version']}"] = bytes(open_dek({kek.version: kek}, dek_row(row))._secret)
    return out


@pytest.fixture
def own_world(own_stack: LocalStack, tmp_path: Path, unique: Callable[[str], str]) -> Iterator[World]:
    world = build(own_stack, own_stack.dsn, tmp_path, unique("w"))
    try:
        yield world
    finally:
        world.close()


def test_no_canary_and_no_key_stands_at_rest_and_the_scan_finds_them_where_they_do(own_world: World) -> None:
    world = own_world
    canary = {name: f"{name}-{secrets.token_hex(16)}".encode() for name in ("value", "key", "header", "too-large", "bad-stream", "broken")}
    world.control(wait=False)
    world.run().wait_ready()
    for n in range(300):
        stream = ("aes", "chacha", "siv", "class", "tenant")[n % 5] + f"-{n % 20}"
        value = b'{"n": %d, "secret": "%s"}' % (n, canary["value"])
        world.event(world.topic("in"), value, stream=stream, key=canary["key"], headers=[("x-secret", canary["header"])])
    world.settle()
    identity = [("ce_id", b"i"), ("ce_type", b"T"), ("ce_tenantid", b"acme")]
    world.send(world.topic("in"), canary["bad-stream"], [*identity, ("ce_streamid", b"a\nb")])
    world.send(world.topic("in"), canary["too-large"] + bytes(2**20), [*identity, ("ce_streamid", b"aes-1")])
    world.send(world.topic("in"), canary["broken"], [("content-type", b"application/cloudevents+json")])
    world.settle()
    for scope in (Scope(tenant="acme", kind=ScopeKind.STREAM, id="aes-0"), Scope(tenant="acme", kind=ScopeKind.CLASS, id="Siv")):
        world.carry_out("rotate", scope)
    world.event(world.topic("in"), canary["value"], stream="aes-0")
    world.settle()
    world.planes[1].kill()
    world.run("two")
    world.event(world.topic("in"), canary["value"], stream="aes-0")
    world.settle()

    raw_keys = blocking(lambda: live_keys(world))
    assert len(raw_keys) > 10
    files = everything_at_rest(world)
    assert {where.split(":")[0].split(" ")[0] for where in files} == {"dump", "WAL", "data", "log", "topic"}
    assert len(world.dead_letters()) == 3
    assert found_in(files, canary | raw_keys) == set()

    # The control: the same canary in a class that policy leaves plain, and one key written down. The same scan finds both.
    world.event(world.topic("in"), canary["value"], stream="cart-1", key=canary["key"], headers=[("x-secret", canary["header"])])
    world.settle()
    leaked = next(name for name in raw_keys if name.startswith("dek"))
    world.sql("CREATE TABLE leak AS SELECT $1::bytea AS key", raw_keys[leaked])
    found = found_in(everything_at_rest(world), canary | raw_keys)
    assert {name for name, _ in found} == {"value", "key", "header", leaked}
    assert {where.split(":")[0] for name, where in found if name == "value"} == {"dump", "WAL", "data files"}
    assert {where.split(":")[0] for name, where in found if name == leaked} == {"dump", "WAL", "data files"}
