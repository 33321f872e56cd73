"""asyncpg's errors as ours, in one table; whatever is not named here is a defect and stays what it is."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import asyncpg

from sidecar.core.errors import AccessDenied, AuthenticationFailed, Conflict, RecordRefused, SidecarError, StoreUnavailable, WrongVersion

FENCED = "KS001"
"""SQLSTATE of `begin_batch` when a lease is somebody else's."""
REFUSED, MOVED, PLAINTEXT, VERSION, FORETOLD = "KS002", "KS003", "KS004", "KS005", "KS006"
"""SQLSTATEs of `append_events`."""


class Fenced(Conflict):
    """Another instance holds the lease of a partition."""


class Moved(Conflict):
    """The tenant's epoch or the policies are not those that the events were sealed with: reload the keys, seal again."""


class Overtaken(WrongVersion):
    """The data plane went beyond the version that is on the stream's record."""


class Foretold(StoreUnavailable):
    """The ledger has entries of a scope whose name is new to this database: the control plane must apply them first."""


_CONFLICT = (
    asyncpg.UniqueViolationError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
)
_UNAVAILABLE = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what its protocol raises where a connection is used in the moment in which the server ends it
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.QueryCanceledError,
    asyncpg.OutOfMemoryError,
    asyncpg.DiskFullError,
    asyncpg.ReadOnlySQLTransactionError,
    ConnectionError,
    OSError,
    TimeoutError,
)


_OURS: dict[str, Callable[[BaseException], SidecarError]] = {
    FENCED: lambda _: Fenced(),
    REFUSED: lambda error: RecordRefused(str(error)),  # the message is the reason, one of ours
    MOVED: lambda _: Moved(),
    PLAINTEXT: lambda _: AuthenticationFailed("plaintext for an encrypted stream"),
    VERSION: lambda error: WrongVersion(str(error)),
    FORETOLD: lambda error: Foretold(str(error)),
}


def translate(error: BaseException) -> SidecarError | None:
    """The product's error for one of asyncpg's, or None. Only class and SQLSTATE are kept: details quote rows."""
    state = getattr(error, "sqlstate", None) or ""
    name = f"{type(error).__name__}{f' ({state})' if state else ''}"
    if state in _OURS:
        return _OURS[state](error)
    if isinstance(error, _CONFLICT):
        constraint = getattr(error, "constraint_name", None)
        if constraint == "messages_pkey":
            return Overtaken()
        return Conflict(f"Postgres: {name}{f' on {constraint}' if constraint else ''}")
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        denied = re.match(r"permission denied for \w+ \w+$|must be owner of \w+ \w+$", str(error))
        return AccessDenied(f"Postgres: this role may not do that{f' ({denied.group()})' if denied else ''}; `sidecar db roles` sets rights")
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError | asyncpg.InvalidCatalogNameError):
        return StoreUnavailable(f"Postgres refused the connection: {name}; check user, password and database of the dsn")
    if isinstance(error, _UNAVAILABLE):
        return StoreUnavailable(f"Postgres: {name}")
    return None


@contextmanager
def mapped() -> Iterator[None]:
    """Every use of asyncpg stands in one of these."""
    try:
        yield
    except SidecarError:
        raise
    except Exception as error:
        ours = translate(error)
        if ours is None:
            raise
        raise ours from None
