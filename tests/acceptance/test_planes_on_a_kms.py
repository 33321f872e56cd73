"""Both planes on an HSM and on Vault's Transit (our server), each with the identity that docs/kms.md gives it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.kms import VersionState
from sidecar.core.model import Scope, ScopeKind
from sidecar.kms import open_for, provider
from sidecar.testing.softhsm import SoftHsm
from sidecar.testing.transit_server import transit_server_thread
from tests.acceptance.rolls import states
from tests.acceptance.world import World, blocking, until


@dataclass
class OnKms:
    """`settings`: of `kms`. `away(True)`: until `away(False)` the KMS cannot be reached."""

    settings: dict[str, Any]
    away: Callable[[bool], None]


@contextmanager
def hsm(softhsm: SoftHsm, _: Path) -> Iterator[OnKms]:
    uri = softhsm.make_token()
    blocking(provider(uri).add_version)
    yield OnKms({"uri": uri}, lambda away: setattr(softhsm, "away", away))
    softhsm.away = False


@contextmanager
def vault(_: SoftHsm, folder: Path) -> Iterator[OnKms]:
    everyday = {"transit/keys/+": {"read", "update"}, "transit/encrypt/+": {"update"}, "transit/decrypt/+": {"update"}}
    destroys = {f"transit/keys/+/{verb}": {"update"} for verb in ("rotate", "config", "trim")}
    with transit_server_thread() as server:
        uris = {}
        for role, grants in (("uri", everyday), ("uri_control", everyday | destroys)):
            file = folder / f"{role}.token"
            file.write_text(server.grant(grants))
            uris[role] = f"vault:transit/kek?address={server.address}&token-file={file}"
        blocking(provider(uris["uri_control"]).add_version)
        yield OnKms(uris, lambda away: setattr(server, "sealed", away))


@pytest.fixture(params=[hsm, vault], ids=lambda provider: provider.__name__)
def on(request: pytest.FixtureRequest, softhsm: SoftHsm, tmp_path: Path) -> Iterator[OnKms]:
    with request.param(softhsm, tmp_path) as made:
        yield made


def said(world: World, tenant: str) -> list[tuple[str, str]]:
    return [(event["stream_id"], event["status"]) for event in world.events(tenant)]


def test_records_wait_while_the_kms_is_away_and_nothing_reads_as_erased(on: OnKms, make_world: Callable[..., World]) -> None:
    world = make_world(kms=on.settings)
    plane = world.run()
    world.event(world.topic("in"), b"before", stream="aes-1")
    world.settle()
    on.away(True)
    world.event(world.topic("in"), b"a tenant whose key must be made", tenant="globex", stream="aes-1")
    world.flush()
    until(lambda: "KmsUnavailable" in plane.text(), "the data plane to say that the KMS is away")
    listed = world.cli("events", "list", "--tenant", "acme", "-o", "json")
    assert listed.returncode == 1
    assert b"erased" not in listed.stdout
    assert world.value("SELECT count(*) FROM messages WHERE tenant_id = 'globex'") == 0
    on.away(False)
    world.settle()
    assert said(world, "acme") == said(world, "globex") == [("aes-1", "ok")]
    assert world.value("SELECT count(*) FROM dead_letters") == world.value("SELECT count(*) FROM refusals") == 0


def test_roll_destroys_the_version_in_the_kms_and_loses_no_survivor(on: OnKms, make_world: Callable[..., World]) -> None:
    world = make_world(kms=on.settings)
    world.run()
    for tenant in ("acme", "globex"):
        world.event(world.topic("in"), b"payload", tenant=tenant, stream="aes-1")
    world.settle()
    (old,) = states(world)
    world.json("keys", "roll-epoch")
    world.json("keys", "confirm-backup")
    kms = open_for(world.settings.kms, "control")
    assert blocking(lambda: kms.version(old)).state is VersionState.DESTROYED
    shown = {epoch["kms_key_version"]: epoch["in_kms"] for epoch in world.json("kms", "status")["epochs"]}
    assert shown.pop(old) == "destroyed"
    assert set(shown.values()) == {"enabled"}
    assert said(world, "acme") == said(world, "globex") == [("aes-1", "ok")]


def test_shred_of_a_tenant_with_a_key_of_its_own_destroys_that_key_in_the_kms(on: OnKms, make_world: Callable[..., World]) -> None:
    world = make_world(kms=on.settings | {"dedicated": True})
    world.run()
    world.control()
    for tenant in ("acme", "globex"):
        world.event(world.topic("in"), b"payload", tenant=tenant, stream="aes-1")
    world.settle()
    versions = {row["tenant_id"]: row["kms_key_version"] for row in world.sql("SELECT tenant_id, kms_key_version FROM tenant_keys")}
    world.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.TENANT, id=""))
    kms = open_for(world.settings.kms, "control")

    def state(tenant: str) -> VersionState:
        async def ask() -> VersionState:
            return (await (await kms.dedicated(tenant)).version(versions[tenant])).state

        return blocking(ask)

    until(lambda: state("acme") is VersionState.DESTROYED, "the tenant's own key to be destroyed in the KMS")
    assert state("globex") is VersionState.ENABLED
    assert said(world, "globex") == [("aes-1", "ok")]
