"""Composition root: settings → adapters → flows."""

import asyncio
import gc
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from aiohttp import web

from sidecar import policies, probes, telemetry, topics
from sidecar.core.errors import ConfigurationError, StoreUnavailable
from sidecar.core.policy import Classifier
from sidecar.event_store import Ciphers
from sidecar.kafka.admin import Admin
from sidecar.kafka.consumer import KafkaSource
from sidecar.kafka.ledger import LedgerTopic
from sidecar.kafka.producer import TransactionalProducer
from sidecar.keys import KeyManagement
from sidecar.kms import check_identity, open_for
from sidecar.ledger import LedgerGate
from sidecar.memory import no_core_dumps
from sidecar.partitions import Claimer, Sources
from sidecar.pipeline import Pipeline, Ports
from sidecar.postgres import migrations
from sidecar.postgres.batches import GuardSession
from sidecar.postgres.connection import Connection, Pool, connected, open_pool
from sidecar.postgres.durability import check_standby
from sidecar.postgres.keystore import KeyStore
from sidecar.settings import Settings
from sidecar.steps import SystemClock
from sidecar.streams import Streams
from sidecar.upkeep import Upkeep
from sidecar.views import View, Views


@dataclass(slots=True, kw_only=True)
class DataPlane:
    """One instance, put together. `run` serves until `stop` is set, then ends gracefully."""

    settings: Settings
    instance_id: str
    pipeline: Pipeline
    source: KafkaSource
    pool: Pool
    upkeep: Upkeep

    async def run(self, stop: asyncio.Event) -> None:
        ports = self.pipeline.ports
        # The default looks through every object after a few hundred allocations; a batch makes tens of thousands, none in cycles.
        gc.set_threshold(100_000, 50, 100)
        upkeep = asyncio.create_task(self.upkeep.run())
        try:
            try:
                await self.pipeline.run(self.source, stop)
            finally:  # also of one that refuses to start: its consumer would keep the process from ending
                await self.source.close()
            if self.pipeline.ready[0]:  # else a transaction may be open: as one that died, the next shred fences this instance
                with suppress(StoreUnavailable):
                    await ports.session.stop()
        finally:
            upkeep.cancel()
            with suppress(asyncio.CancelledError):
                await upkeep
            await ports.session.close()
            await ports.producer.close()
            with suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self.pool.close()


async def compose(settings: Settings, instance_id: str, *, pipeline_of: Callable[[Ports], Pipeline] = Pipeline) -> DataPlane:
    """Check what is needed, then wire it; tests give a pipeline whose steps they delay or break. Raises ConfigurationError, Unavailable."""
    if not settings.sources:
        raise ConfigurationError("there is no source", where="sources", mend="name a topic to read, see `sidecar init`")
    kms = open_for(settings.kms, "data")
    await check_identity(kms, "data", production=settings.profile == "production")
    admin = Admin(settings)
    configured, dead_letter_partitions = await prepare(settings, admin)
    dsn = settings.postgres.for_role("data")
    pool = await open_pool(dsn, application_name=f"sidecar keys {instance_id}")
    keys, store = KeyManagement(kms, dedicated=settings.kms.dedicated), KeyStore(pool)
    session = GuardSession(dsn, instance_id, settings.transactional_id(instance_id), settings.limits.uses)
    sources = Sources(settings)
    claimer = Claimer(sources, session, admin, instance_id)
    ports = Ports(
        settings=settings,
        instance_id=instance_id,
        session=session,
        producer=TransactionalProducer(settings, instance_id),
        streams=Streams(store, keys, max_streams=min(settings.limits.stream_heads, settings.limits.key_cache_entries), limits=settings.limits.uses),
        extractor_of=sources.extractor,
        classifier=Classifier([c.rule() for c in settings.classes]),
        views=Views(configured),
        dead_letter_partitions=dead_letter_partitions,
        load_policies=lambda: store.policies(settings.policies.unmatched),
        new_ciphers=lambda: Ciphers(store, keys),
        claim=claimer.claim,
        ledger=LedgerGate(LedgerTopic(settings, admin), settings.deployment, records=True),
        record=lambda connection: record(connection, settings, configured),
        clock=SystemClock(),
    )
    telemetry.key_cache_entries.set_function(ports.streams.ciphers)
    pipeline = pipeline_of(ports)
    source = KafkaSource(settings, instance_id, on_assigned=pipeline.assigned, on_revoked=pipeline.revoked)
    claimer.source = source
    upkeep = Upkeep(settings, instance_id, pipeline, admin, sources.topic_ids)
    return DataPlane(settings=settings, instance_id=instance_id, pipeline=pipeline, source=source, pool=pool, upkeep=upkeep)


async def run_data_plane(settings: Settings, instance_id: str) -> None:
    """`sidecar run`: until SIGTERM or SIGINT, then gracefully."""
    telemetry.start_logging()
    no_core_dumps()
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    plane = await compose(settings, instance_id)
    http = await probes.serve(settings.http, ready=lambda: plane.pipeline.ready)
    announce = asyncio.create_task(_announce(plane.pipeline, http))
    try:
        await plane.run(stop)
    finally:
        announce.cancel()
        await http.cleanup()
    if plane.pipeline.ports.producer.left_behind:
        # all is settled and closed; Python would wait for a thread that librdkafka does not give back
        os._exit(0)


async def _announce(pipeline: Pipeline, http: web.AppRunner) -> None:
    await pipeline.serving.wait()
    probes.say_ready(http)


async def prepare(settings: Settings, admin: Admin) -> tuple[list[View], int]:
    """Before serving: schema and topics; -> the views, the dead letters' partitions. Raises ConfigurationError."""
    dsn = settings.postgres.for_role("data")
    if settings.profile == "development":
        await asyncio.to_thread(topics.apply, settings, admin)
    found = await asyncio.to_thread(admin.describe, [*topics.wanted(settings)])
    if settings.dead_letters.topic not in found:
        raise ConfigurationError(
            f"the topic {settings.dead_letters.topic} does not exist", where="dead_letters.topic", mend="run `sidecar topics apply`"
        )
    async with connected(dsn) as connection:
        await migrations.check_or_migrate(connection, may_migrate=settings.profile == "development")
        if any(source.purge != "off" for source in settings.sources):
            await check_standby(connection, production=settings.profile == "production")
    configured = topics.views(settings, {name: info.partitions for name, info in found.items()})
    return configured, found[settings.dead_letters.topic].partitions


async def record(connection: Connection, settings: Settings, configured: list[View]) -> None:
    """Views on record, policies installed once: into a database that may be served. Raises ConfigurationError."""
    await topics.record_views(connection, configured)
    await policies.apply(connection, settings.policies.install, actor="sidecar.yaml", now=datetime.now(UTC), only_new=True)
