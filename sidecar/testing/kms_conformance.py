"""What every `ports.Kms` must do: one list of checks, run by our contract tests and by `sidecar kms conformance` against a user's own KMS.

The key that is named is wrapped and unwrapped with, nothing else. Whatever adds, disables or destroys does it on scratch keys that the suite
makes itself, as the keys of tenants that nobody has (`dedicated`).
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from sidecar.core.errors import AuthenticationFailed, KeyShredded, SidecarError, Unavailable
from sidecar.core.kms import VersionState, irrecoverability
from sidecar.ports import Kms

AAD = b"sidecar kms conformance"
SIZES = (1, 32, 200, 4000)
"""Of plaintexts, in bytes; a tenant key with what it is for has about 100. AWS takes 4096."""


class Nonconforming(Exception):
    """What the KMS does is not what the contract says."""


class NotApplicable(Exception):
    """The provider has no such thing, or it was not given to the suite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """`open`: opens the same key anew, as another process would. `disable`: forbids a version of a KMS in the way that its administrators can."""

    kms: Kms
    open: Callable[[], Kms]
    disable: Callable[[Any, str], Awaitable[None]] | None = None

    async def scratch(self, by: Kms | None = None) -> tuple[Kms, str]:
        """A key of the suite's own, and the tenant whose it is."""
        tenant = f"conformance-{secrets.token_hex(8)}"
        return await (by or self.kms).dedicated(tenant), tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    check: str
    status: str
    """passed, failed or not_applicable."""
    seconds: float
    error: str | None = None


Check = Callable[[Subject], Awaitable[None]]


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Nonconforming(otherwise)


async def refusal(call: Awaitable[Any], *kinds: type[SidecarError], what: str) -> None:
    """That the call is refused in one of these ways; never by an answer."""
    try:
        await call
    except SidecarError as error:
        expect(isinstance(error, kinds), f"{what}: {type(error).__name__} in place of {' or '.join(kind.__name__ for kind in kinds)}")
    else:
        raise Nonconforming(f"{what} was answered")


async def key_can_be_reached_and_cannot_leave(subject: Subject) -> None:
    await subject.kms.check()


async def identity_may_destroy(subject: Subject) -> None:
    expect(await subject.kms.may_destroy(), "this identity may not destroy keys: run the suite with the control plane's")


async def what_was_wrapped_comes_back(subject: Subject) -> None:
    for size in SIZES:
        plaintext = secrets.token_bytes(size)
        wrapped, version = await subject.kms.wrap(plaintext, AAD)
        expect(await subject.kms.unwrap(wrapped, AAD, version) == plaintext, f"{size} bytes came back as others")
        expect(plaintext not in wrapped or size == 1, f"{size} bytes stand in the wrap in clear")
    expect(version == await subject.kms.current(), "`current` is not the version that `wrap` names")


async def same_bytes_are_wrapped_differently_each_time(subject: Subject) -> None:
    wraps = {(await subject.kms.wrap(b"the same", AAD))[0] for _ in range(5)}
    expect(len(wraps) == 5, "two wraps of the same bytes are the same")


async def another_context_is_refused(subject: Subject) -> None:
    if not subject.kms.traits.takes_aad:
        raise NotApplicable
    wrapped, version = await subject.kms.wrap(b"payload", AAD)
    for other in (b"", AAD + b"x", b"another"):
        await refusal(subject.kms.unwrap(wrapped, other, version), AuthenticationFailed, what="a wrap with another associated data")


async def altered_and_truncated_bytes_are_refused(subject: Subject) -> None:
    wrapped, version = await subject.kms.wrap(b"payload", AAD)
    middle = len(wrapped) // 2
    altered = [wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :] for at in (middle - 3, middle, middle + 3)]
    for bytes_ in (*altered, wrapped[:middle], wrapped[:4], b""):
        await refusal(subject.kms.unwrap(bytes_, AAD, version), AuthenticationFailed, what="an altered wrap")


