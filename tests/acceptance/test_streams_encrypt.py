"""Promise: plain events of a class that policy encrypts by now are sealed in place, by `sidecar streams encrypt`; no plaintext stays in the table."""

import asyncio

import pytest

from sidecar import Library, NewEvent, PolicySpec, open_library
from sidecar.core.errors import AuthenticationFailed
from sidecar.reencryption import Reencryption
from tests.acceptance.key_history import key_history_faults
from tests.acceptance.test_reencryption import DIES, paused, stored
from tests.acceptance.world import World

EMAIL = "jane@example.org"


async def write(library: Library, stream: str, count: int) -> None:
    for at in range(0, count, 400):
        events = [NewEvent(type="T", data={"email": EMAIL, "n": n}, metadata={"by": EMAIL}) for n in range(at, min(at + 400, count))]
        await library.store.append_to_stream(stream, events, tenant="acme", stream_class="Old")


async def prepare(world: World, *, decided: bool = True) -> None:
    """900 plain events, a tombstone, and (`decided`) a policy that encrypts their class from now on, and one event that came after it."""
    async with open_library(world.settings, writer="library-test") as library:
        await library.policies.create_policy(PolicySpec.model_validate({"class": "Old", "encrypt": False}), actor="a test", reason="a test")
        await write(library, "old-1", 900)
        await library.store.append_to_stream("old-1", [NewEvent(type="T", data=None)], tenant="acme")
        await write(library, "old-2", 3)
        if decided:
            await decide(library)
            await write(library, "old-1", 1)


async def decide(library: Library) -> None:
    found = next(policy for policy in await library.policies.list_policies() if policy.stream_class == "Old")
    await library.policies.update_policy(found.policy_id, {"encrypt": True, "algorithm": "ChaCha20-Poly1305"}, actor="a test", reason="a test")


def plaintext(world: World) -> int:
    """Rows with something readable in them."""
    return int(
        world.value(
            "SELECT count(*) FROM messages WHERE data_encrypted IS NULL OR data IS NOT NULL OR metadata IS NOT NULL"
            " OR position('jane'::bytea IN data_encrypted) > 0"
        )
    )


def test_plain_events_are_sealed_in_place_and_read_as_before(world: World) -> None:
    asyncio.run(prepare(world))
    world.control()
    world.start("worker", "--instance-id", "one").wait_ready()
    before, opened = stored(world), world.events("acme")
    assert plaintext(world) == 904
    said = world.json("streams", "encrypt", "--class", "Old", "--reason", "a test", "--wait", "100")
    assert (said["status"], said["events"]["resealed"], said["events"]["left"]) == ("done", 904, 0)
    assert plaintext(world) == 0
    assert (stored(world), world.events("acme")) == (before, opened)
    assert key_history_faults(world) == []
    assert {tuple(row) for row in world.sql("SELECT is_encrypted, encrypted_from_position FROM streams")} == {(True, 1)}


def test_a_class_that_policy_leaves_plain_stays_plain(world: World) -> None:
    asyncio.run(prepare(world, decided=False))
    world.control()
    world.start("worker", "--instance-id", "one").wait_ready()
    said = world.json("streams", "encrypt", "--class", "Old", "--tenant", "acme", "--reason", "a test", "--wait", "100")
    assert (said["status"], said["events"]["resealed"]) == ("done", 0)
    assert plaintext(world) == 904


def test_a_killed_conversion_is_readable_throughout_and_is_ended_by_another_worker(world: World) -> None:
    asyncio.run(prepare(world))
    world.control()
    before, opened = stored(world), world.events("acme")
    dying = world.start("worker", "--instance-id", "first", code=DIES.format("worker:rows"))
    command_id = world.json("streams", "encrypt", "--class", "Old", "--reason", "a test")["command_id"]
    assert dying.process.wait(120) == -9, dying.text()[-2000:]
    assert 0 < plaintext(world) < 904
    assert world.events("acme") == opened, "half of it is sealed, all of it opens"
    world.start("worker", "--instance-id", "second").wait_ready()
    assert world.receipt(command_id, ("done",))["events"]["resealed"] == 904
    assert plaintext(world) == 0
    assert (stored(world), world.events("acme")) == (before, opened)
    assert key_history_faults(world) == []


def test_plaintext_does_not_go_where_what_was_written_does_not_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the look before the plaintext goes: a sealer that writes for another place."""
    asyncio.run(prepare(world))
    monkeypatch.setattr(
        "sidecar.reencryption.Sealer.seal", lambda self, cipher, prefix, aad, plain: prefix + bytes(12) + cipher.encrypt(bytes(12), plain, b"")
    )

    async def main() -> None:
        async with paused(world, Reencryption, lambda: None, stream="old-2", plain=True) as (work, command_id):
            await work.work(command_id, 0)

    with pytest.raises(AuthenticationFailed):
        asyncio.run(main())
    assert plaintext(world) == 904
