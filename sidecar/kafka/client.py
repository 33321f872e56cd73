"""Client configuration and error mapping, common to consumer, producer and admin."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from sidecar.core.errors import AccessDenied, BrokerUnavailable, ConfigurationError, SidecarError
from sidecar.settings import Settings


class ProducerFenced(SidecarError):
    """Another producer with this transactional id came later, or the group moved on: this one's transaction is void."""


class OutcomeUnknown(BrokerUnavailable):
    """A transaction may or may not have been committed."""


FENCED_CODES = frozenset(
    {
        KafkaError._FENCED,
        KafkaError.PRODUCER_FENCED,
        KafkaError.INVALID_PRODUCER_EPOCH,
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.STALE_MEMBER_EPOCH,
        KafkaError.FENCED_MEMBER_EPOCH,
        KafkaError.REBALANCE_IN_PROGRESS,
        KafkaError.INVALID_PRODUCER_ID_MAPPING,
        KafkaError.INVALID_TXN_STATE,
    }
)
_DENIED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)
_CONFIGURATION = frozenset({KafkaError._AUTHENTICATION, KafkaError._INVALID_ARG, KafkaError.SASL_AUTHENTICATION_FAILED})


def translate(error: KafkaError) -> SidecarError:
    """The product's error. librdkafka's text names brokers and topics, never a record."""
    code = error.code()
    if code in FENCED_CODES:
        return ProducerFenced(f"Kafka: {error.name()}")
    if code in _DENIED:
        return AccessDenied(f"Kafka: {error.name()}: this principal may not do that")
    if code in _CONFIGURATION:
        return ConfigurationError(f"Kafka: {error.str()}", where="kafka", mend="check kafka.security and kafka.client")
    return BrokerUnavailable(f"Kafka: {error.name()}")


@contextmanager
def mapped() -> Iterator[None]:
    """Every use of confluent_kafka stands in one of these."""
    try:
        yield
    except KafkaException as error:
        cause = error.args[0]
        raise translate(cause) from None


def client_config(settings: Settings, **more: Any) -> dict[str, Any]:
    """librdkafka's properties: connection and security, then `kafka.client` as it is, then the caller's, which win."""
    kafka, security = settings.kafka, settings.kafka.security
    config: dict[str, Any] = {"bootstrap.servers": kafka.bootstrap_servers, "security.protocol": security.protocol, "log_level": 3}
    if security.mechanism:
        config |= {"sasl.mechanism": security.mechanism, "sasl.username": security.username, "sasl.password": security.secret()}
    for name, file in (
        ("ssl.ca.location", security.ca_file),
        ("ssl.certificate.location", security.certificate_file),
        ("ssl.key.location", security.key_file),
    ):
        if file is not None:
            config[name] = str(file)
    return config | dict(kafka.client) | more
