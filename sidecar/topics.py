"""The topics that the product needs, as they are and as they should be; views on record with their partition counts."""

from collections.abc import Sequence
from typing import Any

from sidecar.core.errors import ConfigurationError
from sidecar.kafka import jobs, ledger
from sidecar.kafka.admin import Admin
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped
from sidecar.settings import Settings
from sidecar.views import View, topic_config


def wanted(settings: Settings) -> dict[str, tuple[int, dict[str, str]]]:
    """Topic → partitions, configuration. Source topics are the application's and not among them."""
    out = {view.topic: (view.partitions, topic_config(view, int(settings.limits.max_record_bytes))) for view in settings.views}
    forever = {"cleanup.policy": "delete", "retention.ms": "-1"}
    out[settings.control.topic] = (1, {"cleanup.policy": "delete", "retention.ms": "604800000"})
    out[settings.control.receipts] = (1, forever)
    out[settings.control.ledger] = (ledger.PARTITIONS, dict(ledger.CONFIG))
    out[settings.audit.topic] = (1, forever)
    out[settings.jobs.topic] = (settings.jobs.partitions, dict(jobs.CONFIG))
    out[settings.dead_letters.topic] = (1, {"cleanup.policy": "delete", "retention.ms": "2592000000"})
    return out


def plan(settings: Settings, admin: Admin) -> list[dict[str, Any]]:
    """A row per topic: what stands and what is to be done (none, create, or what a person must decide). Blocks."""
    topics = wanted(settings)
    found = admin.describe(topics)
    out: list[dict[str, Any]] = []
    for topic, (partitions, config) in topics.items():
        row: dict[str, Any] = {"topic": topic, "action": "none", "partitions": partitions, "config": config, "differs": {}}
        if topic not in found:
            row["action"] = "create"
        else:
            now = admin.topic_config(topic)
            row["differs"] = {name: now.get(name) for name, value in config.items() if now.get(name) != value}
            if found[topic].partitions != partitions:
                row["differs"]["partitions"] = found[topic].partitions
            if row["differs"]:
                row["action"] = "differs"
        out.append(row)
    return out


def apply(settings: Settings, admin: Admin) -> list[dict[str, Any]]:
    """Create what is missing; what stands with other settings is shown, not changed. Blocks."""
    rows = plan(settings, admin)
    for row in rows:
        if row["action"] == "create":
            made = admin.create(row["topic"], row["partitions"], row["config"])
            row["action"] = "created" if made else "none"
    return rows


def views(settings: Settings, found: dict[str, int]) -> list[View]:
    """The configured views, on topics that have so many partitions. Raises ConfigurationError for a topic that is not there."""
    for view in settings.views:
        if view.topic not in found:
            raise ConfigurationError(
                f"the topic {view.topic} of view {view.name} does not exist", where=f"views: {view.name}", mend="run `sidecar topics apply`"
            )
    return [View(view, found[view.topic]) for view in settings.views]


async def record_views(connection: Connection, configured: Sequence[View]) -> None:
    """Put the views on record with the partitions that their topics have; refuse one that has changed since.

    A tombstone is sent to the partition that its event went to, so the count a view began with is the one for good. Topic, key and match
    may change; the ones before stay on record, because what they put into a topic stays there.
    """
    for view, partitions in ((v.settings, v.partitions) for v in configured):
        with mapped():
            recorded = await connection.fetchval(
                """INSERT INTO views AS v (name, topic, partitions, key_mode, definition) VALUES ($1,$2,$3,$4,$5)
                   ON CONFLICT (name) DO UPDATE SET definition = excluded.definition, topic = excluded.topic, key_mode = excluded.key_mode,
                     earlier = CASE WHEN v.earlier @> view_was(v) OR view_was(v) = view_was(excluded) THEN v.earlier ELSE v.earlier || view_was(v) END
                   RETURNING partitions""",
                view.name,
                view.topic,
                partitions,
                view.key,
                view.model_dump(mode="json"),
            )
        if recorded != partitions:
            raise ConfigurationError(
                f"view {view.name} began with {recorded} partitions, its topic has {partitions} now",
                where=f"views: {view.name}",
                mend="give the view a new name and topic: its old records could not be erased otherwise",
            )
