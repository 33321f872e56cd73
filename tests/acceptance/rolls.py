"""The roller in the test's own process, and what a database from before it still opens."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from sidecar.kms import open_for
from sidecar.ports import Kms
from sidecar.postgres.connection import open_pool
from sidecar.sealing import Sealing
from sidecar.steps import SystemClock
from tests.acceptance.world import World, blocking

T = TypeVar("T")


def sealing(world: World, act: Callable[[Sealing], Awaitable[T]], *, kms: Kms | None = None, **settings: Any) -> T:
    """`act(sealing)`; `settings` replace some of kms.*"""

    async def main() -> T:
        pool = await open_pool(world.dsn, application_name="a roller", max_size=8)
        try:
            return await act(
                Sealing(pool, SystemClock(), kms or open_for(world.settings.kms, "control"), world.settings.kms.model_copy(update=settings))
            )
        finally:
            await pool.close()

    return blocking(main)


def roll(world: World, **more: Any) -> None:
    assert sealing(world, lambda s: s.roll("a test"), **more)


def confirm_and_destroy(world: World, **more: Any) -> None:
    async def act(roller: Sealing) -> None:
        await roller.confirm_backup(None, "a test")
        await roller.follow_up()

    sealing(world, act, **more)


def states(world: World) -> dict[str, str]:
    """version → state, oldest first."""
    return {row["kms_key_version"]: row["state"] for row in world.sql("SELECT * FROM seal_epochs ORDER BY created_at")}


def wrapped_by(world: World) -> dict[str, str]:
    """tenant → version of the KMS key under which its KEK is."""
    rows = world.sql("SELECT tenant_id, kms_key_version FROM tenant_keys WHERE wrapped IS NOT NULL ORDER BY kek_version")
    return {row["tenant_id"]: row["kms_key_version"] for row in rows}


def statuses(world: World, tenant: str, **of: Any) -> list[str]:
    return [event["status"] for event in world.events(tenant, **of)]
