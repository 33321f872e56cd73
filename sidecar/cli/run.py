"""`sidecar run` and `sidecar control`: the two planes, until SIGTERM."""

import asyncio
import socket
import sys
from collections.abc import Coroutine
from typing import Annotated, Any

import typer

from sidecar.cli.context import cli


def add_to(app: typer.Typer) -> None:
    @app.command()
    def run(
        context: typer.Context,
        instance_id: Annotated[
            str, typer.Option(help="Stable over restarts and unique: a killed instance comes back under it at once. The host's name by default.")
        ] = "",
    ) -> None:
        """The data plane: encrypt, store, project. Any number of instances."""
        from sidecar.app import run_data_plane

        _run(run_data_plane(cli(context).settings, instance_id or socket.gethostname()))

    @app.command()
    def control(context: typer.Context) -> None:
        """The control plane: carries out commands and rotates by age. One leads, others stand by."""
        from sidecar.faust_apps import run_control_plane

        _run(run_control_plane(cli(context).settings))

    @app.command()
    def worker(
        context: typer.Context,
        instance_id: Annotated[str, typer.Option(help="How it is named in the audit trail. The host's name by default.")] = "",
    ) -> None:
        """Works off re-encryptions. Any number of them, anywhere; each takes its share."""
        from sidecar.faust_apps import run_worker

        _run(run_worker(cli(context).settings, instance_id or socket.gethostname()))


def _run(main: Coroutine[Any, Any, None]) -> None:
    if sys.platform == "win32":
        asyncio.run(main)
        return
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)
