"""Policy service: install, list, apply. Each change moves the policy version and has an audit row, in one transaction."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sidecar.core.policy import Policy
from sidecar.postgres import audit
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped
from sidecar.postgres.keystore import policy_from_row
from sidecar.settings import PolicySpec


async def list_policies(connection: Connection) -> list[dict[str, Any]]:
    """All rows, with the column names of the table."""
    with mapped():
        rows = await connection.fetch("SELECT * FROM encryption_policies ORDER BY stream_type_class, tenant_id")
    return [dict(row) for row in rows]


async def apply(connection: Connection, specs: Sequence[PolicySpec], *, actor: str, now: datetime, only_new: bool = False) -> list[Policy]:
    """Make the policies as written; answers those that changed. Live with the next batch of every instance."""
    changed: list[Policy] = []
    with mapped():
        async with connection.transaction():
            for spec in specs:
                policy = await _upsert(connection, spec, now, only_new)
                if policy is not None:
                    changed.append(policy)
            if changed:
                version = await connection.fetchval("UPDATE policy_version SET version = version + 1 RETURNING version")
                details = {"policy_version": version, "policies": [_summary(policy) for policy in changed]}
                await audit.append(connection, writer="policy", at=now, action="change_policies", actor=actor, tenant=None, details=details)
    return changed


async def _upsert(connection: Connection, spec: PolicySpec, now: datetime, only_new: bool) -> Policy | None:
    algorithm = spec.algorithm if spec.encrypt else None
    values = (spec.encrypt, algorithm, spec.key_scope, spec.rotation_days, spec.subject_extractor)
    old = await connection.fetchrow(
        "SELECT * FROM encryption_policies WHERE tenant_id = $1 AND stream_type_class = $2 FOR UPDATE", spec.tenant, spec.stream_class
    )
    if old is None:
        row = await connection.fetchrow(
            """INSERT INTO encryption_policies (policy_id, stream_type_class, tenant_id, encryption_required, encryption_algorithm, key_scope,
                 key_rotation_interval_days, subject, created_at, updated_at) VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$9) ON CONFLICT DO NOTHING RETURNING *""",
            f"{spec.tenant}/{spec.stream_class}",
            spec.stream_class,
            spec.tenant,
            *values,
            now,
        )
        return policy_from_row(row) if row else None
    before = (old["encryption_required"], old["encryption_algorithm"], old["key_scope"], old["key_rotation_interval_days"], old["subject"])
    if only_new or before == values:
        return None
    row = await connection.fetchrow(
        """UPDATE encryption_policies SET encryption_required = $2, encryption_algorithm = $3, key_scope = $4, key_rotation_interval_days = $5,
             subject = $6, version = version + 1, updated_at = $7 WHERE policy_id = $1 RETURNING *""",
        old["policy_id"],
        *values,
        now,
    )
    return policy_from_row(row)


def _summary(policy: Policy) -> dict[str, Any]:
    return {
        "policy_id": policy.policy_id,
        "class": policy.stream_class,
        "tenant": policy.tenant,
        "encrypt": policy.encrypt,
        "algorithm": policy.suite.label,
        "key_scope": policy.key_scope.value,
        "subject": policy.subject,
        "rotation_days": policy.rotation_days,
        "version": policy.version,
    }
