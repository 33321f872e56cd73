"""A command from an application: composed, signed with its issuer key, published; the answer is the final receipt."""

import asyncio
import getpass
import socket
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Final
from uuid import UUID, uuid4

from sidecar.core import dsse
from sidecar.core.command import NOT_ALLOWED, PAYLOAD_TYPE, compose, final_statuses
from sidecar.core.errors import AccessDenied, BrokerUnavailable, CommandRejected
from sidecar.core.model import Scope
from sidecar.kafka.receipts import publish_command
from sidecar.ports import Clock
from sidecar.postgres import commands
from sidecar.postgres.connection import connected
from sidecar.settings import Settings
from sidecar.signing import load_signer

Receipt = dict[str, Any]
"""As in schemas/messages/receipt.v1.json."""
Send = Callable[[str, Scope, str, dict[str, Any]], Awaitable[Receipt]]
"""(op, scope, reason, options) → the final receipt. Signs with the application's issuer key; raises Unavailable."""

VALID_FOR: Final = timedelta(days=1)
WAIT_SECONDS: Final = 30.0


class Sender:
    """`control.issuer_key` signs, where there is one; receipts are read from the database, as a reader."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings, self._clock = settings, clock

    async def __call__(self, op: str, scope: Scope, reason: str, options: dict[str, Any]) -> dict[str, Any]:
        """The final receipt, whatever it says. Raises BrokerUnavailable if none came in time: the command may still be carried out."""
        now, command_id = self._clock.now(), uuid4()
        payload = compose(
            command_id=command_id, audience=self._settings.deployment, op=op, scope=scope, reason=reason, requested_by=_who(), ticket=None,
            issued_at=now, not_after=now + VALID_FOR, options=options,
        )  # fmt: skip
        key = self._settings.control.issuer_key
        value = dsse.sign(PAYLOAD_TYPE, payload, [load_signer(key)]).to_bytes() if key else payload
        found = await publish_and_wait(self._settings, scope.tenant, command_id, value, final_statuses(op), WAIT_SECONDS)
        if found is None or found["status"] not in final_statuses(op):
            raise BrokerUnavailable(f"no final receipt of command {command_id} within {WAIT_SECONDS:g} s; is `sidecar control` running?")
        return found


async def shred(send: Send | None, scope: Scope, reason: str) -> Receipt:
    """The receipt of a shred that was carried out. Raises AccessDenied, CommandRejected for one that was not, Unavailable where that is not known."""
    if send is None:
        raise AccessDenied("this process cannot send commands to the control plane; give the library a configuration with Kafka and an issuer key")
    receipt = await send("shred", scope, reason, {})
    if receipt["status"] in ("rejected", "failed"):
        error = receipt["error"] or {}
        if error.get("code") in NOT_ALLOWED:
            raise AccessDenied(f"{error.get('message')} ({error.get('code')})")
        raise CommandRejected(error.get("code", "failed"), error.get("message", "the control plane could not carry it out"))
    return receipt


async def publish_and_wait(
    settings: Settings, tenant: str, command_id: UUID, value: bytes, final: tuple[str, ...], wait: float
) -> dict[str, Any] | None:  # fmt: skip
    """The newest receipt, final or what there is when the time is up. Whether receipts can be read shows before anything is sent."""
    async with connected(settings.postgres.for_role("reader"), application_name="sidecar commands") as connection:
        earlier = await commands.refusals(connection, command_id)
        await asyncio.to_thread(publish_command, settings, tenant, value)
        deadline = time.monotonic() + wait
        while True:
            found = await commands.receipt(connection, command_id)
            if found is not None and found["receipt_id"] in earlier:
                found = None  # of a record with fewer signatures
            if (found is not None and found["status"] in final) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.02)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