async def calls_side_by_side_do_not_mix(subject: Subject) -> None:
    async def there_and_back(number: int) -> bool:
        plaintext, aad = secrets.token_bytes(64), str(number).encode()
        wrapped, version = await subject.kms.wrap(plaintext, aad)
        return await subject.kms.unwrap(wrapped, aad, version) == plaintext

    expect(all(await asyncio.gather(*(there_and_back(n) for n in range(20)))), "calls at once got each other's answers")


async def stored_name_is_the_same_everywhere(subject: Subject) -> None:
    expect(subject.open().uri == subject.kms.uri, "opened again it has another uri")


async def tenants_own_key_is_its_own(subject: Subject) -> None:
    (one, tenant), (other, _) = await subject.scratch(), await subject.scratch()
    expect(len({one.uri, other.uri, subject.kms.uri}) == 3, "two keys have one uri")
    expect(tenant not in one.uri, "the uri of a tenant's key tells the tenant")
    wrapped, version = await one.wrap(b"payload", AAD)
    await refusal(other.unwrap(wrapped, AAD, version), AuthenticationFailed, Unavailable, what="another tenant's wrap")
    again = await subject.open().dedicated(tenant)
    expect(await again.unwrap(wrapped, AAD, version) == b"payload", "the tenant's key was not found again")


async def unknown_version_is_never_read_as_destroyed(subject: Subject) -> None:
    (one, _), (other, _) = await subject.scratch(), await subject.scratch()
    wrapped, _ = await one.wrap(b"payload", AAD)
    await other.current()
    foreign = await other.add_version()
    await refusal(one.unwrap(wrapped, AAD, foreign), AuthenticationFailed, Unavailable, what="a version of another key")
    try:
        state = (await one.version(foreign)).state
    except Unavailable:
        return
    expect(state is not VersionState.DESTROYED, "a version that it does not have is called destroyed")


async def new_version_is_used_and_the_old_one_still_opens(subject: Subject) -> None:
    kms, tenant = await subject.scratch()
    old, first = await kms.wrap(b"old", AAD)
    second = await kms.add_version()
    new, named = await kms.wrap(b"new", AAD)
    expect(first != second == named == await kms.current(), "`wrap` does not use the version that was added")
    opened = [await kms.unwrap(old, AAD, first), await kms.unwrap(new, AAD, second)]
    expect(opened == [b"old", b"new"], "a version does not open what it wrapped")
    for version in (first, second):
        expect((await kms.version(version)).state is VersionState.ENABLED, "a live version is not said to be enabled")
    elsewhere = await subject.open().dedicated(tenant)
    expect(await elsewhere.current() == second, "who opens the key anew does not see the version that was added")


async def destroyed_version_opens_nothing_and_the_next_one_does(subject: Subject) -> None:
    kms, tenant = await subject.scratch()
    old, first = await kms.wrap(b"old", AAD)
    await kms.add_version()
    new, second = await kms.wrap(b"new", AAD)
    elsewhere = await subject.open().dedicated(tenant)
    expect(await elsewhere.unwrap(old, AAD, first) == b"old", "who opens the key anew cannot use it")
    said = await kms.destroy(first)
    for who in (kms, elsewhere, await subject.open().dedicated(tenant)):
        await is_gone(who, old, first)
        expect(await who.unwrap(new, AAD, second) == b"new", "a survivor was lost with the version before it")
    expect((await kms.destroy(first)).state is said.state, "asked again it says something else")


