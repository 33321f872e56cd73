"""The broker of the local stack: Kafka in KRaft mode, one node, tuned so that what takes seconds in production takes milliseconds in a test."""

import base64
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from sidecar.testing import local_process
from sidecar.testing.local_java import java, kafka_jars
from sidecar.testing.local_process import LocalStackError, Progress

USERS = ("sidecar", "reader")  # the first is a super user, the second has what ACLs give it
MECHANISM = "SCRAM-SHA-256"


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaPorts:
    """Of the broker, on this machine alone."""

    plain: int
    sasl: int
    controller: int


def directory(stack: Path) -> Path:
    return stack / "kafka"


def log_file(stack: Path) -> Path:
    return stack / "kafka.log"


def credentials_file(stack: Path) -> Path:
    return stack / "kafka-credentials.json"


def find(stack: Path, pid: int | None = None) -> int | None:
    """The broker's pid if it runs."""
    return local_process.find("java", str(_properties_file(stack)), pid)


def _properties_file(stack: Path) -> Path:
    return directory(stack) / "server.properties"


def write_configuration(stack: Path, ports: KafkaPorts) -> None:
    """Anew at each start: the ports may have changed, or this program."""
    directory(stack).mkdir(exist_ok=True)
    settings = {
        **_LISTENERS,
        "listeners": f"PLAINTEXT://127.0.0.1:{ports.plain},SASL://127.0.0.1:{ports.sasl},CONTROLLER://127.0.0.1:{ports.controller}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{ports.plain},SASL://127.0.0.1:{ports.sasl}",
        "controller.quorum.voters": f"1@127.0.0.1:{ports.controller}",  # static: a voter that moved to another port needs no vote
        "log.dirs": str(directory(stack) / "data"),
        **_SINGLE_NODE,
        **_QUICK,
        **_LIMITS,
    }
    _properties_file(stack).write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    (directory(stack) / "log4j2.properties").write_text(_LOG4J)


