"""asyncpg's errors as ours, in one table; whatever is not named here is a defect and stays what it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from sidecar.core.errors import AccessDenied, Conflict, SidecarError, StoreUnavailable

FENCED = "KS001"
"""SQLSTATE of `begin_batch` when a lease is somebody else's."""


class Fenced(Conflict):
    """Another instance holds the lease of a partition."""


_CONFLICT = (
    asyncpg.UniqueViolationError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
)
_UNAVAILABLE = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
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


def translate(error: BaseException) -> SidecarError | None:
    """The product's error for one of asyncpg's, or None. Only class and SQLSTATE are kept: details quote rows."""
    state = getattr(error, "sqlstate", None) or ""
    name = f"{type(error).__name__}{f' ({state})' if state else ''}"
    if state == FENCED:
        return Fenced()
    if isinstance(error, _CONFLICT):
        constraint = getattr(error, "constraint_name", None)
        return Conflict(f"Postgres: {name}{f' on {constraint}' if constraint else ''}")
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return AccessDenied("Postgres: this role may not do that")
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