async def newest_version_can_be_destroyed_and_followed(subject: Subject) -> None:
    """What the shred of a tenant with a key of its own does, and its readmission."""
    kms, tenant = await subject.scratch()
    wrapped, version = await kms.wrap(b"payload", AAD)
    await kms.destroy(version)
    await is_gone(kms, wrapped, version)
    again = await subject.open().dedicated(tenant)
    if await again.current() == version:
        await refusal(again.wrap(b"more", AAD), Unavailable, KeyShredded, what="a wrap with a destroyed version")
        await again.add_version()
    new, named = await again.wrap(b"readmitted", AAD)
    expect(named != version, "the destroyed version wraps again")
    expect(await again.unwrap(new, AAD, named) == b"readmitted", "the readmitted tenant's key does not open")
    await is_gone(again, wrapped, version)


async def disabled_version_is_not_destroyed(subject: Subject) -> None:
    if subject.disable is None:
        raise NotApplicable
    kms, _ = await subject.scratch()
    wrapped, version = await kms.wrap(b"payload", AAD)
    await kms.add_version()
    await subject.disable(kms, version)
    said = await kms.version(version)
    expect(said.state is VersionState.DISABLED, f"a disabled version is called {said.state}")
    expect(irrecoverability(kms.traits, said).at is None, "a disabled version has a moment of irrecoverability")
    await refusal(kms.unwrap(wrapped, AAD, version), Unavailable, what="a wrap of a disabled version")


async def is_gone(kms: Kms, wrapped: bytes, version: str) -> None:
    """Destroyed, or on its way: then it has a date, and nobody is told that it is done."""
    said, now = await kms.version(version), datetime.now(UTC)
    if said.state is VersionState.DESTROYED:
        await refusal(kms.unwrap(wrapped, AAD, version), KeyShredded, what="a wrap of a destroyed version")
        return
    expect(said.state is VersionState.PENDING, f"a version that was to be destroyed is {said.state}")
    expect(bool(kms.traits.delay), "a provider that says to destroy at once does not")
    expect(said.irrecoverable_at is not None and said.irrecoverable_at > now, "a pending destruction has no date to come")
    await refusal(kms.unwrap(wrapped, AAD, version), Unavailable, what="a wrap of a version that is to be destroyed")


CHECKS: Sequence[Check] = (
    key_can_be_reached_and_cannot_leave,
    stored_name_is_the_same_everywhere,
    what_was_wrapped_comes_back,
    same_bytes_are_wrapped_differently_each_time,
    another_context_is_refused,
    altered_and_truncated_bytes_are_refused,
    calls_side_by_side_do_not_mix,
    identity_may_destroy,
    tenants_own_key_is_its_own,
    unknown_version_is_never_read_as_destroyed,
    new_version_is_used_and_the_old_one_still_opens,
    disabled_version_is_not_destroyed,
    destroyed_version_opens_nothing_and_the_next_one_does,
    newest_version_can_be_destroyed_and_followed,
)
HARMLESS: Sequence[Check] = CHECKS[: CHECKS.index(identity_may_destroy)]
"""These make no scratch keys."""


async def _forbid_in_vault(kms: Any, key_version: str) -> None:
    await kms._call("update_key_configuration", min_decryption_version=int(key_version.partition("@")[0]) + 1)


async def _disable_in_aws(kms: Any, key_version: str) -> None:
    await kms._call("disable_key", KeyId=key_version)


DISABLE: Mapping[str, Callable[[Any, str], Awaitable[None]]] = {"vault": _forbid_in_vault, "aws-kms": _disable_in_aws}
"""Provider → how an administrator forbids a version. Others know nothing between enabled and destroyed."""


async def results(subject: Subject, checks: Sequence[Check] = CHECKS) -> AsyncIterator[Result]:
    """One after another, each as soon as it is known."""
    for check in checks:
        started, status, text = perf_counter(), "passed", None
        try:
            await check(subject)
        except NotApplicable:
            status = "not_applicable"
        except Nonconforming as error:
            status, text = "failed", str(error)
        except Exception as error:
            status, text = "failed", f"{type(error).__name__}{f': {error}' if isinstance(error, SidecarError) else ''}"
        yield Result(check=check.__name__, status=status, seconds=round(perf_counter() - started, 3), error=text)
