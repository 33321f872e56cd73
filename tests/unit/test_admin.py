"""What the broker answers in the moment in which a partition is made cannot be had on command: a client that says it once stands in for it."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from sidecar.core.errors import AccessDenied
from sidecar.kafka.admin import Admin
from sidecar.settings import Settings


class Client:
    """Gives its answers one by one: an error's code, or an offset."""

    def __init__(self, *answers: dict[int, int]) -> None:
        self.answers = list(answers)

    def list_offsets(self, wanted: Any, **_: Any) -> dict[Any, Future[Any]]:
        answer, out = self.answers.pop(0), {}
        for tp in wanted:
            out[tp] = Future()
            code = answer[tp.partition]
            if code in (KafkaError.UNKNOWN_LEADER_EPOCH, KafkaError.TOPIC_AUTHORIZATION_FAILED):
                out[tp].set_exception(KafkaException(KafkaError(code)))
            else:
                out[tp].set_result(SimpleNamespace(offset=code))
        return out


def asked(*answers: dict[int, int]) -> dict[int, int]:
    admin = Admin(Settings())
    admin._client = Client(*answers)  # type: ignore[assignment]
    return admin.offsets({"t": 2})["t"]


def test_a_partition_that_is_new_in_this_moment_is_asked_again() -> None:
    assert asked({0: 5, 1: KafkaError.UNKNOWN_LEADER_EPOCH}, {1: 7}) == {0: 5, 1: 7}


def test_what_is_not_allowed_is_not_asked_again() -> None:
    with pytest.raises(AccessDenied):
        asked({0: 5, 1: KafkaError.TOPIC_AUTHORIZATION_FAILED})
