"""What start-up refuses: keys that can leave, identities that may too much or too little. And what a KMS that is away means."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pkcs11 import Attribute, KeyType, ObjectClass

from sidecar import telemetry
from sidecar.core.errors import AccessDenied, AuthenticationFailed, ConfigurationError, KmsUnavailable
from sidecar.core.kms import VersionState
from sidecar.kms import check_identity, open_for, open_kms, provider
from sidecar.kms.wrappers import Watched
from sidecar.servers import KmsSettings
from sidecar.testing.memory_kms import Memory, MemoryKms
from sidecar.testing.softhsm import SoftHsm, library
from sidecar.testing.transit_server import TransitKey, TransitServer, transit_server
from tests.contract.kms_subjects import vault_uri

DATA = {"transit/keys/kek": {"read"}, "transit/encrypt/kek": {"update"}, "transit/decrypt/kek": {"update"}}
CONTROL = DATA | {f"transit/keys/kek/{verb}": {"update"} for verb in ("rotate", "config", "trim")}


@pytest.fixture
async def server() -> AsyncIterator[TransitServer]:
    async with transit_server() as serving:
        serving.keys["", "transit/keys/kek"] = key = TransitKey("kek", deletion_allowed=True)
        key.rotate()
        yield serving


def key_of(server: TransitServer) -> TransitKey:
    return server.keys["", "transit/keys/kek"]


def kms(server: TransitServer, folder: Path, grants: dict[str, set[str]]) -> Watched:
    return open_kms(vault_uri(server, server.grant(grants), folder))


# ---- keys that can leave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["exportable", "allow_plaintext_backup", "imported_key"])
@pytest.mark.parametrize("role", ["data", "control"])
async def test_transit_key_that_can_leave_vault_is_refused(server: TransitServer, tmp_path: Path, flag: str, role: Any) -> None:
    own = kms(server, tmp_path, CONTROL if role == "control" else DATA)
    await check_identity(own, role, production=True)
    setattr(key_of(server), flag, True)
    with pytest.raises(ConfigurationError, match=flag):
        await check_identity(own, role, production=False)


@pytest.mark.parametrize("changed", [{"type": "rsa-4096"}, {"derived": True}])
async def test_transit_key_of_another_kind_is_refused(server: TransitServer, tmp_path: Path, changed: dict[str, Any]) -> None:
    vars(key_of(server)).update(changed)
    with pytest.raises(ConfigurationError, match="aes256-gcm96"):
        await kms(server, tmp_path, DATA).check()


@pytest.mark.parametrize("template", [{Attribute.EXTRACTABLE: True}, {Attribute.SENSITIVE: False}], ids=["extractable", "not sensitive"])
async def test_pkcs11_key_that_can_leave_the_token_is_refused(softhsm: SoftHsm, template: dict[Attribute, bool]) -> None:
    own: Any = provider(softhsm.make_token())
    await own.add_version()
    await own.check()
    guarded = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
    await own._run(lambda s: s.generate_key(KeyType.AES, 256, label="kek", id=b"2", store=True, template=guarded | template))
    with pytest.raises(ConfigurationError, match="can leave the token"):
        await own.check()


async def test_pkcs11_key_that_was_imported_is_refused(softhsm: SoftHsm) -> None:
    own: Any = provider(softhsm.make_token())
    kind = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES, Attribute.TOKEN: True, Attribute.LABEL: "kek"}
    made = {Attribute.VALUE: os.urandom(32), Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.ID: b"1"}
    await own._run(lambda session: session.create_object(kind | made))
    with pytest.raises(ConfigurationError, match="was outside"):
        await own.check()


# ---- rights -----------------------------------------------------------------------------------------------------------


async def test_control_plane_without_deletion_allowed_is_refused(server: TransitServer, tmp_path: Path) -> None:
    key_of(server).deletion_allowed = False
    with pytest.raises(ConfigurationError, match="does not allow deletion"):
        await check_identity(kms(server, tmp_path, CONTROL), "control", production=False)
    with pytest.raises(AccessDenied):  # and it destroys nothing of such a key
        await kms(server, tmp_path, CONTROL).destroy(await kms(server, tmp_path, CONTROL).current())


@pytest.mark.parametrize("verb", ["rotate", "config", "trim"])
async def test_control_plane_that_may_not_destroy_is_refused(server: TransitServer, tmp_path: Path, verb: str) -> None:
    grants = {path: may for path, may in CONTROL.items() if not path.endswith(verb)}
    with pytest.raises(ConfigurationError, match=f"lacks update on transit/keys/kek/{verb}"):
        await check_identity(kms(server, tmp_path, grants), "control", production=False)


@pytest.mark.parametrize("right", [{"transit/keys/kek/trim": {"update"}}, {"transit/keys/kek": {"read", "delete"}}, {"*": {"root"}}])
async def test_data_plane_that_may_destroy_is_refused_in_production_and_warned_of_else(
    server: TransitServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, right: dict[str, set[str]]
) -> None:
    with pytest.raises(ConfigurationError, match="may destroy keys"):
        await check_identity(kms(server, tmp_path, DATA | right), "data", production=True)
    await check_identity(kms(server, tmp_path, DATA | right), "data", production=False)
    assert "profile production refuses that" in caplog.text


_MAKES = """
import asyncio, sys
from pathlib import Path
from sidecar.kms import provider
from sidecar.testing.softhsm import SoftHsm
uri = SoftHsm(Path(sys.argv[1])).make_token()
asyncio.run(provider(uri).add_version())
print(uri)
"""
_USES = """
import asyncio, os, sys
from sidecar.kms import check_identity, open_kms
kms = open_kms(sys.argv[1])
if sys.argv[2] == "other" and os.getuid() == 0:  # whom no mode keeps from writing
    os.setgid(65534), os.setuid(65534)
