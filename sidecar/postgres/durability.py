"""Whether a failover could lose what was promised: a shred's receipt, and the deletion of source records, count on the commit behind them."""

from sidecar import telemetry
from sidecar.core.errors import ConfigurationError
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

# Physical standbys: not a base backup that is being taken, not a subscriber of logical replication. A role that may not see the details
# sees the row all the same. (Who commits what must not be lost sets synchronous_commit = on for itself.)
_STANDBYS = """
SELECT count(*) AS standbys, current_setting('synchronous_standby_names') AS synchronous FROM pg_stat_replication r
WHERE coalesce(application_name, '') <> 'pg_basebackup' AND coalesce(state, '') <> 'backup'
  AND NOT EXISTS (SELECT FROM pg_replication_slots s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')"""


async def check_standby(connection: Connection, *, production: bool) -> None:
    """Where a standby streams, one must be synchronous. Raises ConfigurationError in production, warns in development."""
    with mapped():
        row = await connection.fetchrow(_STANDBYS)
    if row is None or not row["standbys"] or row["synchronous"].strip():
        return
    what = "a standby streams from this Postgres, and none is synchronous: after a failover a shred could be missing that has its receipt"
    if production:
        raise ConfigurationError(what, where="Postgres: synchronous_standby_names", mend="name the standby there; commits then wait for it")
    telemetry.log.warning(what, extra={"action": "start", "setting": "synchronous_standby_names"})
