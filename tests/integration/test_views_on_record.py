"""A view on record: what it was before stays there, since its topic holds what was put into it then."""

from typing import Any

import pytest

from sidecar import topics
from sidecar.core.model import Scope, ScopeKind
from sidecar.notices import erasing_keys
from sidecar.postgres.connection import Connection
from sidecar.postgres.views import Match, View, views_on_record
from sidecar.settings import Settings, ViewSettings
from sidecar.topics import record_views

ALL = Match(topics=["*"], classes=["*"], tenants=["*"])


async def recorded(connection: Connection, settings: Settings, **changes: Any) -> list[View]:
    view = ViewSettings.model_validate({"name": "v", "topic": "one", "partitions": 2} | changes)
    await record_views(connection, topics.views(settings.model_copy(update={"views": [view]}), {"one": 2, "two": 2}))
    return await views_on_record(connection)


async def test_every_topic_match_and_key_that_a_view_had_stays_on_record(connection: Connection, settings: Settings) -> None:
    assert await recorded(connection, settings) == [View(name="v", topic="one", partitions=2, keys=("event",), matches=(ALL,))]
    narrow = Match(topics=["*"], classes=["*"], tenants=["a"])
    [view] = await recorded(connection, settings, match={"tenants": ["a"]}, key="stream")
    assert (view.keys, view.matches) == (("stream", "event"), (narrow, ALL))
    two, one = await recorded(connection, settings, topic="two", match={"classes": ["C"]})
    assert (two.topic, two.keys, two.matches) == ("two", ("event",), (Match(topics=["*"], classes=["C"], tenants=["*"]),))
    assert (one.topic, one.keys, set(map(str, one.matches))) == ("one", ("event", "stream"), {str(narrow), str(ALL)})
    await record_views(connection, [])
    assert [view.topic for view in await views_on_record(connection)] == ["two", "one"], "also when it leaves the configuration"


async def test_instances_that_differ_in_their_configuration_do_not_fill_the_record(connection: Connection, settings: Settings) -> None:
    for _ in range(5):
        await recorded(connection, settings)
        [view] = await recorded(connection, settings, match={"tenants": ["a"]})
    assert {str(match) for match in view.matches} == {str(ALL), str(Match(topics=["*"], classes=["*"], tenants=["a"]))}
    assert len(view.matches) == 3


@pytest.mark.parametrize(
    ("kind", "erasing"), [(ScopeKind.TENANT, ["event", "stream"]), (ScopeKind.CLASS, ["event", "stream"]), (ScopeKind.SUBJECT, ["event"])]
)
def test_no_tombstone_is_written_under_a_key_that_is_not_the_scopes_alone(kind: ScopeKind, erasing: list[str]) -> None:
    view = View(name="v", topic="t", partitions=1, keys=("event", "stream", "source"), matches=(ALL,))
    assert erasing_keys(view, Scope(tenant="a", kind=kind, id="x")) == erasing
