"""The seams. A flow sees these Protocols; adapters and the memory twins in `sidecar.testing` implement them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, Protocol, TypeVar

from sidecar.core.kms import KmsTraits, KmsVersion
from sidecar.core.model import Erased, Event
from sidecar.core.store import DEFAULT_TENANT, Aggregated, Appended, Cursor, Expected, ExpectedVersion, NewEvent, StreamRead, Unreadable

State = TypeVar("State")


class Kms(Protocol):
    """Holds the key that never leaves it. Every call may raise KmsUnavailable; nobody reads that as erased.

    A seal epoch is what `wrap` names: a version of one key, or, where versions cannot be destroyed, one of successive keys.
    """

    @property
    def uri(self) -> str:
        """Which KMS and key, without secrets: stored in tenant_keys.kms_uri and seal_epochs.kms_uri."""

    @property
    def traits(self) -> KmsTraits:
        """What destroying means at this provider."""

    async def wrap(self, plaintext: bytes | bytearray, aad: bytes) -> tuple[bytes, str]:
        """-> (ciphertext, version of the KMS key that wraps it: the seal epoch)."""

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes | bytearray:
        """The plaintext; as a bytearray, where it can be, for the caller to wipe. Raises AuthenticationFailed for altered bytes, KeyShredded only when the version is destroyed for good."""

    async def check(self, *, destroys: bool = False) -> None:
        """Reaches the key or raises; called at start and by the readiness probe. Raises ConfigurationError for a key that can leave the KMS.

        `destroys`: this identity must be able to destroy it, too (the control plane's start).
        """

    async def current(self) -> str:
        """The newest version: what `wrap` uses, or refuses to when that one is destroyed. Never an older one, whose seal epoch is over."""

    async def add_version(self) -> str:
        """A new seal epoch, which `wrap` uses from now on. Raises AccessDenied without the right to."""

    async def version(self, key_version: str, *, scheduled: datetime | None = None) -> KmsVersion:
        """Where a version stands. Raises KmsUnavailable for one that is not found: unknown is not destroyed.

        `scheduled`: the `irrecoverable_at` that an earlier answer gave and the caller has on record. Where a KMS forgets a key with its
        destruction (AWS), not to be found counts as destroyed with such a record only, and only after that moment.
        """

    async def destroy(self, key_version: str) -> KmsVersion:
        """Ask for its destruction; repeatable. What came of it is in the answer's `state`: only `destroyed` is destroyed."""

    async def may_destroy(self) -> bool:
        """Has this identity the right to destroy? The control plane must have it, the data plane must not."""

    async def dedicated(self, tenant: str) -> "Kms":
        """The same provider on a key of this tenant alone. Where there never was one, `wrap` and `current` make it; nothing else does."""


class Clock(Protocol):
    """Time as an argument: taken once for a batch or a step."""

    def now(self) -> datetime:
        """Aware, in UTC."""


class EventStore(Protocol):
    """What `create_crypto_event_store` decorates, and what it gives. Positions count from 1 without gaps; a version is the last position.

    `session` is a unit of work of the store: what was appended in it is there when its block ends well, and gone when it does not.
    """

    def session(self) -> AbstractAsyncContextManager[Any]:
        """A session, for the length of a block; its appends become visible together."""

    async def append_to_stream(
        self,
        stream: str,
        events: Sequence[NewEvent],
        *,
        tenant: str = DEFAULT_TENANT,
        stream_class: str | None = None,
        expected_version: ExpectedVersion = Expected.ANY,
        session: Any = None,
    ) -> Appended:
        """All of the events, or none. `stream_class` counts at a stream's first event. Raises WrongVersion, RecordRefused, Unavailable."""

    async def read_stream(
        self,
        stream: str,
        *,
        tenant: str = DEFAULT_TENANT,
        from_position: int = 1,
        to_position: int | None = None,
        max_count: int | None = None,
        session: Any = None,
    ) -> StreamRead:
        """Events by position, both ends included. A stream that is not there reads as version 0. Raises AuthenticationFailed, Unavailable."""

    async def aggregate_stream(
        self, stream: str, evolve: Callable[[State, Event], State], initial: State, *, tenant: str = DEFAULT_TENANT, session: Any = None
    ) -> Aggregated[State]:
        """`evolve` over all events. Raises StreamErased where one of them is erased: a state without it would be wrong."""

    async def read_all(
        self,
        *,
        after: Cursor = Cursor(),
        tenant: str | None = None,
        classes: Sequence[str] | None = None,
        limit: int = 500,
    ) -> Sequence[tuple[Cursor, Event | Erased | Unreadable]]:
        """The store's events in global order, of a tenant or of all; never one that could still be preceded by another.

        One that cannot be read is an answer of its own, and holds up none of the others.
        """
