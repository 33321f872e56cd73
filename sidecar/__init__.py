"""Kafka events with personal data, encrypted into Postgres; decrypted views for those who were granted them; unreadable on command.

What an application imports stands here; it is loaded when it is first asked for, so that the command line starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidecar.consumer import EventConsumer as EventConsumer
    from sidecar.core.model import Erased as Erased
    from sidecar.core.model import Event as Event
    from sidecar.core.store import Cursor as Cursor
    from sidecar.core.store import Expected as Expected
    from sidecar.core.store import NewEvent as NewEvent
    from sidecar.core.store import Unreadable as Unreadable
    from sidecar.crypto_shredding import CryptoShreddingService as CryptoShreddingService
    from sidecar.crypto_store import CryptoContext as CryptoContext
    from sidecar.crypto_store import CryptoEventStore as CryptoEventStore
    from sidecar.crypto_store import DecryptionConfig as DecryptionConfig
    from sidecar.crypto_store import EncryptionConfig as EncryptionConfig
    from sidecar.crypto_store import create_crypto_event_store as create_crypto_event_store
    from sidecar.key_management import KeyManagementService as KeyManagementService
    from sidecar.library import Library as Library
    from sidecar.library import open_library as open_library
    from sidecar.policies import EncryptionPolicyService as EncryptionPolicyService
    from sidecar.postgres.event_store import PostgresEventStore as PostgresEventStore
    from sidecar.settings import PolicySpec as PolicySpec
    from sidecar.settings import load as load
    from sidecar.testing.memory import MemoryEventStore as MemoryEventStore

__version__ = "0.1.0"

_WHERE = {
    "EventConsumer": "consumer",
    "Erased": "core.model",
    "Event": "core.model",
    "Cursor": "core.store",
    "Expected": "core.store",
    "NewEvent": "core.store",
    "Unreadable": "core.store",
    "CryptoShreddingService": "crypto_shredding",
    "CryptoContext": "crypto_store",
    "CryptoEventStore": "crypto_store",
    "DecryptionConfig": "crypto_store",
    "EncryptionConfig": "crypto_store",
    "create_crypto_event_store": "crypto_store",
    "KeyManagementService": "key_management",
    "Library": "library",
    "open_library": "library",
    "EncryptionPolicyService": "policies",
    "PostgresEventStore": "postgres.event_store",
    "PolicySpec": "settings",
    "load": "settings",
    "MemoryEventStore": "testing.memory",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sidecar' has no attribute {name!r}")
    return getattr(import_module(f"sidecar.{_WHERE[name]}"), name)
