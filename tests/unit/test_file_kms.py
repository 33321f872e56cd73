"""The key file: development's KMS."""

import os
from pathlib import Path

import pytest

from sidecar.core.errors import AuthenticationFailed, ConfigurationError, KmsUnavailable
from sidecar.kms import open_kms
from sidecar.kms.file import FileKms, create_key_file


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys" / "kek"
    create_key_file(path)
    return path


async def test_wrapped_key_comes_back_under_its_own_context_only(key_file: Path) -> None:
    kms = open_kms(f"file:{key_file}")
    wrapped, version = await kms.wrap(b"payload", b"acme")
    assert await kms.unwrap(wrapped, b"acme", version) == b"payload"
    with pytest.raises(AuthenticationFailed):
        await kms.unwrap(wrapped, b"globex", version)
    for at in range(len(wrapped)):
        with pytest.raises(AuthenticationFailed):
            await kms.unwrap(wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :], b"acme", version)
        with pytest.raises(AuthenticationFailed):
            await kms.unwrap(wrapped[:at], b"acme", version)


async def test_missing_or_another_key_file_is_unavailable_and_never_erased(key_file: Path, tmp_path: Path) -> None:
    kms = FileKms(str(key_file))
    wrapped, version = await kms.wrap(b"payload", b"")
    key_file.unlink()  # noqa: ASYNC240
    with pytest.raises(KmsUnavailable):
        await kms.unwrap(wrapped, b"", version)
    with pytest.raises(ConfigurationError, match="init"):  # at start it is a mistake to mend
        await kms.check()
    create_key_file(key_file)
    with pytest.raises(KmsUnavailable, match="holds key version"):
        await kms.unwrap(wrapped, b"", version)


def test_key_file_is_made_private_and_never_over_another(key_file: Path) -> None:
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert key_file.parent.stat().st_mode & 0o077 == 0
    before = key_file.read_bytes()
    with pytest.raises(FileExistsError):
        create_key_file(key_file)
    assert key_file.read_bytes() == before


async def test_key_file_that_others_may_read_is_refused(key_file: Path) -> None:
    os.chmod(key_file, 0o640)
    with pytest.raises(ConfigurationError, match="0640"):
        await FileKms(str(key_file)).check()


@pytest.mark.parametrize("content", [b"", b"sidecar-kek-v1\n", b"\0" * 32, b"sidecar-kek-v1\n" + b"\1" * 31, b"sidecar-kek-v1\n" + b"\1" * 33])
async def test_file_that_holds_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kek"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="no key file"):
        await FileKms(str(path)).check()


def test_uri_names_the_file_but_not_the_folder(key_file: Path) -> None:
    assert FileKms(str(key_file)).uri == "file:kek"
    assert os.fspath(key_file.parent) not in FileKms(str(key_file)).uri


@pytest.mark.parametrize("uri", ["", "file:", "vault:transit/x", "/etc/kek"])
def test_provider_that_this_release_does_not_have_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigurationError, match="no KMS provider"):
        open_kms(uri)
