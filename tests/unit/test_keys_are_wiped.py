"""A tenant key that was opened is wiped, also where what follows fails."""

from typing import Any
from uuid import uuid4

import pytest

from sidecar.core.aead import KEY_BYTES, Suite
from sidecar.core.envelope import Header
from sidecar.core.errors import KmsUnavailable, StoreUnavailable
from sidecar.core.keys import Kek, KekRow
from sidecar.core.model import ScopeKind
from sidecar.event_store import Ciphers
from sidecar.keys import KeyManagement
from sidecar.streams import Streams
from sidecar.testing.memory_kms import MemoryKms


class Remembering(KeyManagement):
    """Opens `at_most` keys; then the KMS is away."""

    def __init__(self, at_most: int) -> None:
        super().__init__(MemoryKms())
        self.at_most, self.opened = at_most, list[Kek]()

    async def open_kek(self, row: KekRow) -> Kek:
        if len(self.opened) == self.at_most:
            raise KmsUnavailable
        self.opened.append(await super().open_kek(row))
        return self.opened[-1]


class Store:
    """Two tenants on record; their keys cannot be read."""

    def __init__(self, rows: list[KekRow]) -> None:
        self._rows = rows

    async def tenants(self, _: Any) -> list[dict[str, Any]]:
        names = ("generation", "kms_uri", "kms_key_version", "wrapped", "fingerprint", "dedicated")
        of_tenant = {"state": "active", "epoch": 1, "erased_classes": (), "foretold_classes": (), "has_barriers": False}
        return [{n: getattr(r, n) for n in names} | of_tenant | {"tenant_id": r.tenant, "kek_version": r.version} for r in self._rows]

    async def keys(self, _: Any) -> None:
        raise StoreUnavailable


async def made(at_most: int) -> tuple[Remembering, Any]:
    keys = Remembering(at_most)
    rows = [(await keys.make_kek(tenant, 1))[1] for tenant in ("acme", "globex")]
    return keys, Store(rows)


def wiped(keys: Remembering) -> list[bool]:
    return [bytes(kek._secret) == bytes(KEY_BYTES) for kek in keys.opened]


async def test_a_reader_wipes_tenant_keys_although_the_data_keys_cannot_be_read() -> None:
    keys, store = await made(2)
    header = Header(suite=Suite.AES_256_GCM, scope_kind=ScopeKind.STREAM, key_id=uuid4(), key_version=1, framed=True)
    with pytest.raises(StoreUnavailable):
        await Ciphers(store, keys).load_headers("acme", [header])
    assert wiped(keys) == [True, True]


async def test_the_cache_wipes_tenant_keys_although_the_next_one_cannot_be_opened() -> None:
    keys, store = await made(1)
    with pytest.raises(KmsUnavailable):
        await Streams(store, keys, max_streams=10).load_tenants(["acme", "globex"])
    assert wiped(keys) == [True]


async def test_control_a_key_in_use_is_not_wiped() -> None:
    keys, store = await made(2)
    await Streams(store, keys, max_streams=10).load_tenants(["acme", "globex"])
    assert wiped(keys) == [False, False]
