"""Every KMS provider keeps the contract; and the suite that says so is red on providers that do not."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.core.errors import KeyShredded, KmsUnavailable
from sidecar.core.kms import KmsVersion, VersionState
from sidecar.testing import kms_conformance as suite
from sidecar.testing.kms_conformance import CHECKS, Check, Subject
from sidecar.testing.memory_kms import MemoryKms
from sidecar.testing.softhsm import SoftHsm
from tests.contract import kms_subjects


@pytest.fixture(params=kms_subjects.NAMES)
async def subject(request: pytest.FixtureRequest, tmp_path: Path, softhsm: SoftHsm) -> AsyncIterator[Subject]:
    async with kms_subjects.all_of(tmp_path, softhsm)[request.param]() as opened:
        yield opened


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_provider_keeps_the_contract(subject: Subject, check: Check) -> None:
    if check is suite.disabled_version_is_not_destroyed and subject.disable is None:
        with pytest.raises(suite.NotApplicable):  # file and PKCS#11 know no such state
            await check(subject)
        return
    await check(subject)


class ForgetsTheContext(MemoryKms):
    async def wrap(self, plaintext: bytes, aad: bytes) -> tuple[bytes, str]:
        return await super().wrap(plaintext, b"")

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        return await super().unwrap(wrapped, b"", key_version)


class CallsDisabledDestroyed(MemoryKms):
    async def version(self, key_version: str, **scheduled: object) -> KmsVersion:
        said = await super().version(key_version)
        return replace(said, state=VersionState.DESTROYED) if said.state is VersionState.DISABLED else said


class CallsPendingDestroyed(MemoryKms):
    async def version(self, key_version: str, **scheduled: object) -> KmsVersion:
        said = await super().version(key_version)
        return replace(said, state=VersionState.DESTROYED) if said.state is VersionState.PENDING else said


class ReadsAwayAsShredded(MemoryKms):
    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        try:
            return await super().unwrap(wrapped, aad, key_version)
        except KmsUnavailable:
            raise KeyShredded from None


class DecryptsFromACacheAfterDestruction(MemoryKms):
    cache: dict[bytes, bytes] = {}  # noqa: RUF012

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        try:
            self.cache[wrapped] = await super().unwrap(wrapped, aad, key_version)
        except KeyShredded:
            return self.cache[wrapped]
        return self.cache[wrapped]


class OnlySaysThatItDestroyed(MemoryKms):
    async def destroy(self, key_version: str) -> KmsVersion:
        return KmsVersion(key_version=key_version, state=VersionState.DESTROYED)


class DestroysTheWholeKey(MemoryKms):
    async def destroy(self, key_version: str) -> KmsVersion:
        for version in self._versions():
            said = await super().destroy(version)
        return said


class KeepsWrappingWithTheOldVersion(MemoryKms):
    async def current(self) -> str:
        return next(iter(self._versions()))


class SharesOneKeyAmongTenants(MemoryKms):
    async def dedicated(self, tenant: str) -> "SharesOneKeyAmongTenants":
        return self


class RepeatsNonces(MemoryKms):
    async def wrap(self, plaintext: bytes, aad: bytes) -> tuple[bytes, str]:
        return plaintext[::-1], await self.current()

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        return wrapped[::-1]


BROKEN = {
    ForgetsTheContext: {"another_context_is_refused"},
    CallsDisabledDestroyed: {"disabled_version_is_not_destroyed"},
    ReadsAwayAsShredded: {"disabled_version_is_not_destroyed", "unknown_version_is_never_read_as_destroyed"},
    DecryptsFromACacheAfterDestruction: {"destroyed_version_opens_nothing_and_the_next_one_does"},
    OnlySaysThatItDestroyed: {"destroyed_version_opens_nothing_and_the_next_one_does", "newest_version_can_be_destroyed_and_followed"},
    DestroysTheWholeKey: {"destroyed_version_opens_nothing_and_the_next_one_does"},
    KeepsWrappingWithTheOldVersion: {"new_version_is_used_and_the_old_one_still_opens"},
    SharesOneKeyAmongTenants: {"tenants_own_key_is_its_own"},
    RepeatsNonces: {"same_bytes_are_wrapped_differently_each_time", "altered_and_truncated_bytes_are_refused"},
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda kind: kind.__name__)
async def test_control_suite_is_red_on_a_broken_provider(broken: type[MemoryKms]) -> None:
    async with kms_subjects.memory(kind=broken) as subject:
        failed = {result.check async for result in suite.results(subject) if result.status == "failed"}
    assert BROKEN[broken] <= failed


async def test_control_suite_is_red_on_a_pending_destruction_that_is_called_done() -> None:
    async with kms_subjects.memory(kms_subjects.timedelta(days=7), CallsPendingDestroyed) as subject:
        failed = {result.check async for result in suite.results(subject) if result.status == "failed"}
    assert "destroyed_version_opens_nothing_and_the_next_one_does" in failed
