"""A command from an application: composed, signed with its issuer key, published; the answer is the final receipt."""

import asyncio
import getpass
import socket
import time
from datetime import timedelta
from typing import Any, Final
from uuid import uuid4

from sidecar.core import dsse
from sidecar.core.command import PAYLOAD_TYPE, compose
from sidecar.core.errors import BrokerUnavailable
from sidecar.core.model import Scope
from sidecar.kafka.receipts import publish_command
from sidecar.ports import Clock
from sidecar.postgres import commands
from sidecar.postgres.connection import Pool
from sidecar.settings import Settings
from sidecar.signing import load_signer

VALID_FOR: Final = timedelta(days=1)
WAIT_SECONDS: Final = 30.0
FINAL: Final = {"shred": ("inaccessible", "complete", "done", "rejected", "failed")}
FINAL_OF_OTHERS: Final = ("done", "rejected", "failed")


class Sender:
    """`control.issuer_key` signs, where there is one; receipts are read from the database."""

    def __init__(self, settings: Settings, pool: Pool, clock: Clock) -> None:
        self._settings, self._pool, self._clock = settings, pool, clock

    async def __call__(self, op: str, scope: Scope, reason: str, options: dict[str, Any]) -> dict[str, Any]:
        """The final receipt, whatever it says. Raises BrokerUnavailable if none came in time: the command may still be carried out."""
        now, command_id = self._clock.now(), uuid4()
        payload = compose(
            command_id=command_id, audience=self._settings.deployment, op=op, scope=scope, reason=reason, requested_by=_who(), ticket=None,
            issued_at=now, not_after=now + VALID_FOR, options=options,
        )  # fmt: skip
        key = self._settings.control.issuer_key
        value = dsse.sign(PAYLOAD_TYPE, payload, [load_signer(key)]).to_bytes() if key else payload
        await asyncio.to_thread(publish_command, self._settings, scope.tenant, value)
        final, deadline = FINAL.get(op, FINAL_OF_OTHERS), time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            async with self._pool.acquire() as connection:
                found = await commands.receipt(connection, command_id)  # type: ignore[arg-type]
            if found is not None and found["status"] in final:
                return found
            await asyncio.sleep(0.02)
        raise BrokerUnavailable(f"no final receipt of command {command_id} within {WAIT_SECONDS:g} s; is `sidecar control` running?")


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
