"""The ledger topic: one partition, compacted by entry id, so that nothing but a repeated entry is ever removed. Calls block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from confluent_kafka import KafkaError, Message, Producer

from sidecar.core.errors import BrokerUnavailable, ConfigurationError
from sidecar.kafka.admin import Admin
from sidecar.kafka.client import client_config, mapped, translate
from sidecar.kafka.reading import read
from sidecar.settings import Settings

PARTITIONS: Final = 1
CONFIG: Final = {"cleanup.policy": "compact"}
TIMEOUT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """The topic as it stands. `end` is exact: no transaction leaves its markers on it. `start` is 0 unless somebody had records deleted."""

    topic_id: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRecord:
    """As it stands on the topic."""

    offset: int
    key: bytes
    value: bytes


class LedgerTopic:
    """Reads and writes the topic; thread-safe. Every call may raise BrokerUnavailable or AccessDenied."""

    def __init__(self, settings: Settings, admin: Admin | None = None) -> None:
        self._settings, self.name = settings, settings.control.ledger
        self._admin = admin or Admin(settings)
        self._producer: Producer | None = None

    def log(self) -> Log:
        """Raises ConfigurationError when there is no such topic."""
        found = self._admin.describe([self.name]).get(self.name)
        if found is None:
            raise ConfigurationError(f"the ledger topic {self.name} does not exist", where="control.ledger", mend="`sidecar topics apply` makes it")
        if found.partitions != PARTITIONS:
            raise ConfigurationError(
                f"the ledger topic {self.name} has {found.partitions} partitions", where="control.ledger", mend="it needs one: its order counts"
            )
        start, end = (self._admin.offsets({self.name: PARTITIONS}, end=end)[self.name][0] for end in (False, True))
        return Log(topic_id=found.topic_id, start=start, end=end)

    def refuse_retention(self) -> None:
        """Raises ConfigurationError for a topic that forgets: a restored database would not hear of what it lacks."""
        policy = self._admin.topic_config(self.name).get("cleanup.policy", "delete")
        if policy != CONFIG["cleanup.policy"]:
            raise ConfigurationError(
                f"the ledger topic {self.name} has cleanup.policy={policy}: it would forget shreds", where="control.ledger", mend="set it to compact"
            )

    def read(self, start: int, end: int) -> list[LedgerRecord]:
        """All that stands from `start` up to `end`, in order."""
        return [_record(message) for message in read(self._settings, self.name, {0: (start, end)})]

    def publish(self, entries: Sequence[tuple[bytes, bytes]]) -> int:
        """Append (key, value) in order; -> the offset behind the last one, when all are durable. After an error some may stand: again is harmless."""
        if self._producer is None:
            # In order and once per attempt; an entry that stands twice is one entry.
            own = {"enable.idempotence": True, "linger.ms": 0, "message.timeout.ms": 10_000}
            self._producer = Producer(client_config(self._settings, **own))
        ends: list[int] = []
        failed: list[KafkaError] = []

        def report(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                failed.append(error)
            elif (offset := message.offset()) is not None:
                ends.append(offset + 1)

        with mapped():
            for key, value in entries:
                self._producer.produce(self.name, value, key, 0, on_delivery=report)
            left = self._producer.flush(TIMEOUT_SECONDS + 2)
        if failed or left:
            self._producer = None
            raise translate(failed[0]) if failed else BrokerUnavailable("the broker did not confirm the ledger's entries in time")
        return max(ends)


def _record(message: Message) -> LedgerRecord:
    return LedgerRecord(offset=message.offset() or 0, key=message.key() or b"", value=message.value() or b"")
