"""Errors of the KMS client libraries: each is one of ours, and nothing unknown is ever erased, altered or allowed."""

import inspect
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import botocore.session
import hvac.exceptions
import pkcs11.exceptions
import pytest
import requests
from botocore.exceptions import BotoCoreError, EndpointConnectionError
from botocore.stub import Stubber

from sidecar.core.errors import AccessDenied, AuthenticationFailed, ConfigurationError, KeyShredded, KmsUnavailable, SidecarError
from sidecar.core.kms import KmsTraits, KmsUri, KmsVersion, VersionState, irrecoverability
from sidecar.kms import PROVIDERS, aws, open_kms, provider, vault
from sidecar.kms import pkcs11 as hsm
from sidecar.kms.aws import AwsKms

NOW = datetime.now(UTC)
KEY = "1234abcd-12ab-34cd-56ef-1234567890ab"


def classes(module: Any, root: type[Exception]) -> list[type[Exception]]:
    return [kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, root)]


@pytest.mark.parametrize("kind", classes(pkcs11.exceptions, pkcs11.exceptions.PKCS11Error), ids=lambda kind: kind.__name__)
def test_every_error_of_pkcs11_is_one_of_ours(kind: type[pkcs11.exceptions.PKCS11Error]) -> None:
    said = hsm.mapped(kind("a secret"), "pkcs11:x")
    assert type(said) in {KmsUnavailable, AccessDenied, AuthenticationFailed, ConfigurationError}
    assert "a secret" not in str(said)


@pytest.mark.parametrize(
    "kind", classes(hvac.exceptions, hvac.exceptions.VaultError) + classes(requests.exceptions, requests.RequestException), ids=lambda k: k.__name__
)
def test_every_error_of_hvac_and_requests_is_one_of_ours(kind: type[Exception]) -> None:
    said = vault.mapped(kind("a secret", *(("", 0) if kind is requests.exceptions.JSONDecodeError else ())), "vault:x")
    assert isinstance(said, KmsUnavailable | AccessDenied | ConfigurationError)
    assert "a secret" not in str(said)


def test_every_error_that_aws_documents_for_what_we_call_is_in_the_table() -> None:
    model = botocore.session.get_session().get_service_model("kms")
    documented = {shape.name for operation in aws.OPERATIONS for shape in model.operation_model(operation).error_shapes}
    assert documented - aws.ERRORS.keys() == set()
    called = {name for name in model.operation_names if f'"{_snake(name)}"' in inspect.getsource(aws)}
    assert called == set(aws.OPERATIONS)  # the table knows every operation that the adapter uses


@pytest.mark.parametrize("tables", [hsm.ERRORS, vault.ERRORS, aws.ERRORS], ids=["pkcs11", "vault", "aws-kms"])
def test_no_error_of_a_library_reads_as_shredded(tables: dict[Any, type[SidecarError]]) -> None:
    assert not any(issubclass(kind, KeyShredded) for kind in tables.values())


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


# ---- AWS, by the shapes of its interface ------------------------------------------------------------------------------


def stubbed(days: int = 7) -> tuple[AwsKms, Stubber]:
    client = boto3.client("kms", region_name="eu-central-1", aws_access_key_id="none", aws_secret_access_key="none")
    return AwsKms(KmsUri.parse(f"aws-kms:alias/sidecar?pending-days={days}"), client=client), Stubber(client)


def described(state: str, **more: Any) -> dict[str, Any]:
    return {"KeyMetadata": {"KeyId": KEY, "KeyState": state, "Origin": "AWS_KMS", "KeySpec": "SYMMETRIC_DEFAULT", "KeyManager": "CUSTOMER"} | more}


@pytest.mark.parametrize("state", ["Disabled", "PendingImport", "Unavailable", "Creating", "Updating", "PendingReplicaDeletion", "PendingDeletion"])
async def test_key_of_aws_in_a_state_that_somebody_can_undo_is_not_destroyed(state: str) -> None:
    kms, stub = stubbed()
    stub.add_response("describe_key", described(state, **({"DeletionDate": NOW + timedelta(days=7)} if state == "PendingDeletion" else {})))
    with stub:
        said = await kms.version(KEY)
    assert said.state in (VersionState.DISABLED, VersionState.PENDING)
    assert (said.irrecoverable_at is not None) == (state == "PendingDeletion")


async def test_key_that_aws_has_forgotten_is_destroyed_only_if_we_had_its_date_on_record_and_it_is_past() -> None:
    kms, stub = stubbed()
    past, to_come = NOW - timedelta(hours=1), NOW + timedelta(hours=1)
    for _ in range(3):
        stub.add_client_error("describe_key", "NotFoundException")
    with stub:
        for scheduled in (None, to_come):
            with pytest.raises(KmsUnavailable):
                await kms.version(KEY, scheduled=scheduled)
        assert await kms.version(KEY, scheduled=past) == KmsVersion(key_version=KEY, state=VersionState.DESTROYED, irrecoverable_at=past)


