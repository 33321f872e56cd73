"""Policy service. Each change moves the policy version and has a row of the history and of the audit, in one transaction."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from sidecar.core.errors import ConfigurationError, Conflict
from sidecar.core.model import UNCLASSIFIED
from sidecar.core.policy import Policy, Unmatched
from sidecar.core.store import DEFAULT_TENANT
from sidecar.ports import Clock
from sidecar.postgres import audit
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.errors import mapped
from sidecar.postgres.keystore import KeyStore, policy_from_row
from sidecar.settings import PolicySpec


async def list_policies(connection: Connection) -> list[dict[str, Any]]:
    """All rows, with the column names of the table."""
    with mapped():
        rows = await connection.fetch("SELECT * FROM encryption_policies ORDER BY stream_type_class, tenant_id")
    return [dict(row) for row in rows]


async def apply(
    connection: Connection, specs: Sequence[PolicySpec], *, actor: str, now: datetime, only_new: bool = False, reason: str = "configuration"
) -> list[Policy]:
    """Make the policies as written; answers those that changed. Live with the next batch of every instance."""
    changed: list[Policy] = []
    with mapped():
        async with connection.transaction():
            for spec in specs:
                policy = await _upsert(connection, spec, now, only_new)
                if policy is not None:
                    changed.append(policy)
            if changed:
                await _changed(connection, changed, actor=actor, now=now, reason=reason)
    return changed


async def _upsert(connection: Connection, spec: PolicySpec, now: datetime, only_new: bool) -> Policy | None:
    algorithm = spec.algorithm if spec.encrypt else None
    values = (
        spec.encrypt,
        algorithm,
        spec.key_scope,
        spec.rotation_days,
        spec.subject_extractor,
        list(spec.fields) or None,
        list(spec.blind_index) or None,
    )
    old = await connection.fetchrow(
        "SELECT * FROM encryption_policies WHERE tenant_id = $1 AND stream_type_class = $2 FOR UPDATE", spec.tenant, spec.stream_class
    )
    if old is None:
        row = await connection.fetchrow(
            """INSERT INTO encryption_policies (policy_id, stream_type_class, tenant_id, encryption_required, encryption_algorithm, key_scope,
                 key_rotation_interval_days, subject, fields, blind_index, created_at, updated_at) VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$11)
               ON CONFLICT DO NOTHING RETURNING *""",
            f"{spec.tenant}/{spec.stream_class}",
            spec.stream_class,
            spec.tenant,
            *values,
            now,
        )
        return policy_from_row(row) if row else None
    columns = ("encryption_required", "encryption_algorithm", "key_scope", "key_rotation_interval_days", "subject", "fields", "blind_index")
    before = tuple(old[name] for name in columns)
    if only_new or before == values:
        return None
    row = await connection.fetchrow(
        """UPDATE encryption_policies SET encryption_required = $2, encryption_algorithm = $3, key_scope = $4, key_rotation_interval_days = $5,
             subject = $6, fields = $7, blind_index = $8, version = version + 1, updated_at = $9 WHERE policy_id = $1 RETURNING *""",
        old["policy_id"],
        *values,
        now,
    )
    return policy_from_row(row)


class EncryptionPolicyService:
    """The plan's operations. Each change is validated, versioned, audited with who (`actor`) and why, and live with the next append or batch everywhere.

    A policy is of one tenant, or of all (`*`), and one class; there is one at most. Raises AccessDenied where the database role may not: the data
    plane's may create a policy that is missing, and change none.
    """

    def __init__(self, pool: Pool, clock: Clock, *, unmatched: Unmatched = "encrypt", classify: Callable[[str, str], str] | None = None) -> None:
        self._pool, self._clock, self._unmatched = pool, clock, unmatched
        self._classify = classify or (lambda _stream, _type: UNCLASSIFIED)

    async def create_policy(self, policy: PolicySpec, *, actor: str, reason: str) -> Policy:
        """Raises Conflict if the tenant has one of that class; what makes no policy is refused by PolicySpec itself."""
        async with transaction(self._pool) as connection:
            made = await _upsert(connection, policy, self._clock.now(), only_new=True)
            if made is None:
                raise Conflict(f"there is a policy of tenant {policy.tenant} for class {policy.stream_class} already; update it")
            await _changed(connection, [made], actor=actor, now=self._clock.now(), reason=reason)
        return made

    async def update_policy(self, policy_id: str, changes: Mapping[str, Any], *, actor: str, reason: str) -> Policy:
        """`changes` are fields of PolicySpec but class and tenant. Raises UnknownPolicy, and ConfigurationError for what makes no policy."""
        async with transaction(self._pool) as connection:
            spec = _spec(await _find(connection, policy_id)).model_dump(by_alias=True)
            if changes.keys() & {"class", "stream_class", "tenant"}:
                raise ConfigurationError("class and tenant name a policy, they do not change", where=policy_id, mend="create another policy")
            updated = await _upsert(connection, as_spec(spec | dict(changes), where=policy_id), self._clock.now(), only_new=False)
            if updated is None:
                return policy_from_row(await _find(connection, policy_id))
            await _changed(connection, [updated], actor=actor, now=self._clock.now(), reason=reason)
        return updated

    async def delete_policy(self, policy_id: str, *, actor: str, reason: str) -> None:
        """From then on `*`'s policy of the class counts, or `policies.unmatched`. A stream once encrypted stays encrypted. Raises UnknownPolicy."""
        async with transaction(self._pool) as connection:
            gone = policy_from_row(await _find(connection, policy_id))
            await connection.execute("DELETE FROM encryption_policies WHERE policy_id = $1", policy_id)
            await _changed(connection, [gone], actor=actor, now=self._clock.now(), reason=reason, deleted=True)

    async def get_policy(self, policy_id: str) -> Policy | None:
        """As it stands now; None if there is none of that id."""
        async with transaction(self._pool) as connection:
            row = await connection.fetchrow("SELECT * FROM encryption_policies WHERE policy_id = $1", policy_id)
        return None if row is None else policy_from_row(row)

    async def get_policy_for_stream(self, stream_id: str, tenant_id: str = DEFAULT_TENANT, event_types: Sequence[str] = ()) -> Policy | None:
        """By the stream's class: the one fixed by its first event, else what the class rules say of it. None: `policies.unmatched` decides."""
        async with transaction(self._pool) as connection:
            known = await connection.fetchval("SELECT stream_type_class FROM streams WHERE tenant_id = $1 AND stream_id = $2", tenant_id, stream_id)
        loaded = await KeyStore(self._pool).policies(self._unmatched)
        return loaded.find(tenant_id, known or self._classify(stream_id, event_types[0] if event_types else ""))

    async def list_policies(self, tenant_id: str | None = None) -> list[Policy]:
        """All, or those that can concern a tenant: its own, and those of `*`."""
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT * FROM encryption_policies WHERE $1::text IS NULL OR tenant_id IN ($1, '*') ORDER BY stream_type_class, tenant_id", tenant_id
            )
        return [policy_from_row(row) for row in rows]

    async def get_policies_for_stream_type(self, stream_type: str) -> list[Policy]:
        """Of a class: each tenant's own, and the one of `*`."""
        async with transaction(self._pool) as connection:
            rows = await connection.fetch("SELECT * FROM encryption_policies WHERE stream_type_class = $1 ORDER BY tenant_id", stream_type)
        return [policy_from_row(row) for row in rows]

    async def history(self, policy_id: str) -> list[dict[str, Any]]:
        """Every version that there was: what, who, why, when; oldest first."""
        async with transaction(self._pool) as connection:
            rows = await connection.fetch("SELECT * FROM policy_history WHERE policy_id = $1 ORDER BY policy_version", policy_id)
        return [dict(row) for row in rows]


