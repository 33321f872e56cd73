"""KEKs between the store and the KMS: where they are opened, and what a version that is gone means."""

import pytest

from sidecar.core.errors import KeyShredded, KmsUnavailable
from sidecar.keys import KeyManagement
from sidecar.testing.memory_kms import Memory, MemoryKms


async def test_a_row_under_a_destroyed_version_is_never_read_as_shredded() -> None:
    """It was re-wrapped since it was read, or the database is older than the seal epoch: try again, or wait for a person."""
    kms = MemoryKms()
    _, row = await KeyManagement(kms).make_kek("acme", 1)
    await kms.add_version()
    again = await KeyManagement(kms).rewrap_kek(row)
    await kms.destroy(row.kms_key_version)
    with pytest.raises(KeyShredded):
        await kms.unwrap(row.wrapped or b"", b"", row.kms_key_version)
    with pytest.raises(KmsUnavailable, match="from after that seal epoch"):
        await KeyManagement(kms).open_kek(row)
    assert (await KeyManagement(kms).open_kek(again)).version == 1


async def test_a_rewrapped_kek_is_the_same_key() -> None:
    kms = MemoryKms()
    keys = KeyManagement(kms)
    kek, row = await keys.make_kek("acme", 1)
    await kms.add_version()
    again = await keys.rewrap_kek(row)
    assert (again.kms_key_version, again.fingerprint) == (await kms.current(), row.fingerprint)
    assert (await keys.open_kek(again)).commitment() == kek.commitment()


async def test_a_row_says_which_kms_key_opens_it_whatever_the_setting_is() -> None:
    memory = Memory()
    dedicated, common = KeyManagement(MemoryKms(memory), dedicated=True), KeyManagement(MemoryKms(memory))
    _, own = await dedicated.make_kek("acme", 1)
    _, shared = await common.make_kek("globex", 1)
    assert own.kms_uri != shared.kms_uri == MemoryKms(memory).uri
    assert (await common.open_kek(own)).tenant == "acme"
    assert (await dedicated.open_kek(shared)).tenant == "globex"
