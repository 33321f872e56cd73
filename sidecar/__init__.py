"""Kafka events with personal data, encrypted into Postgres; decrypted views for those who were granted them; unreadable on command.

What an application imports stands here; it is loaded when it is first asked for, so that the command line starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidecar.blind_index import Found as Found
    from sidecar.consumer import EventConsumer as EventConsumer
    from sidecar.core.errors import AccessDenied as AccessDenied
    from sidecar.core.errors import AuthenticationFailed as AuthenticationFailed
    from sidecar.core.errors import BrokerUnavailable as BrokerUnavailable
    from sidecar.core.errors import CommandRejected as CommandRejected
    from sidecar.core.errors import ConfigurationError as ConfigurationError
    from sidecar.core.errors import Conflict as Conflict
    from sidecar.core.errors import KeyExhausted as KeyExhausted
    from sidecar.core.errors import KeyShredded as KeyShredded
    from sidecar.core.errors import KeyUnavailable as KeyUnavailable
    from sidecar.core.errors import KmsUnavailable as KmsUnavailable
    from sidecar.core.errors import LedgerBehind as LedgerBehind
    from sidecar.core.errors import MalformedEnvelope as MalformedEnvelope
    from sidecar.core.errors import MalformedRecord as MalformedRecord
    from sidecar.core.errors import RecordError as RecordError
    from sidecar.core.errors import RecordRefused as RecordRefused
    from sidecar.core.errors import SidecarError as SidecarError
    from sidecar.core.errors import StoreUnavailable as StoreUnavailable
    from sidecar.core.errors import StreamErased as StreamErased
    from sidecar.core.errors import Unavailable as Unavailable
    from sidecar.core.errors import UnknownKey as UnknownKey
    from sidecar.core.errors import UnsupportedEnvelope as UnsupportedEnvelope
    from sidecar.core.errors import WrongVersion as WrongVersion
    from sidecar.core.model import Erased as Erased
    from sidecar.core.model import Event as Event
    from sidecar.core.model import Scope as Scope
    from sidecar.core.model import ScopeKind as ScopeKind
    from sidecar.core.policy import Policy as Policy
    from sidecar.core.store import Aggregated as Aggregated
    from sidecar.core.store import Appended as Appended
    from sidecar.core.store import Cursor as Cursor
    from sidecar.core.store import Expected as Expected
    from sidecar.core.store import NewEvent as NewEvent
    from sidecar.core.store import StreamRead as StreamRead
    from sidecar.core.store import Unreadable as Unreadable
    from sidecar.crypto_shredding import CryptoShreddingService as CryptoShreddingService
    from sidecar.crypto_store import CryptoEventStore as CryptoEventStore
    from sidecar.crypto_store import DecryptionConfig as DecryptionConfig
    from sidecar.crypto_store import EncryptionConfig as EncryptionConfig
    from sidecar.crypto_store import create_crypto_event_store as create_crypto_event_store
    from sidecar.key_management import KeyManagementService as KeyManagementService
    from sidecar.key_management import KeyName as KeyName
    from sidecar.library import Library as Library
    from sidecar.library import open_library as open_library
    from sidecar.opening import CryptoContext as CryptoContext
    from sidecar.policies import EncryptionPolicyService as EncryptionPolicyService
    from sidecar.policies import UnknownPolicy as UnknownPolicy
    from sidecar.ports import EventStore as EventStore
    from sidecar.postgres.event_store import PostgresEventStore as PostgresEventStore
    from sidecar.settings import PolicySpec as PolicySpec
    from sidecar.settings import Settings as Settings
    from sidecar.settings import load as load
    from sidecar.testing.memory import MemoryEventStore as MemoryEventStore

__version__ = "0.1.0"

_WHERE = {
    "EventConsumer": "consumer",
    "Found": "blind_index",
    "AccessDenied": "core.errors",
    "AuthenticationFailed": "core.errors",
    "BrokerUnavailable": "core.errors",
    "CommandRejected": "core.errors",
    "ConfigurationError": "core.errors",
    "Conflict": "core.errors",
    "KeyExhausted": "core.errors",
    "KeyShredded": "core.errors",
    "KeyUnavailable": "core.errors",
    "KmsUnavailable": "core.errors",
    "LedgerBehind": "core.errors",
    "MalformedEnvelope": "core.errors",
    "MalformedRecord": "core.errors",
    "RecordError": "core.errors",
    "RecordRefused": "core.errors",
    "SidecarError": "core.errors",
    "StoreUnavailable": "core.errors",
    "StreamErased": "core.errors",
    "Unavailable": "core.errors",
    "UnknownKey": "core.errors",
    "UnsupportedEnvelope": "core.errors",
    "WrongVersion": "core.errors",
    "Erased": "core.model",
    "Event": "core.model",
    "Scope": "core.model",
    "ScopeKind": "core.model",
    "Policy": "core.policy",
    "Aggregated": "core.store",
    "Appended": "core.store",
    "Cursor": "core.store",
    "Expected": "core.store",
    "NewEvent": "core.store",
    "StreamRead": "core.store",
    "Unreadable": "core.store",
    "CryptoShreddingService": "crypto_shredding",
    "CryptoContext": "opening",
    "CryptoEventStore": "crypto_store",
    "DecryptionConfig": "crypto_store",
    "EncryptionConfig": "crypto_store",
    "create_crypto_event_store": "crypto_store",
    "KeyManagementService": "key_management",
    "KeyName": "key_management",
    "Library": "library",
    "open_library": "library",
    "EncryptionPolicyService": "policies",
    "UnknownPolicy": "policies",
    "EventStore": "ports",
    "PostgresEventStore": "postgres.event_store",
    "PolicySpec": "settings",
    "Settings": "settings",
    "load": "settings",
    "MemoryEventStore": "testing.memory",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sidecar' has no attribute {name!r}")
    return getattr(import_module(f"sidecar.{_WHERE[name]}"), name)
