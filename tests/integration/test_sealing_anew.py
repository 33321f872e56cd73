"""A worker seals what is the application's own, and nothing else; what it must leave alone stays as readable as it was."""

from typing import Any
from uuid import uuid4

import pytest

from sidecar import Event, Library, NewEvent, PolicySpec
from sidecar.core.errors import AuthenticationFailed
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import jobs
from sidecar.postgres.connection import transaction
from sidecar.reencryption import Reencryption

PLANTED = "UPDATE messages SET data = '\"planted\"', data_encrypted = NULL, metadata = '{}' WHERE stream_position = 2"


async def append(library: Library, *persons: str | None) -> None:
    events = [NewEvent(type="T", data={"n": n}, subject=person) for n, person in enumerate(persons)]
    await library.store.append_to_stream("old-1", events, tenant="acme", stream_class="Old")


async def work(library: Library, **how: Any) -> tuple[int, int]:
    """-> how many events were sealed anew, and how many left."""
    pool, command_id = library.plain.pool, uuid4()
    async with transaction(pool) as connection:
        await jobs.plan(connection, command_id, Scope(tenant="acme", kind=ScopeKind.STREAM, id="old-1"), **how)
    await Reencryption(pool, library.keys, worker="a test").work(command_id, 0)
    async with transaction(pool) as connection:
        [done] = await jobs.progress(connection, command_id)
    return done["resealed"], done["left_alone"]


async def decide(library: Library, **policy: Any) -> None:
    await library.policies.create_policy(PolicySpec.model_validate({"class": "Old"} | policy), actor="ann", reason="a test")


async def test_plaintext_that_was_planted_is_not_sealed_as_if_it_were_an_event(library: Library) -> None:
    await decide(library)
    await append(library, *[None] * 3)
    await library.plain.pool.execute(PLANTED)
    assert await work(library, plain=True) == (0, 1)
    assert (await work(library, plain=False, into="new-1"))[0] == 1, "a copy ends before it"
    with pytest.raises(AuthenticationFailed):
        await library.store.read_stream("old-1", tenant="acme")
    assert (await library.store.read_stream("new-1", tenant="acme")).version == 1


@pytest.mark.parametrize("persons", [("ann", None, "ann", None, "ann"), (None, "ann"), ("ann", None), (None, None)])
async def test_plain_events_that_name_nobody_stay_readable_where_persons_are_sealed_around_them(
    library: Library, persons: tuple[str | None, ...]
) -> None:
    await decide(library, encrypt=False)
    await append(library, *persons)
    await library.policies.update_policy("*/Old", {"encrypt": True, "key_scope": "subject"}, actor="ann", reason="a test")
    named = [person for person in persons if person]
    assert await work(library, plain=True) == (len(named), len(persons) - len(named))
    assert await work(library, plain=True) == (0, len(persons) - len(named))
    await append(library, "ann")
    read = await library.store.read_stream("old-1", tenant="acme")
    assert [event.data["n"] for event in read.events if isinstance(event, Event)] == [*range(len(persons)), 0]
    await library.plain.pool.execute(
        "UPDATE messages SET data = '1', data_encrypted = NULL WHERE stream_position = (SELECT max(stream_position) FROM messages)"
    )
    with pytest.raises(AuthenticationFailed):
        await library.store.read_stream("old-1", tenant="acme")
