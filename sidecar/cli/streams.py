"""`sidecar streams`: existing streams."""

from typing import Annotated

import typer

from sidecar.cli.context import Exit, cli, fail
from sidecar.cli.sending import Key, Reason, RequestedBy, Sending, Ticket, Wait, scope_of
from sidecar.postgres.connection import Connection

app = typer.Typer(help="Streams that are there already.", no_args_is_help=True)


@app.command()
def encrypt(
    context: typer.Context,
    stream_class: Annotated[str, typer.Option("--class", help="The class; a policy must encrypt it by now, or nothing is done.")],
    reason: Reason,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's; else a command for each tenant that has such streams.")] = None,
    wait: Wait = None,
    requested_by: RequestedBy = None,
    ticket: Ticket = None,
    key: Key = None,
) -> int:
    """Seal the plain events of a class in place; `sidecar worker` does it. Run VACUUM on `messages` afterwards: until then their old rows are on disk."""
    here = cli(context)

    async def tenants(connection: Connection) -> list[str]:
        rows = await connection.fetch("SELECT DISTINCT tenant_id FROM streams WHERE stream_type_class = $1 ORDER BY 1", stream_class)
        return [row["tenant_id"] for row in rows]

    names = [tenant] if tenant else here.ask("reader", tenants)
    if not names:
        fail(f"there is no stream of class {stream_class}")
    sending = Sending(context=context, reason=reason, wait=wait, requested_by=requested_by, ticket=ticket, key=key)
    return Exit(max(sending.send("reencrypt", scope_of(name, None, stream_class, None), plain=True) for name in names))
