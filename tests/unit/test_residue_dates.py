"""The date until which a copy may still stand in a topic: a forecast, and never too early."""

from datetime import UTC, datetime, timedelta

import pytest

from sidecar.core.model import Scope, ScopeKind
from sidecar.kafka.admin import TopicInfo
from sidecar.postgres.views import Match, View
from sidecar.residue_topics import plan_view, retained_until

NOW = datetime(2026, 11, 24, tzinfo=UTC)
JANE = Scope(tenant="acme", kind=ScopeKind.SUBJECT, id="jane")
ACME = Scope.of_tenant("acme")
CONFIG = {"cleanup.policy": "compact,delete", "retention.ms": "7000", "segment.ms": "500", "max.compaction.lag.ms": "900"}


@pytest.mark.parametrize(
    ("config", "seconds"),
    [
        (CONFIG, 7.5),  # the newest record goes with its segment, which may go on for a segment.ms
        (CONFIG | {"retention.ms": "-1"}, None),
        (CONFIG | {"cleanup.policy": "compact"}, None),
        (CONFIG | {"retention.ms": str(2**63 - 1)}, None),
        ({"retention.ms": "1000"}, 604_801.0),
        ({}, None),
    ],
)
def test_retention_ends_with_the_segment(config: dict[str, str], seconds: float | None) -> None:
    assert retained_until(config, NOW) == (None if seconds is None else NOW + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("keys", "scope", "tenants", "method", "seconds"),
    [
        (("event",), ACME, ["*"], "tombstones", 1.0),
        (("source",), ACME, ["*"], "retention", 7.5),
        (("event", "source"), ACME, ["*"], "tombstones", 7.5),  # what stands under its source's key ends later
        (("stream",), JANE, ["*"], "retention", 7.5),
        (("stream", "event"), JANE, ["*"], "tombstones", 7.5),
        (("source",), ACME, ["acme"], "delete_records", 0.0),
    ],
)
def test_a_view_is_promised_by_its_slowest_key(keys: tuple[str, ...], scope: Scope, tenants: list[str], method: str, seconds: float) -> None:
    view = View(name="v", topic="t", partitions=1, keys=keys, matches=(Match(topics=["*"], classes=["*"], tenants=tenants),))
    planned = plan_view(view, TopicInfo(name="t", topic_id="id", partitions=1), CONFIG, {"0": 1}, scope, NOW)
    assert (planned.details["method"], planned.until) == (method, NOW + timedelta(seconds=seconds))
