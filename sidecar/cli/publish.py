"""`sidecar publish` and `sidecar subscribe`: for trying things out; applications use their own Kafka client."""

import base64
import sys
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer

from sidecar.cli.context import Exit, cli, fail, show_line
from sidecar.kafka.plain import follow, send


def publish(
    context: typer.Context,
    topic: str,
    file: Annotated[str, typer.Argument(help="The value, or - for standard input.")] = "-",
    tenant: Annotated[str, typer.Option()] = ...,  # type: ignore[assignment]
    stream: Annotated[str, typer.Option()] = ...,  # type: ignore[assignment]
    type_: Annotated[str, typer.Option("--type")] = ...,  # type: ignore[assignment]
    subject: Annotated[str | None, typer.Option(help="The person that the event is about (ce_subjectid).")] = None,
) -> None:
    """Publish one event as a CloudEvent (binary mode)."""
    here = cli(context)
    try:
        value = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        fail(f"error: {file} cannot be read: {error.strerror}", Exit.USAGE)
    message_id = str(uuid4())
    attributes = {"specversion": "1.0", "id": message_id, "source": "/sidecar/publish", "type": type_, "tenantid": tenant, "streamid": stream}
    attributes |= {"subjectid": subject} if subject is not None else {}
    headers = [(f"ce_{name}", text.encode()) for name, text in attributes.items()]
    partition, offset = send(here.settings, topic, key=f"{tenant}/{stream}".encode(), value=value, headers=headers)
    show_line({"topic": topic, "partition": partition, "offset": offset, "message_id": message_id})


def subscribe(
    context: typer.Context,
    topic: str,
    from_beginning: Annotated[bool, typer.Option("--from-beginning")] = False,
    max_: Annotated[int | None, typer.Option("--max", min=1, help="Stop after this many records.")] = None,
) -> None:
    """Print a topic's records, one JSON object a line; in no group, and only what is committed."""
    here = cli(context)
    for count, record in enumerate(follow(here.settings, topic, from_beginning=from_beginning), start=1):
        show_line(_shown(record))
        if count == max_:
            return


def _shown(record: Any) -> dict[str, Any]:
    value = record.value()
    text = None if value is None else value.decode("utf-8", "replace")
    exact = value is None or (text is not None and text.encode() == value)
    body = {"value": text} if exact else {"value_base64": base64.b64encode(value).decode()}
    key = record.key()
    headers = {name: None if raw is None else raw.decode("utf-8", "replace") for name, raw in record.headers() or []}
    return {"partition": record.partition(), "offset": record.offset(), "key": key and key.decode("utf-8", "replace"), **body, "headers": headers}


def add_to(app: typer.Typer) -> None:
    app.command()(publish)
    app.command()(subscribe)
