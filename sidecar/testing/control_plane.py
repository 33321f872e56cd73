"""A control plane as a process of its own, and what a test needs around it: seeded tenants, commands, the receipts on the topic."""

import asyncio
import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sidecar.core import dsse
from sidecar.core.command import PAYLOAD_TYPE, compose
from sidecar.core.dsse import Signer
from sidecar.core.keys import Kek, KeyName, fingerprint
from sidecar.core.model import Scope, ScopeKind
from sidecar.kafka.client import client_config
from sidecar.kms.file import create_key_file
from sidecar.postgres import commands
from sidecar.postgres.connection import Connection
from sidecar.settings import Settings

PATIENCE_SECONDS = 120
_MAIN = """
import asyncio, sys
from pathlib import Path
from sidecar.faust_apps import run_control_plane
from sidecar.settings import load
asyncio.run(run_control_plane(load(Path(sys.argv[1])), timer_seconds=float(sys.argv[2])))
"""


@dataclass
class ControlProcess:
    """Ours to stop or kill. `log` is what it wrote to stderr."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        """Where its probes are; empty until it is ready."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("ready http")]
        return lines[0].split()[1] if lines else ""

    def wait_ready(self, seconds: float = PATIENCE_SECONDS) -> "ControlProcess":
        deadline = time.monotonic() + seconds
        while not self.url:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the control plane is not ready (exit {self.process.poll()}):\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)
        return self

    def wait_dead(self, seconds: float = PATIENCE_SECONDS) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Gracefully; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_SECONDS)
        finally:
            self.kill()


def document(name: str, bootstrap_servers: str, dsn: str, **sections: Any) -> dict[str, Any]:
    """The least configuration of a deployment, with topics of its own; it takes unsigned commands. `sections` are added, or replace these."""
    return {
        "deployment": name,
        "kafka": {"bootstrap_servers": bootstrap_servers},
        "postgres": {"dsn": dsn},
        "control": {"topic": f"{name}.control", "receipts": f"{name}.receipts", "ledger": f"{name}.ledger", "allow_unsigned": True},
        "http": {"port": 0},
    } | sections


def write_config(folder: Path, settings: dict[str, Any]) -> Path:
    """JSON is YAML. A key file is made where the settings name no KMS of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    if "kms" not in settings and not (folder / "keys" / "kek").exists():
        create_key_file(folder / "keys" / "kek")
    file = folder / "sidecar.yaml"
    file.write_text(json.dumps(settings))
    return file


def start_control(config: Path, *, failpoint: str | None = None, timer_seconds: float = 60, broken: str = "") -> ControlProcess:
    """`failpoint`: the named step at which it kills itself (see steps.failpoint). `broken`: what it runs first, for a control variant."""
    log = config.parent / f"control-{secrets.token_hex(4)}.log"
    environment = dict(os.environ) | ({"SIDECAR_TEST_FAILPOINT": failpoint} if failpoint else {})
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-c", broken + _MAIN, str(config), str(timer_seconds)], stderr=stderr, env=environment)
    return ControlProcess(process, log)


@contextmanager
def control(config: Path, **options: Any) -> Iterator[ControlProcess]:
    """Ready, and gone at the end."""
    started = start_control(config, **options)
    try:
        yield started.wait_ready()
    finally:
        started.kill()


def issuer(name: str, ops: Sequence[str] = ("*",), tenants: Sequence[str] = ("*",)) -> tuple[Signer, dict[str, Any]]:
    """A new key, and its entry for `control.issuers`."""
    signer = Signer(Ed25519PrivateKey.generate())
    public = base64.b64encode(signer.public.public_bytes_raw()).decode()
    return signer, {"name": name, "public_key": public, "ops": list(ops), "tenants": list(tenants)}


def command(settings: Settings, op: str, scope: Scope, /, *, signers: Sequence[Signer] = (), **changes: Any) -> tuple[UUID, bytes]:
    """-> id, value of a command, signed if there are signers; `changes` replace fields of the document."""
    command_id, now = uuid4(), datetime.now(UTC)
    value = compose(
        command_id=command_id,
        audience=settings.deployment,
        op=op,
        scope=scope,
        reason="a test",
        requested_by="test@example.org",
        ticket=None,
        issued_at=now,
        not_after=now + timedelta(hours=1),
        options={},
    )
    if changes:
        value = json.dumps(json.loads(value) | changes).encode()
    return command_id, dsse.sign(PAYLOAD_TYPE, value, signers).to_bytes() if signers else value


def send(settings: Settings, *values: bytes | None, key: str = "any") -> None:
    """Onto the control topic, in order."""
    producer = Producer(client_config(settings, **{"acks": "all", "linger.ms": 0}))
    for value in values:
        producer.produce(settings.control.topic, value, key=key)
    if producer.flush(PATIENCE_SECONDS):
        raise AssertionError("the control topic took no commands")


def read_topic(settings: Settings, topic: str) -> list[Any]:
    """Every committed message from the beginning to the end as it is now, of a partition in order. Blocks."""
    own = {"group.id": secrets.token_hex(8), "isolation.level": "read_committed", "enable.partition.eof": True, "enable.auto.commit": False}
    consumer = Consumer(client_config(settings, **own))
    try:
        left = set(consumer.list_topics(topic, timeout=10).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in left])  # 0 may be deleted
        found: list[Any] = []
        while left:
            for message in consumer.consume(1000, 0.05):
                error = message.error()
                if error is None:
                    found.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(message.partition() or 0)
                elif not error.retriable():
                    raise KafkaException(error)
        return found
    finally:
        consumer.close()


def published(settings: Settings) -> list[dict[str, Any]]:
    """The receipts on the topic, as a `read_committed` consumer sees them; per command in order."""
    return [json.loads(message.value()) for message in read_topic(settings, settings.control.receipts)]


async def final_receipt(connection: Connection, command_id: UUID) -> dict[str, Any]:
    """The command's first that is final, once it is there: a shred that left nothing anywhere is `complete` a moment after it is `inaccessible`."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            found = await commands.receipt(connection, command_id)
            if found and found["status"] == "complete":
                found = await commands.receipt_with(connection, command_id, "inaccessible")
            if found and found["status"] not in ("accepted", "pending"):
                return found
            await asyncio.sleep(0.02)


