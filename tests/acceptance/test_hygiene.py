"""Promise: keys leave nothing behind: no copy in a process's memory after a shred, none in a core dump, none in what is printed or pickled."""

import asyncio
import copy
import os
import pickle
import resource
import secrets
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest

from sidecar.core.aead import KEY_BYTES, Suite, derive
from sidecar.core.keys import Dek, Kek, KeyName
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.streams import SealingKey, Tenant
from sidecar.keys import KeyManagement, dek_row, kek_row, open_dek
from sidecar.kms import open_kms
from sidecar.signing import create_signing_key
from tests.acceptance.world import World, blocking, until

STREAMS = ("aes-1", "chacha-1", "class-1", "tenant-1")


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def keys_of(world: World, tenant: str) -> dict[str, bytes]:
    """Every key of the tenant, unwrapped: its KEK, its DEKs, and of each DEK what the suites' ciphers were made of."""

    async def unwrapped() -> dict[str, bytes]:
        keys = KeyManagement(open_kms(world.settings.kms.uri))
        keks = {}
        for row in world.sql("SELECT * FROM tenant_keys WHERE tenant_id = $1", tenant):
            keks[row["kek_version"]] = await keys.open_kek(kek_row(row))
        out = {f"kek {version}": bytes(kek._secret) for version, kek in keks.items()}
        for row in world.sql("SELECT * FROM encryption_keys WHERE tenant_id = $1", tenant):
            dek = open_dek(keks, dek_row(row))
            out[f"dek {row['scope_id']}"] = bytes(dek._secret)
            for suite in Suite:
                out[f"suite {suite.label} {row['scope_id']}"] = bytes(derive(dek._secret, "enc", bytes([suite])))
        return out

    return blocking(unwrapped)


def regions(pid: int) -> Iterator[bytes]:
    """The writable private memory of a process, as it is now."""
    with ExitStack() as files:
        maps = files.enter_context(open(f"/proc/{pid}/maps"))
        memory = files.enter_context(open(f"/proc/{pid}/mem", "rb", buffering=0))
        for line in maps:
            span, permissions, *rest = line.split()
            if permissions.startswith("rw") and permissions.endswith("p") and "[vv" not in rest[-1]:
                first, end = (int(address, 16) for address in span.split("-"))
                try:
                    memory.seek(first)
                    yield memory.read(end - first)
                except OSError:  # unmapped meanwhile
                    continue


def found_in(pid: int, keys: dict[str, bytes]) -> set[str]:
    """Which keys' bytes stand somewhere in the process."""
    return {name for region in regions(pid) for name, key in keys.items() if key in region}


def busy(world: World, *, tenants: tuple[str, ...] = ("acme", "globex")) -> None:
    for n in range(50):
        for tenant in tenants:
            for stream in STREAMS:
                world.event(world.topic("in"), b"v%d" % n, tenant=tenant, stream=stream)
    world.settle()


@pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory takes root")
@pytest.mark.parametrize("restarted", [False, True], ids=["made here", "unwrapped here"])
def test_no_copy_of_a_shredded_tenants_keys_is_left_in_the_process(world: World, restarted: bool) -> None:
    """Nor of anything that its keys were derived to. The tenant has no more traffic, so nothing but the shred makes the process let go."""
    world.control()
    running = world.run()
    busy(world)
    if restarted:
        assert running.stop() == 0
        running = world.run()
        busy(world)
    keys = keys_of(world, "acme")
    others = keys_of(world, "globex")
    pid = running.process.pid
    before = found_in(pid, keys)
    # the control: the same search finds what is in use
    assert "kek 1" in before
    assert {name for name in before if name.startswith("suite")}
    assert world.carry_out("shred", Scope.of_tenant("acme"))["status"] == "inaccessible"
    until(lambda: not found_in(pid, keys), "the process to have no copy of the keys")
    assert found_in(pid, others)  # of those that live it still has


DEAF = """
import sys
from sidecar.cli import main
from sidecar.upkeep import Upkeep
Upkeep._heard = lambda *_: None
main(sys.argv[1:])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory takes root")
def test_control_a_process_that_does_not_hear_of_the_shred_has_the_keys_still(world: World) -> None:
    world.control()
    running = world.start("run", "--instance-id", f"{world.name}-deaf", code=DEAF).wait_ready()
    busy(world)
    keys = keys_of(world, "acme")
    assert world.carry_out("shred", Scope.of_tenant("acme"))["status"] == "inaccessible"
    world.event(world.topic("in"), b"v", tenant="globex", stream="aes-1")
    world.settle()
    assert found_in(running.process.pid, keys)


LIBRARY = """
import asyncio, sys
from pathlib import Path
from sidecar import NewEvent, library, open_library
from sidecar.settings import load

async def deaf(*_):
    await asyncio.Event().wait()

