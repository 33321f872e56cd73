"""Legal holds: which are in force, and whether one stands in the way. In the caller's transaction, with the tenant's row locked.

A hold overlaps a shred if there is data that both are about: a tenant's hold covers all that is in it, a stream lies in its class, and
a person's events lie in every stream that the person's key was used in.
"""

from sidecar.core.errors import CommandRejected
from sidecar.core.model import Scope
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped


# Whether the scope (kind, id) has to do with the stream s of the tenant $1.
def _touches(kind: str, scope_id: str) -> str:
    return f"""CASE {kind}
          WHEN 'stream' THEN s.stream_id = {scope_id}
          WHEN 'class' THEN s.stream_type_class = {scope_id}
          WHEN 'subject' THEN EXISTS (
            SELECT FROM stream_key_history u JOIN encryption_keys k USING (tenant_id, key_id, key_version)
            WHERE u.tenant_id = $1 AND u.stream_id = s.stream_id AND k.scope_kind = 'subject' AND k.scope_id = {scope_id})
        END"""


_OVERLAPPING = f"""
  SELECT hold_id, reason FROM legal_holds h
  WHERE h.tenant_id = $1 AND h.released_at IS NULL AND (
    'tenant' IN (h.scope_kind, $2::text) OR (h.scope_kind, h.scope_id) = ($2, $3) OR (
      h.scope_kind <> $2 AND EXISTS (SELECT FROM streams s WHERE s.tenant_id = $1
        AND {_touches("$2", "$3")}
        AND {_touches("h.scope_kind", "h.scope_id")})))
  ORDER BY placed_at, hold_id"""  # noqa: S608 (constants)


async def refuse_held(connection: Connection, scope: Scope) -> None:
    """Raises CommandRejected (`legal_hold`) with reasons and hold ids if any hold in force overlaps the scope.

    Call it in the transaction of what cannot be taken back, after `shreds.lock_tenant`: a hold is placed under the same lock, so one that
    has its receipt is seen here.
    """
    with mapped():
        held = await connection.fetch(_OVERLAPPING, scope.tenant, scope.kind.value, scope.id)
    if held:
        reasons = "; ".join(f"{row['reason']} (hold {row['hold_id']})" for row in held[:5])
        more = f" and {len(held) - 5} more" if len(held) > 5 else ""
        raise CommandRejected("legal_hold", f"a legal hold is in force: {reasons}{more}", holds=[str(row["hold_id"]) for row in held])
