"""The compliance report: what is encrypted by which policy, with which keys, what was shredded on whose word, and what was refused.

A report of one tenant holds nothing of another: policies for every tenant (`*`) and figures of the deployment itself are all that it shares.
"""

from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any, Final

from sidecar.core.command import rfc3339, stored
from sidecar.core.errors import ConfigurationError
from sidecar.postgres import reports
from sidecar.postgres.connection import Connection
from sidecar.settings import Settings

ROWS: Final = 500
"""Of a section; the total is said beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Its rows are of one shape. `now`: it tells how things stand, not what happened in the period."""

    name: str
    title: str
    about: str
    now: bool = False


SECTIONS: Final = (
    Section(
        name="policies", title="Policies in force", about="What is encrypted, how, and how often its keys change. Tenant * is for all.", now=True
    ),
    Section(name="policy_changes", title="Policy changes", about="From the audit trail."),
    Section(name="streams", title="Streams by class", about="A stream that is encrypted once stays encrypted.", now=True),
    Section(
        name="keys", title="Keys", about="By what they protect and how they stand. A destroyed key cannot be had back from this system.", now=True
    ),
    Section(name="rotations_due", title="Rotations due", about="Live keys that are older than their policy allows.", now=True),
    Section(name="rotations", title="Rotations done", about="On command, and by the timer."),
    Section(
        name="shreds",
        title="Shreds",
        about="Outstanding: places where copies outlive the keys, as residue below. A certificate can be checked offline.",
    ),
    Section(
        name="residue",
        title="Residue",
        about="Where copies outlive destroyed keys, until when; of the period's shreds, and whatever is still pending.",
    ),
    Section(name="holds", title="Legal holds", about="In force at some time of the period. What is under a hold is not shredded."),
    Section(
        name="readmissions",
        title="Readmissions",
        about="Scopes that take new data again. Their old data stay unreadable, unless a shred was taken back within its grace.",
    ),
    Section(name="refused_commands", title="Commands refused", about="Not carried out; nothing was changed by them."),
    Section(name="refusals", title="Records refused", about="By decision: of shredded scopes, or by policy. Their payload was not kept."),
    Section(name="dead_letters", title="Dead letters", about="Records that could not be stored as events."),
    Section(name="actors", title="Who did what", about="Every act in the audit trail, by actor."),
    Section(name="acts", title="Acts", about="The newest of them. `sidecar audit verify` checks the trail they are from."),
    Section(name="seal_epochs", title="Seal epochs", about="The versions of the KMS key that wrap or wrapped tenant keys.", now=True),
)


async def report(connection: Connection, settings: Settings, tenant: str | None, start: datetime, end: datetime, now: datetime) -> dict[str, Any]:
    """Of a tenant, or of all where it is None. Raises ConfigurationError for a tenant that there never was."""
    state = None
    if tenant is not None:
        state = await reports.known(connection, tenant)
        if state is None:
            raise ConfigurationError(
                f"there is no tenant {tenant!r}", where="--tenant", mend="`sidecar keys list` and `status` show those that there are"
            )
    found, figures = await reports.sections(connection, tenant, start, end, ROWS)
    checkpoint = await reports.last_checkpoint(connection)
    out: dict[str, Any] = {
        "deployment": settings.deployment,
        "tenant": tenant,
        "tenant_state": state,
        "from": rfc3339(start),
        "to": rfc3339(end),
        "generated_at": rfc3339(now),
        "software_version": version("sidecar"),
        "audit_checkpoint_at": rfc3339(checkpoint) if checkpoint else None,
        "totals": {section.name: found[section.name].total for section in SECTIONS},
        "summary": _summary(found) | figures,
    }
    return out | {section.name: [_shown(row, tenant) for row in found[section.name].rows] for section in SECTIONS}


def _shown(row: dict[str, Any], tenant: str | None) -> dict[str, Any]:
    """A row for people: who asked from the command itself, a scope in one word, no tenant column where there is one tenant."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if name == "payload":
            command = stored(value)
            out |= {"requested_by": command.requested_by, "reason": command.reason, "ticket": command.ticket}
        elif name == "scope":
            scope = value or {}
            out[name] = f"{scope['kind']} {scope['id']}" if scope.get("id") and scope.get("kind") != "tenant" else scope.get("kind")
        elif name != "tenant" or tenant is None:
            out[name] = value
    return out


def _summary(found: dict[str, reports.Rows]) -> dict[str, int]:
    """The figures at the top that follow from what the sections show."""
    keys = found["keys"].rows
    return {
        "shreds": found["shreds"].total,
        "keys_active": sum(row["keys"] for row in keys if row["state"] == "active"),
        "keys_destroyed": sum(row["keys"] for row in keys if row["state"] not in ("active", "retired")),
        "rotations_done": found["rotations"].total,
        "rotations_due": sum(row["keys"] for row in found["rotations_due"].rows),
        "commands_refused": found["refused_commands"].total,
        "records_refused": sum(row["records"] for row in found["refusals"].rows),
        "dead_letters": sum(row["records"] for row in found["dead_letters"].rows),
    }
