"""Metrics, and a structured log with redaction. Every process uses it; `sidecar.probes` serves the metrics.

    log = telemetry.log
    log.info("shred", extra={"action": "shred", "tenant": …, "command_id": …})
    telemetry.events_stored.labels("encrypted").inc(n)

A log line is one JSON object on stderr: time, level, action, the ids given in `extra`. Never a payload, a key or a DSN:
a foreign exception is named by its class and where it was raised, never by its text, which may quote a row or a URL.
"""

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sidecar.core.errors import SidecarError

registry = CollectorRegistry()

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, registry=registry)


events_stored = _counter("sidecar_events_stored_total", "Source records stored as events.", "treatment")
events_projected = _counter("sidecar_events_projected_total", "View records committed in Kafka.", "view")
dead_letters = _counter("sidecar_dead_letters_total", "Source records that could not be stored.", "reason")
refusals = _counter("sidecar_refusals_total", "Source records refused by decision.", "reason")
batches_redone = _counter("sidecar_batches_redone_total", "Batches sealed again because something had moved.", "cause")
fenced = _counter("sidecar_fenced_total", "Times that a lease, a transaction or an instance was fenced.", "what")
keys_created = _counter("sidecar_keys_created_total", "Key versions made.", "scope_kind")
kms_errors = _counter("sidecar_kms_errors_total", "KMS calls that failed.", "operation")
kms_seconds = Histogram("sidecar_kms_seconds", "KMS calls and how long they took.", ("operation",), registry=registry, buckets=_SECONDS)
streams_on_several_partitions = _counter("sidecar_streams_on_several_partitions_total", "Times that a stream arrived on another partition.")
commands = _counter("sidecar_commands_total", "Commands by the status they reached.", "op", "status")
receipts = _counter("sidecar_receipts_total", "Receipts published.", "status")
retries = _counter("sidecar_retries_total", "Waits for something that could not be reached.", "what")
batch_seconds = Histogram("sidecar_batch_seconds", "Time of a batch by stage.", ("stage",), registry=registry, buckets=_SECONDS)
command_seconds = Histogram(
    "sidecar_command_to_receipt_seconds", "From the command's arrival to its final receipt.", ("op",), registry=registry, buckets=_SECONDS
)
guard_seconds = Histogram(
    "sidecar_guard_held_seconds", "How long the control plane held a tenant's guard exclusively.", registry=registry, buckets=_SECONDS
)
ready_gauge = Gauge("sidecar_ready", "1 when this process serves.", registry=registry)
key_cache_entries = Gauge("sidecar_key_cache_entries", "Cipher objects in the cache.", registry=registry)
lag_records = Gauge("sidecar_lag_records", "Records between the log end and what is projected.", ("topic", "partition"), registry=registry)

log = logging.getLogger("sidecar")

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}


def describe(error: BaseException) -> str:
    """An error as a log may show it: our own messages are written to be shown, of a foreign one only the class is."""
    return f"{type(error).__name__}: {error}" if isinstance(error, SidecarError) else type(error).__qualname__


class JsonFormatter(logging.Formatter):
    """One JSON object per record, redacted."""

    def format(self, record: logging.LogRecord) -> str:
        out: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        ours = record.name == "sidecar" or record.name.startswith("sidecar.")
        if ours:
            out["message"] = record.getMessage()
        else:
            # A library's arguments may hold anything: its constant text says enough.
            out |= {"message": str(record.msg).splitlines()[0][:200] if record.args or record.exc_info else record.getMessage()[:200]}
        if record.name != "sidecar":
            out["logger"] = record.name
        out |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD and ours}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            out["error"] = describe(error)
            frames = traceback.extract_tb(error.__traceback__)[-6:]
            out["at"] = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
        return orjson.dumps(out, default=_shown).decode()


def _shown(value: Any) -> str:
    if isinstance(value, BaseException):
        return describe(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    return str(value)


def start_logging(level: int = logging.INFO) -> None:
    """JSON lines on stderr for everything in this process. Called once, by a long-running command."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(level)
