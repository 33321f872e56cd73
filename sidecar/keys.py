"""Key management: makes, wraps and unwraps KEKs and DEKs. Says nothing of where they are kept; keeps no bytes of them."""

import os
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

from sidecar.core.aead import KEY_BYTES, NONCE_BYTES, Cipher, Suite, wipe
from sidecar.core.errors import KeyShredded, KmsUnavailable, UnknownKey
from sidecar.core.keys import Dek, DekRow, Kek, KekRow, KeyName, fingerprint, kek_context
from sidecar.core.model import Scope, ScopeKind
from sidecar.ports import Kms


class KeyManagement:
    """KMS calls happen here and nowhere else. Raises KmsUnavailable, KeyShredded, UnknownKey, AuthenticationFailed."""

    def __init__(self, kms: Kms, *, dedicated: bool = False) -> None:
        """`dedicated`: new KEKs are wrapped by a KMS key of their tenant alone. Which key opens a KEK is on its row."""
        self._kms, self._dedicated = kms, dedicated

    async def make_kek(self, tenant: str, generation: int, version: int = 1) -> tuple[Kek, KekRow]:
        """A new KEK and the row to keep it in."""
        kek = Kek(tenant, generation, version, random_key())
        kms = await self._kms_of(tenant, self._dedicated)
        wrapped, kms_version = await _wrapped(kms, kek)
        row = KekRow(
            tenant=tenant,
            generation=generation,
            version=version,
            kms_uri=kms.uri,
            kms_key_version=kms_version,
            wrapped=wrapped,
            fingerprint=fingerprint(kek.commitment()),
            dedicated=self._dedicated,
        )
        return kek, row

    async def open_kek(self, row: KekRow) -> Kek:
        if row.wrapped is None:
            raise KeyShredded
        kms = await self._kms_of(row.tenant, row.dedicated)
        try:
            payload = await kms.unwrap(row.wrapped, kek_context(row.tenant, row.generation, row.version), row.kms_key_version)
        except KeyShredded:
            # Nobody shredded this row. It was re-wrapped since it was read, or the database is older than the seal epoch.
            raise KmsUnavailable(
                f"the KMS destroyed version {row.kms_key_version} of {kms.uri}, which still wraps a tenant key in this database: "
                "if it stays so, restore a backup from after that seal epoch was retired"
            ) from None
        return Kek.from_payload(payload, row.tenant, row.generation, row.version)

    async def rewrap_kek(self, row: KekRow) -> KekRow:
        """The same KEK under the KMS key's current version, tried before it is answered: the old wrap is given up for it."""
        kek = await self.open_kek(row)
        kms = await self._kms_of(row.tenant, row.dedicated)
        wrapped, kms_version = await _wrapped(kms, kek)
        kek.destroy()
        again = replace(row, wrapped=wrapped, kms_key_version=kms_version)
        (await self.open_kek(again)).destroy()
        return again

    async def _kms_of(self, tenant: str, dedicated: bool) -> Kms:
        return await self._kms.dedicated(tenant) if dedicated else self._kms


async def _wrapped(kms: Kms, kek: Kek) -> tuple[bytes, str]:
    payload = kek.payload()
    try:
        return await kms.wrap(payload, kek_context(kek.tenant, kek.generation, kek.version))
    finally:
        wipe(payload)


def random_key() -> bytearray:
    """A new key, read into the one place where it will be wiped: `os.urandom` gives bytes, which cannot be."""
    key = bytearray(KEY_BYTES)
    with open("/dev/urandom", "rb", buffering=0) as source:
        if source.readinto(key) != KEY_BYTES:
            raise OSError("/dev/urandom gave less than a key")
    return key


def make_dek(kek: Kek, scope: Scope, suite: Suite, key_id: UUID | None = None, version: int = 1) -> tuple[DekRow, Cipher]:
    """The next version of a scope's key, or a new key: the row to keep it in and the cipher; the bytes are wiped."""
    name = KeyName(scope=scope, key_id=key_id or uuid4(), version=version, generation=kek.generation)
    secret = random_key()
    wrapped, committed = kek.wrap(secret, name, os.urandom(NONCE_BYTES))
    cipher = suite.cipher(secret)
    wipe(secret)
    return DekRow(name=name, kek_version=kek.version, wrapped=wrapped, commitment=committed), cipher


def rewrap_dek(keks: dict[int, Kek], row: DekRow, under: Kek) -> bytes:
    """The same DEK wrapped by another KEK of its tenant's generation. Raises as `open_dek`."""
    dek = open_dek(keks, row)
    return dek.wrapped_by(under, os.urandom(NONCE_BYTES))


def open_dek(keks: dict[int, Kek], row: DekRow) -> Dek:
    """Raises KeyShredded, UnknownKey when its KEK is not among those, AuthenticationFailed."""
    if row.wrapped is None:
        raise KeyShredded
    kek = keks.get(row.kek_version)
    if kek is None or kek.generation != row.name.generation:
        raise UnknownKey("a key's tenant key is not recorded")
    return kek.unwrap(row.wrapped, row.name, row.commitment)


def dek_row(row: Any) -> DekRow:
    """From a record of encryption_keys."""
    scope = Scope(tenant=row["tenant_id"], kind=ScopeKind(row["scope_kind"]), id=row["scope_id"])
    return DekRow(
        name=KeyName(scope=scope, key_id=row["key_id"], version=row["key_version"], generation=row["generation"]),
        kek_version=row["kek_version"],
        wrapped=row["key_material"],
        commitment=row["commitment"],
        is_active=row["is_active"],
    )


def kek_row(row: Any) -> KekRow:
    """From a record of tenant_keys."""
    return KekRow(
        tenant=row["tenant_id"],
        generation=row["generation"],
        version=row["kek_version"],
        kms_uri=row["kms_uri"],
        kms_key_version=row["kms_key_version"],
        wrapped=row["wrapped"],
        fingerprint=row["fingerprint"],
        dedicated=row["dedicated"],
    )
