"""The HTTP port of a plane: /livez, /readyz and /metrics. Apart from `telemetry`, since a command line should not wait for a web server to load."""

import sys
from collections.abc import Callable

from aiohttp import web
from prometheus_client import generate_latest

from sidecar import telemetry
from sidecar.core.errors import ConfigurationError
from sidecar.settings import HttpSettings


async def serve(http: HttpSettings, *, ready: Callable[[], tuple[bool, str]]) -> web.AppRunner:
    """Serve /livez, /readyz and /metrics; `url(runner)` says where. Raises ConfigurationError when the address is taken.

    /livez answers while the event loop turns; /readyz is 200 or 503 with the reason as text.
    """

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        serves, why = ready()
        return web.Response(text=f"{why}\n", status=200 if serves else 503)

    async def metrics(_: web.Request) -> web.Response:
        telemetry.ready_gauge.set(ready()[0])
        return web.Response(body=generate_latest(telemetry.registry), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application()
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, http.host, http.port, shutdown_timeout=1).start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigurationError(
            f"the HTTP address cannot be used: {error.strerror}",
            where=f"http: {http.host}:{http.port}",
            mend="free it, or set http.port (0 takes a free one)",
        ) from None
    return runner


def url(runner: web.AppRunner) -> str:
    """Where it listens, with the port that was given when the settings say 0."""
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def say_ready(runner: web.AppRunner | None) -> None:
    """The one line that tells a person or a script that the process serves."""
    sys.stderr.write(f"ready {url(runner)}\n" if runner else "ready\n")
    sys.stderr.flush()
