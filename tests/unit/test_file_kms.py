"""The key file: development's KMS."""

import os
from pathlib import Path

import pytest

from sidecar.core.errors import AuthenticationFailed, ConfigurationError, KeyShredded, KmsUnavailable
from sidecar.core.kms import VersionState
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
    with pytest.raises(KmsUnavailable, match="holds no key version"):
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


@pytest.mark.parametrize("uri", ["", "file:", "/etc/kek"])
def test_text_that_is_no_kms_uri_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigurationError, match="no KMS URI"):
        open_kms(uri)


async def test_destroyed_version_is_shredded_and_only_that_one(key_file: Path) -> None:
    kms = FileKms(str(key_file))
    old, first = await kms.wrap(b"old", b"")
    second = await kms.add_version()
    new, named = await kms.wrap(b"new", b"")
    assert named == second == await kms.current() != first
    assert (await kms.destroy(first)).state is VersionState.DESTROYED
    with pytest.raises(KeyShredded):
        await kms.unwrap(old, b"", first)
    assert await kms.unwrap(new, b"", second) == b"new"
    assert not key_file.exists()  # noqa: ASYNC240
    said = await kms.version(first)
    assert said.state is VersionState.DESTROYED
    assert said.irrecoverable_at is not None
    assert await kms.destroy(first) == said


async def test_key_file_that_came_back_after_its_destruction_is_neither_used_nor_called_destroyed(key_file: Path) -> None:
    """A restored backup, or a destruction that was cut short: the record is there and so is the file."""
    kms = FileKms(str(key_file))
    copy = key_file.read_bytes()  # noqa: ASYNC240
    wrapped, version = await kms.wrap(b"payload", b"")
    await kms.destroy(version)
    create_key_file(key_file)
    key_file.write_bytes(copy)  # noqa: ASYNC240
    assert (await kms.version(version)).state is VersionState.PENDING
    with pytest.raises(KmsUnavailable):
        await kms.unwrap(wrapped, b"", version)
    assert (await kms.destroy(version)).state is VersionState.DESTROYED
    assert not key_file.exists()  # noqa: ASYNC240


async def test_wrap_never_falls_back_to_a_version_before_the_destroyed_one(key_file: Path) -> None:
    kms = FileKms(str(key_file))
    await kms.destroy(await kms.add_version())
    with pytest.raises(KmsUnavailable, match="add one"):
        await kms.wrap(b"payload", b"")


async def test_dedicated_key_is_the_tenants_alone_and_does_not_tell_whose(key_file: Path) -> None:
    kms = FileKms(str(key_file))
    acme, globex = await kms.dedicated("acme"), await kms.dedicated("globex")
    assert len({acme.uri, globex.uri, kms.uri}) == 3
    assert not any("acme" in name for name in os.listdir(key_file.parent))
    wrapped, version = await acme.wrap(b"payload", b"")
    assert await (await kms.dedicated("acme")).unwrap(wrapped, b"", version) == b"payload"
    await acme.destroy(version)
    with pytest.raises(KeyShredded):
        await (await kms.dedicated("acme")).unwrap(wrapped, b"", version)
    assert await acme.current() == version
    another = await (await kms.dedicated("acme")).add_version()
    again, named = await (await kms.dedicated("acme")).wrap(b"readmitted", b"")
    assert named == another != version
    assert await acme.unwrap(again, b"", another) == b"readmitted"