async def main(_, config, role):
    if role == "deaf":
        library._forget_what_changed = deaf
    async with open_library(load(Path(config)), writer=role) as opened:
        for tenant in ("acme", "globex"):
            for stream in ("aes-1", "aes-2"):
                if role != "reader":
                    await opened.store.append_to_stream(stream, [NewEvent(type="T", data=n) for n in range(20)], tenant=tenant)
                read = await opened.store.read_stream(stream, tenant=tenant)
                assert [event.data for event in read.events] == [*range(20)]
        del read
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory takes root")
def test_no_copy_of_a_shredded_tenants_keys_is_left_in_an_application_that_uses_the_library(world: World) -> None:
    """Two of them: one made the keys, one has only read. Neither asks for the tenant again."""
    world.control()
    pids = {role: world.start(role, code=LIBRARY).wait_ready().process.pid for role in ("writer", "reader")}
    keys, others = keys_of(world, "acme"), keys_of(world, "globex")
    before = {role: found_in(pid, keys) for role, pid in pids.items()}
    assert "kek 1" in before["writer"]
    for found in before.values():
        assert {name for name in found if name.startswith("suite")}
    assert world.carry_out("shred", Scope.of_tenant("acme"))["status"] == "inaccessible"
    for pid in pids.values():
        until(lambda pid=pid: not found_in(pid, keys), "the application to have no copy of the keys")  # type: ignore[misc]
        assert found_in(pid, others)


@pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory takes root")
def test_control_an_application_that_does_not_hear_of_the_shred_has_the_keys_still(world: World) -> None:
    world.control()
    pid = world.start("deaf", code=LIBRARY).wait_ready().process.pid
    keys = keys_of(world, "acme")
    assert world.carry_out("shred", Scope.of_tenant("acme"))["status"] == "inaccessible"
    assert found_in(pid, keys)


# ── what is printed, pickled, copied ────────────────────────────────────────────────────────────────────────────────────


def holders(folder: Path) -> dict[str, tuple[object, bytes]]:
    """Whatever holds a key → the object, the key's bytes."""
    name = KeyName(scope=Scope(tenant="acme", kind=ScopeKind.STREAM, id="s"), key_id=uuid4(), version=1, generation=1)
    secret = [secrets.token_bytes(KEY_BYTES) for _ in range(4)]
    kek, dek = Kek("acme", 1, 1, bytearray(secret[0])), Dek(name, bytearray(secret[1]))
    sealing = SealingKey(name.scope, name.key_id, 1, Suite.AES_256_GCM, b"", Suite.AES_256_GCM.cipher(secret[2]))
    in_hand = Kek("acme", 1, 1, bytearray(secret[3]))
    tenant = Tenant("acme", b"", b"", True, "active", 1, 1, frozenset(), keks={1: in_hand})
    signer = create_signing_key(folder / "signing")
    of_signer = signer._key.private_bytes_raw()
    return {
        "Kek": (kek, secret[0]),
        "Dek": (dek, secret[1]),
        "SealingKey": (sealing, secret[2]),
        "Tenant": (tenant, secret[3]),
        "Signer": (signer, of_signer),
    }


def forms(key: bytes) -> list[str]:
    """How bytes may look in text."""
    return [key.hex(), key.hex().upper(), repr(key)[2:-1], repr(bytearray(key))[12:-2]]


@pytest.mark.parametrize("kind", ["Kek", "Dek", "SealingKey", "Tenant", "Signer"])
def test_nothing_of_a_key_is_printed_pickled_or_copied(kind: str, tmp_path: Path) -> None:
    holder, key = holders(tmp_path)[kind]
    for text in (repr(holder), str(holder), f"{holder}"):
        assert not [form for form in forms(key) if form in text]
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        if kind == "Tenant" and leave is copy.copy:
            continue  # shares what it holds
        with pytest.raises(TypeError):
            leave(holder)  # type: ignore[operator]
    with pytest.raises(AttributeError) as caught:
        holder.missing  # type: ignore[attr-defined]  # noqa: B018
    shown = "".join(traceback.format_exception(caught.value))
    assert not [form for form in forms(key) if form in shown]


def test_control_a_holder_that_prints_its_key_is_seen() -> None:
    key = secrets.token_bytes(KEY_BYTES)
    assert [form for form in forms(key) if form in repr({"key": bytearray(key)})]


def test_a_kek_and_a_dek_are_wiped_where_they_stand() -> None:
    kek = Kek("acme", 1, 1, bytearray(secrets.token_bytes(KEY_BYTES)))
    payload = kek.payload()
    again = Kek.from_payload(payload, "acme", 1, 1)
    assert bytes(payload) == bytes(len(payload))
    name = KeyName(scope=Scope.of_tenant("acme"), key_id=uuid4(), version=1, generation=1)
    wrapped, committed = kek.wrap(bytearray(secrets.token_bytes(KEY_BYTES)), name, secrets.token_bytes(12))
    dek = again.unwrap(wrapped, name, committed)
    dek.into_cipher(Suite.CHACHA20_POLY1305)
    again.destroy()
    assert bytes(dek._secret) == bytes(again._secret) == bytes(KEY_BYTES)


# ── core dumps ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["run", "control"])
def test_a_process_that_holds_keys_dumps_no_core(world: World, command: str) -> None:
    started = world.run() if command == "run" else world.control()
    assert resource.prlimit(started.process.pid, resource.RLIMIT_CORE) == (0, 0)


def test_neither_does_a_command_that_decrypts(make_world: Callable[..., World]) -> None:
    world = make_world()

    async def limit() -> str:
        code = "import sys, resource; from sidecar.cli import main\ntry: main(['--config', sys.argv[1], 'config', 'validate'])\nfinally: print(resource.getrlimit(4))"
        process = await asyncio.create_subprocess_exec(os.sys.executable, "-c", code, str(world.config), stdout=asyncio.subprocess.PIPE)  # type: ignore[attr-defined]
        return (await process.communicate())[0].decode()

    assert blocking(limit).rstrip().endswith("(0, 0)")
