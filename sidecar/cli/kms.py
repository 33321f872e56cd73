"""`sidecar kms`: where the KMS stands, and whether it keeps what we rely on."""

from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

from sidecar.cli.context import Cli, Exit, cli, fail, run_async, say
from sidecar.core.errors import SidecarError
from sidecar.core.kms import irrecoverability
from sidecar.kms import check_identity, open_for, provider
from sidecar.ports import Kms
from sidecar.postgres import seal_epochs
from sidecar.postgres.connection import open_pool, transaction

app = typer.Typer(help="The KMS.", no_args_is_help=True)


class Role(StrEnum):
    CONTROL = "control"
    DATA = "data"


@app.command()
def status(context: typer.Context) -> None:
    """The provider, what destroying means there, and every seal epoch with its state here and in the KMS."""
    here = cli(context)

    async def main() -> dict[str, Any]:
        kms = open_for(here.settings.kms, "control")
        traits = kms.traits
        return {
            "uri": kms.uri,
            "provider": traits.provider,
            "current": await kms.current(),
            "may_destroy": await kms.may_destroy(),
            "destroys": traits.destroys,
            "delay_days": traits.delay.days,
            "reversible": traits.reversible,
            "outlives": traits.outlives,
            "epochs": await _epochs(here, kms),
        }

    found = run_async(main())
    if here.as_json:
        here.show(found)
        return
    here.show({name: value for name, value in found.items() if name != "epochs"})
    here.show(found["epochs"])


async def _epochs(here: Cli, kms: Kms) -> list[dict[str, Any]]:
    pool = await open_pool(here.settings.postgres.for_role("control"), application_name="sidecar kms")
    try:
        async with transaction(pool) as connection:
            known = await seal_epochs.of_key(connection, kms.uri)
    finally:
        await pool.close()
    return [{"kms_key_version": e.key_version, "state": e.state} | await _in_kms(kms, e.key_version, e.destroy_expected_at) for e in known]


async def _in_kms(kms: Kms, key_version: str, scheduled: datetime | None) -> dict[str, Any]:
    try:
        said = await kms.version(key_version, scheduled=scheduled)
    except SidecarError as error:
        return {"in_kms": "unknown", "irrecoverable_at": None, "reason": str(error)}
    when = irrecoverability(kms.traits, said)
    return {"in_kms": said.state.value, "irrecoverable_at": when.at, "reason": when.reason}


@app.command()
def create(context: typer.Context) -> None:
    """Make the key that kms.uri names, where there is none: on the token, not extractable; in Transit, not exportable."""
    here = cli(context)

    async def main() -> str:
        kms = open_for(here.settings.kms, "control")
        try:
            there = await kms.current()
        except SidecarError:
            return await kms.add_version()
        fail(f"error: {kms.uri} is there already, at version {there}")

    here.show({"kms_key_version": run_async(main())})


@app.command()
def check(context: typer.Context, role: Annotated[Role, typer.Option(help="Whose identity.")] = Role.CONTROL) -> None:
    """What start-up checks: the key is there and cannot leave; the control plane may destroy it, the data plane may not."""
    here = cli(context)
    kms = open_for(here.settings.kms, role.value)
    run_async(check_identity(kms, role.value, production=here.settings.profile == "production"))
    here.show({"uri": kms.uri, "role": role.value, "status": "ok"})


@app.command()
def conformance(
    context: typer.Context,
    uri: Annotated[str, typer.Option(help="The key, with an identity that may destroy: your KMS is tried on scratch keys beside it.")],
    yes_destroy: Annotated[bool, typer.Option("--yes-destroy", help="Make scratch keys and destroy them. Without it only what is harmless.")] = False,
) -> None:
    """Does this KMS keep what the sidecar relies on? Exit 1 if a check fails.

    The key itself is only wrapped and unwrapped with. What adds, disables or destroys versions does it on keys that the suite makes for tenants
    that do not exist, named KEY-<hash>. Some stay there: AWS keeps each for its waiting time and bills it.
    """
    from sidecar.testing import kms_conformance as suite

    here = cli(context)
    kms = provider(uri)
    checks = suite.CHECKS if yes_destroy else suite.HARMLESS
    if not yes_destroy:
        say(f"{len(suite.CHECKS) - len(checks)} of {len(suite.CHECKS)} checks need scratch keys: --yes-destroy makes and destroys them")

    async def main() -> list[dict[str, Any]]:
        out = []
        subject = suite.Subject(kms=kms, open=lambda: provider(uri), disable=suite.DISABLE.get(kms.traits.provider))
        async for result in suite.results(subject, checks):
            out.append(asdict(result))
            say(f"{len(out):>2}/{len(checks)} {result.status.replace('_', ' '):<14} {result.check.replace('_', ' ')}")
        return out

    found = run_async(main())
    here.show(found, ("check", "status", "seconds", "error"))
    failed = sum(result["status"] == "failed" for result in found)
    if failed:
        fail(f"{failed} of {len(found)} checks failed", Exit.FAILED)