async def test_destroying_in_aws_schedules_the_deletion_and_gives_its_date() -> None:
    kms, stub = stubbed(days=30)
    date = NOW + timedelta(days=30)
    stub.add_response("describe_key", described("Enabled"), {"KeyId": KEY})
    stub.add_response("schedule_key_deletion", {"KeyId": KEY, "DeletionDate": date}, {"KeyId": KEY, "PendingWindowInDays": 30})
    stub.add_response("describe_key", described("PendingDeletion", DeletionDate=date), {"KeyId": KEY})
    with stub:
        assert await kms.destroy(KEY) == KmsVersion(key_version=KEY, state=VersionState.PENDING, irrecoverable_at=date)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("DisabledException", KmsUnavailable),
        ("KMSInvalidStateException", KmsUnavailable),
        ("NotFoundException", KmsUnavailable),
        ("ThrottlingException", KmsUnavailable),
        ("SomethingNewException", KmsUnavailable),
        ("InvalidCiphertextException", AuthenticationFailed),
        ("IncorrectKeyException", AuthenticationFailed),
        ("AccessDeniedException", AccessDenied),
        ("InvalidKeyUsageException", ConfigurationError),
    ],
)
async def test_refusal_of_aws_to_decrypt_is_what_the_table_says(code: str, error: type[SidecarError]) -> None:
    kms, stub = stubbed()
    stub.add_client_error("decrypt", code, "a secret")
    with stub, pytest.raises(error) as raised:
        await kms.unwrap(b"wrapped", b"aad", KEY)
    assert "a secret" not in str(raised.value)


@pytest.mark.parametrize(("code", "may"), [("NotFoundException", True), ("AccessDeniedException", False)])
async def test_right_to_destroy_in_aws_is_asked_of_a_key_that_cannot_exist(code: str, may: bool) -> None:
    kms, stub = stubbed()
    stub.add_client_error("schedule_key_deletion", code)
    with stub:
        assert await kms.may_destroy() is may


@pytest.mark.parametrize("changed", [{"Origin": "EXTERNAL"}, {"MultiRegion": True}, {"KeySpec": "RSA_4096"}, {"KeyManager": "AWS"}])
async def test_key_of_aws_of_which_a_copy_can_be_elsewhere_is_refused(changed: dict[str, Any]) -> None:
    kms, stub = stubbed()
    stub.add_response("describe_key", described("Enabled", **changed))
    with stub, pytest.raises(ConfigurationError):
        await kms.check()


async def test_tenant_is_not_readable_from_what_aws_logs() -> None:
    kms, stub = stubbed()
    stub.add_response("encrypt", {"CiphertextBlob": b"c", "KeyId": f"arn:aws:kms:eu-central-1:1:key/{KEY}"})
    with stub:
        seen: list[Any] = []
        kms._client.meta.events.register("before-parameter-build.kms.Encrypt", lambda params, **_: seen.append(params))
        assert await kms.wrap(b"payload", b"tenant acme") == (b"c", KEY)
    assert "acme" not in str(seen)
    assert seen[0]["EncryptionContext"]["alias"] == "alias/sidecar"


def test_error_of_the_library_itself_is_unavailable() -> None:
    def fail() -> None:
        raise EndpointConnectionError(endpoint_url="https://a-secret")

    with pytest.raises(KmsUnavailable) as raised:
        aws._mapped(fail, "aws-kms:alias/sidecar")
    assert "a-secret" not in str(raised.value)
    assert issubclass(EndpointConnectionError, BotoCoreError)


# ---- URIs and extras --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("gcp-kms:projects/x", "no KMS provider"),
        ("pkcs11:token=t", "names a token and a key"),
        ("pkcs11:token=t;object=k", "needs module-path"),
        ("pkcs11:token=t;object=k?module-path=/x&pin-value=1234", "'pin-value' is no option"),
        ("vault:transit/k?address=http://x&token=hvs.secret", "'token' is no option"),
        ("vault:kek?address=http://x", "names a mount and a key"),
        ("aws-kms:1234abcd", "names an alias"),
        ("aws-kms:alias/x?pending-days=1", "7 to 30"),
    ],
)
def test_uri_that_cannot_be_meant_is_refused_without_quoting_its_secret(uri: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as raised:
        provider(uri)
    assert "hvs.secret" not in str(raised.value)
    assert "1234" not in str(raised.value).replace("1234abcd", "")


@pytest.mark.parametrize(("scheme", "library", "extra"), [("pkcs11", "pkcs11", "pkcs11"), ("vault", "hvac", "vault"), ("aws-kms", "boto3", "aws")])
def test_missing_client_library_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch, scheme: str, library: str, extra: str) -> None:
    monkeypatch.delitem(sys.modules, PROVIDERS[scheme][0], raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigurationError, match=rf"sidecar\[{extra}\]"):
        open_kms(f"{scheme}:alias/x/y")


# ---- irrecoverable ----------------------------------------------------------------------------------------------------


def traits(*, reversible: bool = True) -> KmsTraits:
    return KmsTraits(provider="p", destroys="key", delay=timedelta(days=7), reversible=reversible, outlives="a backup", takes_aad=True)


@pytest.mark.parametrize(
    ("state", "date", "at", "reason"),
    [
        (VersionState.ENABLED, None, None, "in use"),
        (VersionState.ENABLED, NOW, None, "in use"),
        (VersionState.DISABLED, NOW, None, "somebody can undo"),
        (VersionState.PENDING, None, None, "under way"),
        (VersionState.PENDING, NOW, NOW, "can be cancelled until then"),
        (VersionState.DESTROYED, NOW, NOW, "a backup"),
        (VersionState.DESTROYED, None, None, "destroyed in the KMS"),
    ],
)
def test_moment_of_irrecoverability_comes_from_a_state_that_nobody_can_take_back(
    state: VersionState, date: datetime | None, at: datetime | None, reason: str
) -> None:
    said = irrecoverability(traits(), KmsVersion(key_version="1", state=state, irrecoverable_at=date))
    assert said.at == at
    assert reason in said.reason


def test_delay_that_nobody_can_cancel_is_not_said_to_be_reversible() -> None:
    said = irrecoverability(traits(reversible=False), KmsVersion(key_version="1", state=VersionState.PENDING, irrecoverable_at=NOW))
    assert "cancelled" not in said.reason
