"""A web service that forgets a user.

    SIDECAR_CONFIG=app/sidecar.yaml uvicorn --factory examples.forget_a_user:create_app          (pip install fastapi uvicorn)

The service seals and opens; it has no right to destroy a key. To forget somebody it sends a command, signed with `control.issuer_key`, to
`sidecar control`, and answers when the receipt is there. Who may call DELETE may shred: put your own authentication before it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from sidecar import (
    AccessDenied,
    CommandRejected,
    Conflict,
    Event,
    Library,
    NewEvent,
    PolicySpec,
    RecordRefused,
    Settings,
    StreamErased,
    Unavailable,
    load,
    open_library,
)

TENANT = "acme"
PERSON = PolicySpec(stream_class="Person", key_scope="subject")
"""One key per person, whichever streams the person's events are in."""
ANSWERS = {
    StreamErased: (410, "this user was forgotten"),
    RecordRefused: (410, "this user was forgotten: nothing more is stored"),
    AccessDenied: (403, "a legal hold, or this service's rights, stand in the way"),
    CommandRejected: (409, "the control plane refused; the receipt says why"),
    Unavailable: (503, "not now; whether it was carried out is not known, and asking again does no harm"),
}


def create_app(settings: Settings | None = None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_library(settings or load()) as library:
            with suppress(Conflict):  # it is there already
                await library.policies.create_policy(PERSON, actor="user service", reason="a person can be forgotten alone")
            app.state.library = library
            yield

    app = FastAPI(lifespan=lifespan)

    def library() -> Library:
        opened: Library = app.state.library
        return opened

    @app.put("/users/{user}")
    async def change(user: str, details: dict[str, Any]) -> dict[str, int]:
        changed = NewEvent(type="UserChanged", data=details, subject=user)
        return {"version": (await library().store.append_to_stream(f"user-{user}", [changed], tenant=TENANT, stream_class="Person")).last}

    @app.get("/users/{user}")
    async def show(user: str) -> dict[str, Any]:
        def merge(state: dict[str, Any], event: Event) -> dict[str, Any]:
            return {**state, **event.data}

        nothing: dict[str, Any] = {}
        found = await library().store.aggregate_stream(f"user-{user}", merge, nothing, tenant=TENANT)
        if not found.version:
            raise HTTPException(404, "there is no such user")
        return found.state

    @app.delete("/users/{user}")
    async def forget(user: str, reason: str) -> dict[str, Any]:
        receipt = await library().shredding.forget_subject_data(user, TENANT, reason=reason)
        return {name: receipt[name] for name in ("command_id", "inaccessible_at", "events", "residue")}

    for error in ANSWERS:
        app.add_exception_handler(error, _answer)
    return app


async def _answer(_: Request, error: Exception) -> JSONResponse:
    status, detail = next(answer for kind, answer in ANSWERS.items() if isinstance(error, kind))
    return JSONResponse({"detail": detail}, status)