class UnknownPolicy(ConfigurationError):
    """There is no such policy."""


def as_spec(document: Mapping[str, Any], *, where: str) -> PolicySpec:
    """A policy as a person wrote it. Raises ConfigurationError: what, where, how to mend."""
    try:
        return PolicySpec.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        at = ".".join(str(part) for part in first["loc"])
        mend = "a policy has class, tenant, encrypt, algorithm, key_scope, subject, rotation_days, fields, blind_index"
        raise ConfigurationError(first["msg"].removeprefix("Value error, "), where=f"{where}: {at}", mend=mend) from None


async def _find(connection: Connection, policy_id: str) -> Any:
    row = await connection.fetchrow("SELECT * FROM encryption_policies WHERE policy_id = $1 FOR UPDATE", policy_id)
    if row is None:
        raise UnknownPolicy("there is no such policy", where=policy_id, mend="`sidecar policy list` names them")
    return row


def _spec(row: Any) -> PolicySpec:
    policy = policy_from_row(row)
    return PolicySpec(
        stream_class=policy.stream_class, tenant=policy.tenant, encrypt=policy.encrypt, algorithm=policy.suite.label,
        key_scope=policy.key_scope.value, subject=policy.subject, rotation_days=policy.rotation_days, fields=policy.fields,
        blind_index=policy.blind_index,
    )  # fmt: skip


async def _changed(
    connection: Connection, policies: Sequence[Policy], *, actor: str, now: datetime, reason: str, deleted: bool = False
) -> None:  # fmt: skip
    """In the transaction of the change: the version that batches verify, the history, the audit row."""
    version = await connection.fetchval("UPDATE policy_version SET version = version + 1 RETURNING version")
    await connection.executemany(
        """INSERT INTO policy_history (policy_id, policy_version, definition, deleted, actor, reason, at) VALUES ($1, $2, $3, $4, $5, $6, $7)""",
        [(policy.policy_id, version, _summary(policy), deleted, actor, reason, now) for policy in policies],
    )
    details = {"policy_version": version, "policies": [_summary(policy) for policy in policies], "reason": reason, "deleted": deleted}
    await audit.append(connection, writer="policy", at=now, action="change_policies", actor=actor, tenant=None, details=details)


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
        "fields": list(policy.fields),
        "blind_index": list(policy.blind_index),
        "version": policy.version,
    }