async def main():
    await check_identity(kms, "data", production=True)
    wrapped, version = await kms.wrap(b"payload", b"")
    assert await kms.unwrap(wrapped, b"", version) == b"payload"
    await check_identity(kms, "control", production=False)
asyncio.run(main())
"""


def test_user_who_may_only_read_an_hsm_is_a_data_plane_and_no_control_plane() -> None:
    """In a folder that others may look into, and in processes of their own, which know no other token."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "softhsm")
        environment = dict(os.environ) | {"SOFTHSM2_CONF": str(folder / "softhsm2.conf")}

        def python(script: str, *words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", script, *words]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

        uri = python(_MAKES, str(folder)).stdout.strip()
        refused = python(_USES, uri, "ours")
        assert "the data plane's KMS identity may destroy keys" in refused.stderr  # control: we may write
        for path in (*folder.rglob("*"), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        Path(parent).chmod(0o755)
        refused = python(_USES, uri, "other")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
    assert "the control plane's identity may not destroy keys" in refused.stderr


async def test_role_that_names_another_key_is_refused(tmp_path: Path) -> None:
    settings = KmsSettings(uri=f"file:{tmp_path}/kek", uri_control=f"file:{tmp_path}/other")
    with pytest.raises(ConfigurationError, match="file:other"):
        open_for(settings, "control")


async def test_data_plane_makes_keys_of_tenants_with_the_policy_of_the_docs_and_still_may_not_destroy(server: TransitServer, tmp_path: Path) -> None:
    grants = {"transit/keys/+": {"read", "update"}, "transit/encrypt/+": {"update"}, "transit/decrypt/+": {"update"}}
    own = kms(server, tmp_path, DATA | grants)
    await check_identity(own, "data", production=True)
    tenants = await own.dedicated("acme")
    wrapped, version = await tenants.wrap(b"payload", b"")
    assert await tenants.unwrap(wrapped, b"", version) == b"payload"
    with pytest.raises(AccessDenied):
        await tenants.destroy(version)
    control = kms(server, tmp_path, CONTROL | grants | {f"transit/keys/+/{verb}": {"update"} for verb in ("rotate", "config", "trim")})
    assert (await (await control.dedicated("acme")).destroy(version)).state is VersionState.DESTROYED
    glob = kms(server, tmp_path, DATA | {"transit/keys/kek-*": {"read", "update"}})
    with pytest.raises(ConfigurationError, match="may destroy keys"):  # the policy that one would write first
        await check_identity(glob, "data", production=True)


# ---- away is not erased -----------------------------------------------------------------------------------------------


async def test_sealed_vault_is_away_and_works_again_once_it_is_unsealed(server: TransitServer, tmp_path: Path) -> None:
    own = kms(server, tmp_path, CONTROL)
    wrapped, version = await own.wrap(b"payload", b"a")
    server.sealed = True
    for call in (own.wrap(b"", b""), own.unwrap(wrapped, b"a", version), own.version(version), own.destroy(version), own.may_destroy()):
        with pytest.raises(KmsUnavailable):
            await call
    server.sealed = False
    assert await own.unwrap(wrapped, b"a", version) == b"payload"


async def test_vault_that_cannot_be_reached_is_away(tmp_path: Path) -> None:
    async with transit_server() as server:
        uri = vault_uri(server, server.root, tmp_path)
    with pytest.raises(KmsUnavailable):
        await provider(uri).unwrap(b"vault:v1:AAAA", b"", "1@1")


async def test_token_that_was_revoked_makes_a_record_wait(server: TransitServer, tmp_path: Path) -> None:
    token = server.grant(DATA)
    own = open_kms(vault_uri(server, token, tmp_path))
    wrapped, version = await own.wrap(b"payload", b"a")
    server.revoke(token)
    with pytest.raises(KmsUnavailable, match="does not let"):
        await own.unwrap(wrapped, b"a", version)


async def test_vault_key_that_was_deleted_or_made_again_is_not_destroyed_by_us(server: TransitServer, tmp_path: Path) -> None:
    own = kms(server, tmp_path, CONTROL)
    wrapped, version = await own.wrap(b"payload", b"a")
    server.keys.clear()
    for call in (own.unwrap(wrapped, b"a", version), own.version(version)):
        with pytest.raises(KmsUnavailable):
            await call
    server.keys["", "transit/keys/kek"] = again = TransitKey("kek")
    again.rotate()
    again.versions[1] = (again.versions[1][0], again.versions[1][1] + 5)
    for call in (own.unwrap(wrapped, b"a", version), own.version(version)):
        with pytest.raises(KmsUnavailable):
            await call


async def test_vault_destroys_from_the_oldest_on_and_says_so(server: TransitServer, tmp_path: Path) -> None:
    own = kms(server, tmp_path, CONTROL)
    first, second = await own.current(), await own.add_version()
    await own.add_version()
    assert (await own.destroy(second)).state is VersionState.ENABLED
    assert (await own.destroy(first)).state is VersionState.DESTROYED
    assert (await own.destroy(second)).state is VersionState.DESTROYED
    assert [*key_of(server).versions] == [3]


async def test_vault_version_that_is_forbidden_can_be_allowed_again(server: TransitServer, tmp_path: Path) -> None:
    own = kms(server, tmp_path, CONTROL)
    wrapped, version = await own.wrap(b"payload", b"a")
    await own.add_version()
    key_of(server).configure({"min_decryption_version": 2})
    assert (await own.version(version)).state is VersionState.DISABLED
    key_of(server).configure({"min_decryption_version": 1})
    assert await own.unwrap(wrapped, b"a", version) == b"payload"


async def test_vault_namespaces_are_walls(server: TransitServer, tmp_path: Path) -> None:
    uri = vault_uri(server, server.root, tmp_path)
    own, other = provider(uri), provider(f"{uri}&namespace=team")
    await other.add_version()
    wrapped, version = await own.wrap(b"payload", b"")
    assert other.uri == "vault:transit/kek?namespace=team" != own.uri
    with pytest.raises((KmsUnavailable, AuthenticationFailed)):
        await other.unwrap(wrapped, b"", version)


async def test_hsm_that_was_away_is_away_and_works_again(softhsm: SoftHsm) -> None:
    own = provider(softhsm.make_token())
    await own.add_version()
    wrapped, version = await own.wrap(b"payload", b"a")
    other = provider(softhsm.make_token())
    await other.add_version()
    softhsm.away = True
    try:
        for call in (own.wrap(b"", b""), own.unwrap(wrapped, b"a", version), own.version(version), own.current(), own.may_destroy()):
            with pytest.raises(KmsUnavailable):
                await call
    finally:
        softhsm.away = False
    assert await own.unwrap(wrapped, b"a", version) == b"payload"
    assert await other.unwrap(*(await other.wrap(b"other", b""))[:1], b"", await other.current()) == b"other"


async def test_copy_of_a_token_that_is_put_back_after_a_destruction_is_not_destroyed(softhsm: SoftHsm, tmp_path: Path) -> None:
    own: Any = provider(softhsm.make_token())
    await own.add_version()
    wrapped, version = await own.wrap(b"payload", b"a")
    copy = tmp_path / "copy"
    await asyncio.to_thread(shutil.copytree, softhsm.tokens, copy)
    await own.destroy(version)
    assert (await own.version(version)).state is VersionState.DESTROYED
    await asyncio.to_thread(shutil.copytree, copy, softhsm.tokens, dirs_exist_ok=True)
    own._token._thread.submit(own._token._initialise_anew).result()
    assert (await own.version(version)).state is VersionState.PENDING
    with pytest.raises(KmsUnavailable):
        await own.unwrap(wrapped, b"a", version)
    assert (await own.destroy(version)).state is VersionState.DESTROYED


async def test_wrong_pin_is_a_configuration_error_and_not_tried_until_it_is_locked(softhsm: SoftHsm, tmp_path: Path) -> None:
    uri = softhsm.make_token()
    pin = tmp_path / "pin"
    pin.write_text("not the pin")
    wrong: Any = provider(f"{uri.partition('&')[0]}&pin-source={pin}")
    for _ in range(5):
        with pytest.raises(ConfigurationError, match="PinIncorrect"):
            await Watched(wrong).current()
    assert await provider(uri).add_version()


async def test_pkcs11_library_that_is_not_there_is_a_configuration_error(softhsm: SoftHsm) -> None:
    uri = softhsm.make_token().replace("libsofthsm2", "libnothing")
    with pytest.raises(ConfigurationError, match="libnothing"):
        await check_identity(open_kms(uri), "data", production=False)


async def test_one_library_may_be_named_in_two_ways(softhsm: SoftHsm, tmp_path: Path) -> None:
    uri = softhsm.make_token()
    (tmp_path / "link.so").symlink_to(library())
    version = await provider(uri).add_version()
    assert await provider(uri.replace(library(), f"{tmp_path}/link.so")).current() == version


async def test_refused_wraps_do_not_use_up_the_sessions_of_a_token(softhsm: SoftHsm) -> None:
    own: Any = provider(softhsm.make_token())
    await own.add_version()
    wrapped, version = await own.wrap(b"payload", b"a")
    session = own._token._session
    for _ in range(20):
        with pytest.raises(AuthenticationFailed):
            await own.unwrap(wrapped, b"b", version)
    assert own._token._session is session


async def test_every_call_is_counted_by_operation_and_each_failure_too() -> None:
    memory = Memory()
    watched = Watched(MemoryKms(memory), pauses=())

    def counted(name: str, operation: str) -> float:
        return telemetry.registry.get_sample_value(name, {"operation": operation}) or 0.0

    before = {name: counted(name, "unwrap") for name in ("sidecar_kms_seconds_count", "sidecar_kms_errors_total")}
    wrapped, version = await watched.wrap(b"payload", b"")
    await watched.unwrap(wrapped, b"", version)
    memory.away = True
    with pytest.raises(KmsUnavailable):
        await watched.unwrap(wrapped, b"", version)
    after = {name: counted(name, "unwrap") for name in before}
    assert {name: after[name] - before[name] for name in before} == {"sidecar_kms_seconds_count": 2, "sidecar_kms_errors_total": 1}


async def test_wrapper_gives_a_slow_kms_a_bound_and_an_away_one_three_tries() -> None:
    memory = Memory(away=True)
    tries = 0

    class Counted(MemoryKms):
        async def version(self, key_version: str, **scheduled: Any) -> Any:
            nonlocal tries
            tries += 1
            return await super().version(key_version)

        async def may_destroy(self) -> bool:
            await asyncio.Event().wait()
            return True

    watched = Watched(Counted(memory), call_seconds=0.05, pauses=(0.0, 0.0))
    with pytest.raises(KmsUnavailable):
        await watched.version("1")
    assert tries == 3
    with pytest.raises(KmsUnavailable, match="did not answer may_destroy"):
        await watched.may_destroy()
