"""`sidecar worker`, free of Faust: what is needed to work off a chunk, and a chunk from the jobs topic."""

import asyncio
from contextlib import AsyncExitStack
from uuid import UUID

import orjson

from sidecar import telemetry
from sidecar.core.errors import Conflict, Unavailable
from sidecar.kafka import jobs
from sidecar.kafka.admin import Admin
from sidecar.kafka.ledger import LedgerTopic
from sidecar.key_management import KeyManagementService
from sidecar.keys import KeyManagement
from sidecar.kms import check_identity, open_for
from sidecar.ledger import LedgerGate
from sidecar.postgres import migrations
from sidecar.postgres.connection import connected, open_pool
from sidecar.reencryption import Reencryption
from sidecar.settings import Settings
from sidecar.steps import SystemClock
from sidecar.waiting import Backoff


class Worker:
    """It rewrites stored events, for which it has a database role of its own, that shreds nothing; its keys are the data plane's."""

    def __init__(self, settings: Settings, instance_id: str) -> None:
        self._settings, self._name = settings, instance_id
        self._open = AsyncExitStack()

    async def open(self) -> None:
        """Raises ConfigurationError, Unavailable."""
        settings, admin = self._settings, Admin(self._settings)
        kms, dsn = open_for(settings.kms, "data"), settings.postgres.for_role("worker")
        await check_identity(kms, "data", production=settings.profile == "production")
        async with connected(dsn) as connection:
            await migrations.check_or_migrate(connection, may_migrate=settings.profile == "development")
        await asyncio.to_thread(admin.create, settings.jobs.topic, settings.jobs.partitions, jobs.CONFIG)
        ledger = LedgerGate(LedgerTopic(settings, admin), settings.deployment)
        pool = await open_pool(dsn, application_name=f"sidecar worker {self._name}", max_size=4, check=ledger.check)
        self._open.push_async_callback(pool.close)
        keys = KeyManagementService(
            pool, KeyManagement(kms, dedicated=settings.kms.dedicated), clock=SystemClock(), writer=f"worker-{self._name}",
            unmatched=settings.policies.unmatched, limits=settings.limits.uses, ledger=ledger,
        )  # fmt: skip
        self._work = Reencryption(pool, keys, worker=self._name, rows_per_second=settings.jobs.max_rows_per_second)

    async def close(self) -> None:
        await self._open.aclose()

    async def receive(self, value: bytes | None) -> None:
        """Returns when the chunk is done, however long that takes. Never raises: what cannot be reached is waited for."""
        try:
            document = orjson.loads(value or b"")
            command_id, chunk = UUID(document["command_id"]), int(document["chunk"])
        except (ValueError, KeyError, TypeError):
            telemetry.log.warning("a record on the jobs topic is no chunk", extra={"action": "work"})
            return
        backoff = Backoff()
        while True:
            try:
                return await self._work.work(command_id, chunk)
            except (Unavailable, Conflict) as error:
                telemetry.retries.labels("chunk").inc()
                telemetry.log.warning("a chunk waits", extra={"action": "work", "command_id": command_id, "error": error})
            except Exception as error:
                telemetry.retries.labels("chunk").inc()
                telemetry.log.error("a chunk fails", extra={"action": "work", "command_id": command_id}, exc_info=error)
            await backoff.wait()
