"""Views on record, as SQL: what a shred must reach, whatever the configuration says today. How they come there: `topics.record_views`."""

from dataclasses import dataclass, replace

from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Globs: what is to stand in a view."""

    topics: list[str]
    classes: list[str]
    tenants: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A view topic, with every match and every key mode that it has had: its records stay when those change. The present ones come first."""

    name: str
    topic: str
    partitions: int
    keys: tuple[str, ...]
    matches: tuple[Match, ...]


async def views_on_record(connection: Connection) -> list[View]:
    """The newest first."""
    with mapped():
        rows = await connection.fetch(
            """SELECT v.name, v.partitions, d.* FROM views v CROSS JOIN LATERAL (
                 SELECT v.topic, v.key_mode, v.definition->'match' AS match, 0 AS age
                 UNION ALL SELECT e.was->>'topic', e.was->>'key', e.was->'match', e.age FROM jsonb_array_elements(v.earlier) WITH ORDINALITY e(was, age)
               ) d ORDER BY v.created_at DESC, v.name, d.age"""
        )
    found: dict[str, View] = {}
    for row in rows:
        match = Match(**{name: (row["match"] or {}).get(name) or ["*"] for name in ("topics", "classes", "tenants")})
        view = found.get(row["topic"]) or View(name=row["name"], topic=row["topic"], partitions=row["partitions"], keys=(), matches=())
        keys = view.keys if row["key_mode"] in view.keys else (*view.keys, row["key_mode"])
        found[view.topic] = replace(view, keys=keys, matches=(*view.matches, match))
    return list(found.values())
