"""A subject of the KMS conformance suite for every provider, each with its key made."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import ClientError
from moto import mock_aws

from sidecar.core.kms import KmsUri
from sidecar.kms import provider
from sidecar.kms.aws import AwsKms
from sidecar.ports import Kms
from sidecar.testing.kms_conformance import DISABLE, Subject
from sidecar.testing.memory_kms import Memory, MemoryKms
from sidecar.testing.softhsm import SoftHsm
from sidecar.testing.transit_server import TransitServer, transit_server

Opened = AbstractAsyncContextManager[Subject]


@asynccontextmanager
async def memory(delay: timedelta = timedelta(0), kind: type[MemoryKms] = MemoryKms) -> AsyncIterator[Subject]:
    held = Memory(delay=delay)

    async def disable(kms: Kms, version: str) -> None:
        assert isinstance(kms, MemoryKms)
        kms.disable(version)

    yield Subject(kms=kind(held), open=lambda: kind(held), disable=disable)


@asynccontextmanager
async def file(folder: Path) -> AsyncIterator[Subject]:
    (folder / "keys").mkdir()
    yield await made(f"file:{folder}/keys/kek")


@asynccontextmanager
async def pkcs11(hsm: SoftHsm) -> AsyncIterator[Subject]:
    yield await made(hsm.make_token())


@asynccontextmanager
async def vault(folder: Path) -> AsyncIterator[Subject]:
    async with transit_server() as server:
        yield await made(vault_uri(server, server.root, folder), disable=DISABLE["vault"])


def vault_uri(server: TransitServer, token: str, folder: Path, key: str = "transit/kek") -> str:
    file = folder / f"{token}.token"
    file.write_text(token)
    return f"vault:{key}?address={server.address}&token-file={file}"


@asynccontextmanager
async def aws() -> AsyncIterator[Subject]:
    """moto decrypts with disabled and deleted keys, and does not mind which key: what AWS refuses there, we refuse before it is asked."""
    with mock_aws():
        client = boto3.client("kms", region_name="eu-central-1", aws_access_key_id="none", aws_secret_access_key="none")

        def refuse(params: dict[str, Any], **_: Any) -> None:
            key = client.describe_key(KeyId=params["KeyId"])["KeyMetadata"]
            code = {"Disabled": "DisabledException", "PendingDeletion": "KMSInvalidStateException"}.get(key["KeyState"])
            if "CiphertextBlob" in params and not bytes(params["CiphertextBlob"]).startswith(key["KeyId"].encode()):
                code = "IncorrectKeyException"  # moto's ciphertext begins with the key's id
            if code:
                raise ClientError({"Error": {"Code": code, "Message": ""}}, "Decrypt")

        for operation in ("Encrypt", "Decrypt"):
            client.meta.events.register(f"provide-client-params.kms.{operation}", refuse)

        uri = KmsUri.parse("aws-kms:alias/sidecar?region=eu-central-1")
        subject = Subject(kms=AwsKms(uri, client=client), open=lambda: AwsKms(uri, client=client), disable=DISABLE["aws-kms"])
        await subject.kms.add_version()
        yield subject


async def made(uri: str, **more: Any) -> Subject:
    subject = Subject(kms=provider(uri), open=lambda: provider(uri), **more)
    await subject.kms.add_version()
    return subject


def all_of(folder: Path, hsm: SoftHsm) -> dict[str, Callable[[], Opened]]:
    return {
        "memory": memory,
        "memory that takes a week": lambda: memory(timedelta(days=7)),
        "file": lambda: file(folder),
        "pkcs11": lambda: pkcs11(hsm),
        "vault": lambda: vault(folder),
        "aws-kms": aws,
    }


NAMES = ("memory", "memory that takes a week", "file", "pkcs11", "vault", "aws-kms")
