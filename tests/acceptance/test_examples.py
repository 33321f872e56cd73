"""Promise: the examples run as they stand in examples/, on a real broker, database and control plane, and do what their first lines say."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from examples import cart_and_generator, consumer, forget_a_user, read_model
from sidecar import Library, NewEvent, load, open_library
from sidecar.core.model import Scope
from sidecar.sending import Sender
from sidecar.steps import SystemClock
from sidecar.testing import control_plane as kit


@pytest.fixture
async def library(application: Path) -> AsyncIterator[Library]:
    async with open_library(load(application)) as opened:
        yield opened


@pytest.fixture
def control(application: Path, library: Library) -> Iterator[None]:
    with kit.control(application):
        yield


async def test_carts_are_stored_in_clear_and_letters_sealed_by_modules_that_know_of_neither(
    application: Path, library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    await cart_and_generator.main(application)
    said = capsys.readouterr().out
    assert "{'book': 2}\nDear Jane Doe,\nyour books" in said
    assert "in the database: ks1." in said
    rows = await library.plain.pool.fetch("SELECT stream_id, data, data_encrypted FROM messages ORDER BY stream_id")
    assert [(row["stream_id"], row["data"] is None) for row in rows] == [("cart-1", False), ("letter-1", True)]
    assert b"Jane" not in rows[1]["data_encrypted"]


async def test_control_a_generator_with_the_plain_store_shows_names(library: Library) -> None:
    """The same look at the table sees it."""
    await cart_and_generator.Generator(library.plain).create("1", "Jane Doe", "…", tenant="acme")
    assert b"Jane" in await library.plain.pool.fetchval("SELECT data FROM messages")


@pytest.mark.usefixtures("control")
async def test_a_request_forgets_a_user_and_nobody_else(application: Path) -> None:
    app = forget_a_user.create_app(load(application))
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://users") as web:
        for user in ("c-17", "c-18"):
            assert (await web.put(f"/users/{user}", json={"email": f"{user}@example.org"})).json() == {"version": 1}
        assert (await web.put("/users/c-17", json={"city": "Oslo"})).json() == {"version": 2}
        assert (await web.get("/users/c-17")).json() == {"email": "c-17@example.org", "city": "Oslo"}
        assert (await web.get("/users/c-99")).status_code == 404
        forgotten = await web.delete("/users/c-17", params={"reason": "Art. 17 request"}, timeout=60)
        assert (forgotten.status_code, forgotten.json()["events"]["unreadable"]) == (200, 2)
        assert forgotten.json()["inaccessible_at"]
        assert (await web.get("/users/c-17")).status_code == 410
        assert (await web.put("/users/c-17", json={"city": "Oslo"})).status_code == 410
        again = await web.delete("/users/c-17", params={"reason": "Art. 17 request"}, timeout=60)  # as after a 503
        assert (again.status_code, again.json()["inaccessible_at"] is not None) == (200, True)
        assert (await web.get("/users/c-18")).json() == {"email": "c-18@example.org"}


@pytest.mark.usefixtures("control")
async def test_a_request_against_a_legal_hold_is_answered_with_no_and_the_user_is_still_there(application: Path) -> None:
    settings = load(application)
    app = forget_a_user.create_app(settings)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://users") as web:
        await web.put("/users/c-17", json={"city": "Oslo"})
        await Sender(settings, SystemClock())("hold", Scope.of_tenant("acme"), "case 7", {})
        refused = await web.delete("/users/c-17", params={"reason": "Art. 17 request"}, timeout=60)
        assert refused.status_code == 403
        assert "case 7" not in refused.text
        assert (await web.get("/users/c-17")).json() == {"city": "Oslo"}


@pytest.mark.usefixtures("control")
async def test_a_read_model_that_is_rebuilt_has_no_name_and_the_same_totals(
    application: Path, library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    await read_model.main(application)
    before, after = capsys.readouterr().out.split("John Roe: 19.99\n")[:2]
    assert before == "Jane Doe: 50.00\n"
    assert after == "(forgotten): 50.00\n"
    sales = await read_model.caught_up(library.store, 6, tenant="acme")
    assert (sum(sales.cents.values()), sales.names, sales.erased) == (6999, {"18": "John Roe"}, 2)


@pytest.mark.usefixtures("control")
async def test_a_consumer_mails_each_customer_once_and_nobody_who_was_forgotten(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    for customer in ("17", "18", "19"):
        await read_model.register(library.store, customer, f"customer {customer}", tenant="acme")
    await library.shredding.forget_stream_data("customer-18", "acme", reason="Art. 17 request")
    mailed: list[str] = []

    async def until(count: int) -> None:
        stop = asyncio.Event()

        async def send(name: str) -> None:
            mailed.append(name)
            if len(mailed) == count:
                stop.set()

        async with asyncio.timeout(120):
            await consumer.welcome(library, send, stop)

    await until(2)
    assert mailed == ["customer 17", "customer 19"]
    assert "position 1 of a stream was erased" in capsys.readouterr().out
    await library.store.append_to_stream(
        "customer-20", [NewEvent(type="CustomerRegistered", data={"name": "customer 20"})], tenant="acme", stream_class="UserPersonalData"
    )
    await until(3)  # started again it goes on where it was
    assert mailed == ["customer 17", "customer 19", "customer 20"]