def initialise(stack: Path, progress: Progress) -> None:
    """Format the data directory if there is none, with the two SCRAM users; their passwords are drawn here and kept in a file of mode 0600."""
    data = directory(stack) / "data"
    done = directory(stack) / "formatted"
    if done.exists():
        return
    shutil.rmtree(data, ignore_errors=True)  # what an interrupted attempt left
    passwords = {user: secrets.token_urlsafe(24) for user in USERS}
    _write_private(credentials_file(stack), json.dumps(passwords))
    cluster_id = "k" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]  # a leading "-" would read as an option
    scram = [part for user, password in passwords.items() for part in ("--add-scram", f"{MECHANISM}=[name={user},password={password}]")]
    tool = ["kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(_properties_file(stack)), *scram]
    said = subprocess.run(
        [str(java()), "-Xmx128m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", f"{kafka_jars(progress)}/*", *tool],
        capture_output=True,
        text=True,
        check=False,
    )
    if said.returncode != 0:
        raise LocalStackError(f"Kafka's storage tool failed in {data}:\n{said.stdout[-1500:]}{said.stderr[-1500:]}")
    done.touch()


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def spawn(stack: Path, progress: Progress) -> int:
    """Start the broker as configured; returns its pid at once."""
    options = [
        "-Xmx512m",
        "-XX:+UseSerialGC",
        "-XX:+ExitOnOutOfMemoryError",
        "-Djava.awt.headless=true",
        f"-Dlog4j2.configurationFile={directory(stack) / 'log4j2.properties'}",
    ]
    command = [str(java()), *options, "-cp", f"{kafka_jars(progress)}/*", "kafka.Kafka", str(_properties_file(stack))]
    return local_process.spawn(command, log=log_file(stack), cwd=directory(stack))


def wait_ready(stack: Path, pid: int, ports: KafkaPorts) -> None:
    """Returns when the broker answers clients, not only accepts their connections, and its coordinators are at work."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    def listening() -> bool:
        return local_process.answers(ports.plain) and local_process.answers(ports.sasl)

    local_process.wait_until(listening, pid=pid, what="Kafka", log=log_file(stack), seconds=90)
    client = AdminClient({"bootstrap.servers": f"127.0.0.1:{ports.plain}", "log_level": 0})

    def answering() -> bool:
        try:
            return len(client.list_topics(timeout=2).brokers) == 1
        except KafkaException:
            return False

    local_process.wait_until(answering, pid=pid, what="Kafka", log=log_file(stack), seconds=60)
    try:
        _wake_coordinators(ports)
    except KafkaException as error:
        raise LocalStackError(f"Kafka answers, but its coordinators do not: {error}. Its log: {log_file(stack)}") from error


def _wake_coordinators(ports: KafkaPorts) -> None:
    """The first group and the first transaction make the broker create its internal topics, while clients back off for up to 4 s. Pay 1 s here."""
    from confluent_kafka import KafkaException, Producer
    from confluent_kafka.admin import AdminClient

    address: dict[str, str | int | float | bool] = {"bootstrap.servers": f"127.0.0.1:{ports.plain}", "log_level": 0}
    admin = AdminClient(address)
    group = admin.describe_consumer_groups(["sidecar-dev"], request_timeout=30)["sidecar-dev"]
    Producer({**address, "transactional.id": "sidecar-dev"}).init_transactions(30)
    with contextlib.suppress(KafkaException):  # there is no such group, or it is being loaded: asking was enough
        group.result(30)


def stop(pid: int) -> None:
    """SIGTERM: the broker closes its logs, so that the next start has nothing to recover."""
    local_process.stop(pid, signal_number=signal.SIGTERM, grace_seconds=20)


# ANONYMOUS is everyone on the plain listener. Topics are open until an ACL names them; from then on it holds for `reader`.
_LISTENERS = {
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,SASL:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
    "inter.broker.listener.name": "PLAINTEXT",
    "controller.listener.names": "CONTROLLER",
    "sasl.enabled.mechanisms": MECHANISM,
    "listener.name.sasl.scram-sha-256.sasl.jaas.config": "org.apache.kafka.common.security.scram.ScramLoginModule required;",
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
    "super.users": "User:ANONYMOUS;User:sidecar",
}
_SINGLE_NODE = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "8",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "8",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "2",
    "default.replication.factor": "1",
    "auto.create.topics.enable": "true",  # as Kafka does by default: a first `produce` with a plain client just works
    "num.partitions": "4",
    "log.cleaner.threads": "1",
    "log.cleaner.dedupe.buffer.size": "33554432",
    "num.recovery.threads.per.data.dir": "2",
}
_QUICK = {
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    # The group protocol `consumer`: a revocation is told with the next heartbeat (5 s by default).
    "group.consumer.heartbeat.interval.ms": "500",
    "group.consumer.min.heartbeat.interval.ms": "100",
    "group.consumer.session.timeout.ms": "6000",
    "group.consumer.min.session.timeout.ms": "1000",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
    # A killed broker is let in again only after its old session ended. One that gets no CPU for as long is shut out, with every topic on it.
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "9000",
    "log.initial.task.delay.ms": "500",
    "log.retention.check.interval.ms": "1000",
    "log.segment.delete.delay.ms": "1000",
    "log.cleaner.backoff.ms": "500",
    "log.cleaner.min.cleanable.ratio": "0.01",
    "log.flush.offset.checkpoint.interval.ms": "5000",
    "controlled.shutdown.max.retries": "1",
}
_LIMITS = {
    "message.max.bytes": str(12 * 1024 * 1024),
    "replica.fetch.max.bytes": str(12 * 1024 * 1024),
}
_LOG4J = """\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{ISO8601} %p %m (%c{1})%n
rootLogger.level = WARN
rootLogger.appenderRef.out.ref = out
logger.server.name = kafka.server
logger.server.level = INFO
logger.config.name = org.apache.kafka.common.config
logger.config.level = ERROR
"""
