"""AWS KMS, by boto3.

    aws-kms:alias/NAME?region=…&profile=…&endpoint=…&pending-days=7         (credentials: boto3's chain; a profile per role)

AWS destroys whole keys only, 7 to 30 days after it was asked to, and anybody with the right can cancel that until then. So a version is a key:
the alias names the current one, `add_version` makes another and moves the alias. AWS forgets a destroyed key: not to be found counts as destroyed
only against a date that the caller has on record (`version(scheduled=…)`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoRegionError, ParamValidationError, ProfileNotFound, UnknownServiceError

from sidecar.core.errors import AccessDenied, AuthenticationFailed, ConfigurationError, KmsUnavailable, SidecarError
from sidecar.core.kms import KmsTraits, KmsUri, KmsVersion, VersionState, dedicated_name

T = TypeVar("T")

TRAITS: Final = KmsTraits(
    provider="aws-kms",
    destroys="key",
    delay=timedelta(days=7),
    reversible=True,
    outlives="nothing that a customer can reach; multi-Region replicas are keys of their own (refused at start)",
    takes_aad=True,
    rights="kms:CreateKey, kms:UpdateAlias, kms:CreateAlias, kms:ScheduleKeyDeletion, kms:DescribeKey on the keys and the alias",
    ran_against="shapes only (moto, with the refusals of disabled and pending keys added by us); not AWS",
)

OPERATIONS: Final = ("Encrypt", "Decrypt", "DescribeKey", "CreateKey", "CreateAlias", "UpdateAlias", "ScheduleKeyDeletion")

ERRORS: Final[dict[str, type[SidecarError]]] = {
    **dict.fromkeys(("InvalidCiphertextException", "IncorrectKeyException"), AuthenticationFailed),
    **dict.fromkeys(("AccessDeniedException", "UnrecognizedClientException", "ExpiredTokenException"), AccessDenied),
    **dict.fromkeys(
        (
            "AlreadyExistsException",
            "CloudHsmClusterInvalidConfigurationException",
            "CloudHsmClusterNotActiveException",
            "CloudHsmClusterNotFoundException",
            "CustomKeyStoreInvalidStateException",
            "CustomKeyStoreNotFoundException",
            "DependencyTimeoutException",
            "DisabledException",
            "KMSInternalException",
            "KMSInvalidStateException",
            "KeyUnavailableException",
            "LimitExceededException",
            "NotFoundException",
            "ThrottlingException",
            "XksKeyAlreadyInUseException",
            "XksKeyInvalidConfigurationException",
            "XksKeyNotFoundException",
        ),
        KmsUnavailable,
    ),
    **dict.fromkeys(
        (
            "DryRunOperationException",
            "InvalidAliasNameException",
            "InvalidArnException",
            "InvalidGrantTokenException",
            "InvalidKeyUsageException",
            "MalformedPolicyDocumentException",
            "TagException",
            "UnsupportedOperationException",
            "ValidationException",
        ),
        ConfigurationError,
    ),
}
"""Error code → what it is for us. One that is not here is unavailable: nothing unknown is ever erased or altered bytes."""

_STATES: Final = {
    "Enabled": VersionState.ENABLED,
    "PendingDeletion": VersionState.PENDING,
    "PendingReplicaDeletion": VersionState.PENDING,
}
"""Any other state (Disabled, PendingImport, Unavailable …) is one that somebody can undo."""


class AwsKms:
    """An alias and the successive keys that it has named."""

    traits = TRAITS

    def __init__(self, uri: KmsUri, *, client: Any = None, own: bool = False) -> None:
        """`client`: boto3's for KMS, in place of one made from the URI. `own`: a tenant's, made when it is first needed."""
        uri.known("region", "profile", "endpoint", "pending-days")
        if not uri.name.startswith("alias/"):
            raise ConfigurationError(
                "an aws-kms: URI names an alias", where="kms.uri", mend="aws-kms:alias/sidecar?region=…: successive keys need one"
            )
        days = uri.options.get("pending-days", "7")
        if not (days.isdigit() and 7 <= int(days) <= 30):
            raise ConfigurationError(
                f"pending-days={days}: AWS takes 7 to 30", where="kms.uri", mend="the shorter, the sooner is a shred irrecoverable"
            )
        self._parsed, self._alias, self._days, self._own = uri, uri.name, int(days), own
        self._client = client or _client(uri)

    @property
    def uri(self) -> str:
        region = self._parsed.options.get("region")
        return f"aws-kms:{self._alias}{f'?region={region}' if region else ''}"

    async def wrap(self, plaintext: bytes | bytearray, aad: bytes) -> tuple[bytes, str]:
        arguments = {"KeyId": self._alias, "Plaintext": plaintext, "EncryptionContext": self._context(aad)}
        said = await self._made(lambda: self._call("encrypt", **arguments))
        return said["CiphertextBlob"], _key_id(said["KeyId"])

    async def unwrap(self, wrapped: bytes, aad: bytes, key_version: str) -> bytes:
        """Never KeyShredded: AWS cannot tell a key that was destroyed from one that never was."""
        if not wrapped:
            raise AuthenticationFailed
        said = await self._call("decrypt", KeyId=key_version, CiphertextBlob=wrapped, EncryptionContext=self._context(aad))
        return bytes(said["Plaintext"])

    async def check(self, *, destroys: bool = False) -> None:
        where = f"kms.uri: {self.uri}"
        try:
            key = await self._describe(self._alias)
        except _Missing as error:
            raise ConfigurationError(str(error), where=where, mend="`sidecar kms create`, or create a symmetric key and this alias") from None
        wrong = {
            "its material was imported, so a copy of it is elsewhere": key.get("Origin") != "AWS_KMS",
            "it can be replicated to other Regions, where it outlives its destruction": key.get("MultiRegion", False),
            "it is not a symmetric key of ours": key.get("KeySpec") != "SYMMETRIC_DEFAULT" or key.get("KeyManager") != "CUSTOMER",
        }
        for what, is_so in wrong.items():
            if is_so:
                mend = "a customer managed, symmetric, single-Region key with material from AWS_KMS"
                raise ConfigurationError(f"the key cannot be used: {what}", where=where, mend=mend)
        if destroys and not await self.may_destroy():
            raise ConfigurationError("the control plane's identity may not destroy keys", where=where, mend=f"it needs {TRAITS.rights}")

    async def current(self) -> str:
        return str((await self._made(lambda: self._describe(self._alias)))["KeyId"])

    async def add_version(self) -> str:
        """Another key, and the alias on it; where there is no alias yet, that too."""
        made: str = (await self._call("create_key", Description=f"sidecar {self._alias}", KeySpec="SYMMETRIC_DEFAULT"))["KeyMetadata"]["KeyId"]
        try:
            await self._call("update_alias", AliasName=self._alias, TargetKeyId=made)
        except _Missing:
            await self._call("create_alias", AliasName=self._alias, TargetKeyId=made)
        return made

    async def version(self, key_version: str, *, scheduled: datetime | None = None) -> KmsVersion:
        try:
            key = await self._describe(key_version)
        except _Missing:
            if scheduled is None or datetime.now(UTC) < scheduled:
                raise
            return KmsVersion(key_version=key_version, state=VersionState.DESTROYED, irrecoverable_at=scheduled)
        state = _STATES.get(key["KeyState"], VersionState.DISABLED)
        return KmsVersion(key_version=key_version, state=state, irrecoverable_at=key.get("DeletionDate") if state is VersionState.PENDING else None)

    async def destroy(self, key_version: str) -> KmsVersion:
        now = await self.version(key_version)
        if now.state is not VersionState.PENDING:
            await self._call("schedule_key_deletion", KeyId=key_version, PendingWindowInDays=self._days)
        return await self.version(key_version)

    async def may_destroy(self) -> bool:
        """Asked with a key that cannot exist: AWS looks at the caller's right first, so `not found` means that it would have been allowed.

        A right that is tied to one key's own policy does not show this way: grant by IAM policy, as docs/kms.md does.
        """
        try:
            await self._call("schedule_key_deletion", KeyId="00000000-0000-0000-0000-000000000000", PendingWindowInDays=30)
        except _Missing:
            return True
        except AccessDenied:
            return False
        return True

    async def dedicated(self, tenant: str) -> "AwsKms":
        name = dedicated_name(self._alias, tenant)
        return AwsKms(KmsUri(scheme="aws-kms", name=name, options=self._parsed.options), client=self._client, own=True)

    def _context(self, aad: bytes) -> dict[str, str]:
        """AWS logs it in clear: a digest binds as well, and names no tenant there. The alias, for AWS itself opens whatever key is asked for."""
        return {"sidecar": sha256(aad).hexdigest(), "alias": self._alias}

    async def _made(self, ask: Callable[[], Awaitable[T]]) -> T:
        try:
            return await ask()
        except _Missing:
            if not self._own:
                raise
        await self.add_version()
        return await ask()

    async def _describe(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self._call("describe_key", KeyId=key))["KeyMetadata"]
        return found

    async def _call(self, method: str, **arguments: Any) -> Any:
        return await asyncio.to_thread(_mapped, lambda: getattr(self._client, method)(**arguments), self.uri)


class _Missing(KmsUnavailable):
    """AWS knows no such key."""


def _mapped(ask: Callable[[], T], uri: str) -> T:
    """No text of the library's: it quotes ARNs and requests."""
    try:
        return ask()
    except (NoRegionError, ParamValidationError, ProfileNotFound, UnknownServiceError) as error:
        mend = "region=… in the URI or $AWS_REGION; a profile that exists"
        raise ConfigurationError(f"{uri}: {type(error).__name__}", where="kms.uri", mend=mend) from None
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
    except BotoCoreError as error:
        raise KmsUnavailable(f"{uri}: {type(error).__name__}") from None
    text = f"{uri}: {code}"
    kind = ERRORS.get(code, KmsUnavailable)
    if code == "NotFoundException":
        raise _Missing(f"{uri}: there is no such key")
    raise ConfigurationError(text, where="kms.uri", mend="see docs/kms.md") if kind is ConfigurationError else kind(text)


def _client(uri: KmsUri) -> Any:
    options = uri.options
    config = Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0})
    session = _mapped(lambda: boto3.session.Session(profile_name=options.get("profile")), "aws-kms")
    return _mapped(lambda: session.client("kms", region_name=options.get("region"), endpoint_url=options.get("endpoint"), config=config), "aws-kms")


def _key_id(arn: str) -> str:
    return arn.rpartition("/")[2]
