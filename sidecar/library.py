"""The library, put together from a configuration: what an application in Python uses in its own process.

async with open_library(load(Path("sidecar.yaml"))) as library:
    await library.store.append_to_stream("user-7", [NewEvent(type="UserRegistered", data={"email": "jane@example.org"})], tenant="acme")
    read = await library.store.read_stream("user-7", tenant="acme")
    await library.shredding.forget_stream_data("user-7", "acme", reason="Art. 17 request")
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from sidecar import telemetry, topics
from sidecar.blind_index import BlindIndex, Found
from sidecar.consumer import EventConsumer
from sidecar.core.errors import SidecarError
from sidecar.core.policy import Classifier
from sidecar.crypto_shredding import CryptoShreddingService
from sidecar.crypto_store import Classify, CryptoEventStore, create_crypto_event_store
from sidecar.kafka.admin import Admin
from sidecar.kafka.ledger import LedgerTopic
from sidecar.key_management import KeyManagementService
from sidecar.keys import KeyManagement
from sidecar.kms import check_identity, open_for
from sidecar.ledger import LedgerGate
from sidecar.memory import no_core_dumps
from sidecar.policies import EncryptionPolicyService
from sidecar.postgres import migrations
from sidecar.postgres.connection import Pool, connected, open_pool
from sidecar.postgres.errors import mapped
from sidecar.postgres.event_store import PostgresEventStore
from sidecar.sending import Sender
from sidecar.settings import Settings
from sidecar.steps import SystemClock

MAX_CONSUMERS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """What `open_library` opens.

    `store` seals and opens by policy. `plain` is the same store without: it asks no policy, and of encrypted streams it reads envelopes.
    """

    store: CryptoEventStore
    plain: PostgresEventStore
    keys: KeyManagementService
    policies: EncryptionPolicyService
    shredding: CryptoShreddingService
    index: BlindIndex
    classify: Classify
    sessions: Pool
    """Of consumers, which keep a connection each."""

    async def find_by_field(self, tenant: str, field: str, value: Any, *, after: Found | None = None, limit: int = 1000) -> list[Found]:
        """Events whose sealed field has this value, where policy has the field in its blind index (blind_index.py)."""
        return await self.index.find_by_field(tenant, field, value, after=after, limit=limit)

    def consumer(self, name: str, *, tenant: str | None = None, classes: Sequence[str] | None = None) -> EventConsumer:
        """A subscription of that name, whose handler gets opened events and `Erased`."""
        return EventConsumer(name, self.plain, decrypt=self.store.decrypt, tenant=tenant, classes=classes, sessions=self.sessions)


@asynccontextmanager
async def open_library(settings: Settings, *, max_connections: int = 10, writer: str | None = None) -> AsyncIterator[Library]:
    """Connect as the data plane's role; closed at the end of the block. `writer` names this process in the audit trail: stable and its own.

    From then on this process leaves no core dump: it would hold keys. Raises ConfigurationError, StoreUnavailable, KmsUnavailable.
    """
    no_core_dumps()
    name, dsn = writer or f"library-{socket.gethostname()}", settings.postgres.for_role("data")
    kms = open_for(settings.kms, "data")
    await check_identity(kms, "data", production=settings.profile == "production")
    async with connected(dsn) as connection:
        await migrations.check_or_migrate(connection, may_migrate=settings.profile == "development")
    if settings.profile == "development":
        await asyncio.to_thread(topics.apply, settings, Admin(settings))
    # A server that took another's place shows at the next connection, before anything warm is stored there.
    ledger = LedgerGate(LedgerTopic(settings, Admin(settings)), settings.deployment)
    pool = await open_pool(dsn, application_name=name, max_size=max_connections, check=ledger.check)
    # Keys have connections of their own: an append that holds one of the store's must not wait for another that does the same.
    key_pool = await open_pool(dsn, application_name=f"{name} keys", max_size=4, check=ledger.check)
    sessions = await open_pool(dsn, application_name=f"{name} consumers", max_size=MAX_CONSUMERS, check=ledger.check)
    library = _put_together(settings, name, KeyManagement(kms, dedicated=settings.kms.dedicated), ledger, pool, key_pool, sessions)
    news = asyncio.create_task(_forget_what_changed(dsn, name, library.keys))
    try:
        yield library
    finally:
        news.cancel()
        with suppress(asyncio.CancelledError):
            await news
        for opened in (pool, key_pool, sessions):
            await opened.close()


async def _forget_what_changed(dsn: str, name: str, keys: KeyManagementService) -> None:
    """A tenant's keys leave this process when its epoch moves, also where nothing asks for them again. Correctness does not depend on this."""
    while True:
        try:
            async with connected(dsn, application_name=f"{name} news") as connection:
                with mapped():
                    await connection.add_listener("sidecar_tenant_epoch", lambda *news: keys.forget(str(news[3])))
                    keys.forget_all()  # what moved before it listened
                    while True:
                        await connection.execute("SELECT")  # an end of the connection shows here
                        await asyncio.sleep(1)
        except (SidecarError, OSError) as error:
            keys.forget_all()
            telemetry.log.warning("no news of changed tenants", extra={"action": "listen", "error": error})
            await asyncio.sleep(1)


def _put_together(settings: Settings, name: str, kms_keys: KeyManagement, ledger: LedgerGate, pool: Pool, key_pool: Pool, sessions: Pool) -> Library:
    clock, limits = SystemClock(), settings.limits
    send = Sender(settings, clock)
    keys = KeyManagementService(
        key_pool, kms_keys, clock=clock, writer=name, unmatched=settings.policies.unmatched,
        max_streams=min(limits.stream_heads, limits.key_cache_entries), limits=limits.uses,
        ledger=ledger, send=send,
    )  # fmt: skip
    classifier = Classifier([rule.rule() for rule in settings.classes])

    def classify(stream: str, event_type: str) -> str:
        """The class rules see neither a topic nor headers here: rules that ask for them match nothing."""
        return classifier.classify(topic="", type=event_type, stream=stream, headers={})

    plain = PostgresEventStore(pool)
    return Library(
        sessions=sessions,
        index=BlindIndex(key_pool, kms_keys, ledger),
        classify=classify,
        store=create_crypto_event_store(plain, keys=keys, policy=classify),
        plain=plain,
        keys=keys,
        policies=EncryptionPolicyService(key_pool, clock, unmatched=settings.policies.unmatched, classify=classify),
        shredding=CryptoShreddingService(keys, clock, send=send, classify=classify),
    )