async def seed(
    connection: Connection, tenant: str, streams: dict[str, str], *, shared: Scope | None = None, created_at: datetime | None = None
) -> dict[str, tuple[UUID, int]]:
    """A tenant with real wrapped keys and, of each stream (name → class), key and history; -> stream → key id, version.

    `shared`: the one key (of a class or the tenant) that all of the streams use.
    """
    kek = Kek(tenant, 1, 1, bytearray(secrets.token_bytes(32)))
    made = created_at or datetime.now(UTC)
    await connection.execute("INSERT INTO tenants (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING", tenant)
    await connection.execute(
        """INSERT INTO tenant_keys (tenant_id, generation, kek_version, kms_uri, kms_key_version, wrapped, fingerprint, state)
           VALUES ($1, 1, 1, 'file:test', '1', $2, $3, 'active') ON CONFLICT DO NOTHING""",
        tenant,
        secrets.token_bytes(60),
        fingerprint(kek.commitment()),
    )
    out: dict[str, tuple[UUID, int]] = {}
    keys, rows, history = [], [], []
    for stream, stream_class in streams.items():
        scope = shared or Scope(tenant=tenant, kind=ScopeKind.STREAM, id=stream)
        if shared is None or not out:
            name = KeyName(scope=scope, key_id=uuid4(), version=1, generation=1)
            wrapped, committed = kek.wrap(secrets.token_bytes(32), name, secrets.token_bytes(12))
            keys.append((tenant, name.key_id, 1, scope.kind.value, scope.id, 1, 1, wrapped, committed, made))
            key_id = name.key_id
        out[stream] = (key_id, 1)
        rows.append((tenant, stream, 1, stream_class, True, 1, key_id, "AES-256-GCM", made))
        history.append((tenant, stream, key_id, 1, 1))
    columns = ["tenant_id", "key_id", "key_version", "scope_kind", "scope_id", "generation", "kek_version", "key_material", "commitment"]
    columns += ["created_at"]
    await connection.copy_records_to_table("encryption_keys", records=keys, columns=columns)
    columns = ["tenant_id", "stream_id", "position", "stream_type_class", "is_encrypted", "encrypted_from_position", "encryption_key_id"]
    columns += ["encryption_algorithm", "created_at"]
    await connection.copy_records_to_table("streams", records=rows, columns=columns)
    columns = ["tenant_id", "stream_id", "key_id", "key_version", "used_from_position"]
    await connection.copy_records_to_table("stream_key_history", records=history, columns=columns)
    return out


async def add_events(connection: Connection, tenant: str, stream: str, count: int, *, plain: bool = False, first: int = 1) -> None:
    """Events that nobody can open: enough for counting and deleting."""
    body = (b"{}", None, {"key": "k", "timestamp": 0}) if plain else (None, secrets.token_bytes(100), None)
    await connection.execute(
        """INSERT INTO messages (tenant_id, stream_id, stream_position, message_id, message_type, data, data_encrypted, metadata)
           SELECT $1, $2, n, 'm' || n, 't', $3, $4, $5 FROM generate_series($6::bigint, $7::bigint) n""",
        tenant,
        stream,
        *body,
        first,
        first + count - 1,
    )
