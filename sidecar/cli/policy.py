"""`sidecar policy`: what is encrypted, how, and why."""

import getpass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
import yaml
from pydantic import TypeAdapter, ValidationError

from sidecar import policies
from sidecar.cli.context import Exit, cli, fail, run_async
from sidecar.core.detection import DEFAULT_TAGS, WHOLE, sensitive_fields
from sidecar.core.errors import ConfigurationError, MalformedRecord
from sidecar.core.extract import Extractor, subject_of
from sidecar.core.policy import Classifier, Encrypt, PolicySet, Refuse
from sidecar.postgres.connection import Connection, connected
from sidecar.postgres.errors import mapped
from sidecar.postgres.keystore import load_policies
from sidecar.settings import PolicySpec, Settings

app = typer.Typer(help="Encryption policies.", no_args_is_help=True)
_COLUMNS = (
    "policy_id",
    "tenant_id",
    "stream_type_class",
    "encryption_required",
    "encryption_algorithm",
    "key_scope",
    "subject",
    "fields",
    "blind_index",
    "key_rotation_interval_days",
    "version",
)


@app.command("list")
def list_(context: typer.Context) -> None:
    """All policies; tenant * is for every tenant without one of its own."""
    here = cli(context)
    here.show(here.ask("control", policies.list_policies), _COLUMNS)


@app.command()
def get(context: typer.Context, policy_id: str) -> None:
    """One policy."""
    here = cli(context)
    found = next((row for row in here.ask("control", policies.list_policies) if row["policy_id"] == policy_id), None)
    if found is None:
        fail(f"error: there is no policy {policy_id}")
    here.show(found)


@app.command()
def apply(context: typer.Context, file: Annotated[Path, typer.Argument(help="YAML: a list of policies.")]) -> None:
    """Make policies as a file says: {class, tenant, encrypt, algorithm, key_scope, subject, rotation_days, fields, blind_index} each. Live within a second."""
    here = cli(context)
    try:
        specs = TypeAdapter(list[PolicySpec]).validate_python(yaml.safe_load(file.read_text()))
    except OSError as error:
        raise ConfigurationError(f"the file cannot be read: {error.strerror}", where=str(file), mend="name a YAML file") from None
    except (yaml.YAMLError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"msg": "no YAML", "loc": ()}
        where = f"{file}: {'.'.join(str(part) for part in first['loc'])}"
        raise ConfigurationError(
            str(first["msg"]),
            where=where,
            mend="a list of {class, tenant, encrypt, algorithm, key_scope, subject, rotation_days, fields, blind_index}",
        ) from None

    async def change(connection: Connection) -> list[dict[str, Any]]:
        changed = await policies.apply(connection, specs, actor=getpass.getuser(), now=datetime.now(UTC))
        names = {policy.policy_id for policy in changed}
        return [row for row in await policies.list_policies(connection) if row["policy_id"] in names]

    here.show(here.ask("control", change), _COLUMNS)


@app.command()
def explain(
    context: typer.Context,
    event: Annotated[Path, typer.Argument(help='JSON: {"topic", "headers": {name: text}, "key", "value"}.')],
) -> None:
    """Why is this event encrypted, or not, and with which key scope?"""
    here = cli(context)
    try:
        document = orjson.loads(event.read_bytes())
        headers = {str(name): str(value).encode() for name, value in document.get("headers", {}).items()}
        value = document.get("value")
        raw = value.encode() if isinstance(value, str) else orjson.dumps(value)
        topic = str(document["topic"])
    except (OSError, ValueError, KeyError, AttributeError):
        fail(f'error: {event} is no event\n  mend:  {{"topic": "users", "headers": {{"ce_tenantid": "acme", ...}}, "value": {{...}}}}', Exit.USAGE)
    here.show(run_async(_explain(here.settings, topic, headers, document.get("key"), raw)))


@app.command()
def detect(
    context: typer.Context,
    schema: Annotated[Path, typer.Argument(help="JSON Schema or Avro, as JSON or YAML.")],
    stream_class: Annotated[str, typer.Option("--class", help="The class that the policy is for.")],
    tag: Annotated[list[str] | None, typer.Option(help="A tag that means sensitive; may stand several times. PII and SENSITIVE by default.")] = None,
) -> None:
    """Fields that a schema marks as sensitive (x-sensitive, x-pii, confluent:tags, tags), as a policy for `policy apply`. Changes nothing."""
    here = cli(context)
    try:
        document = yaml.safe_load(schema.read_text().replace("\t", " "))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError("the schema cannot be read", where=f"{schema}: {type(error).__name__}", mend="name a JSON or YAML file") from None
    fields = list(sensitive_fields(document, tag or DEFAULT_TAGS))
    if not fields:
        fail(f"no field of {schema} is marked; a policy without `fields` encrypts the whole event")
    policy = {"class": stream_class} | ({} if WHOLE in fields else {"fields": fields})
    if here.output == "json":  # a pipe alone asks for no JSON: what is written into a file here is for `policy apply`
        here.show({"fields": fields, "policy": policy})
    else:
        typer.echo(yaml.safe_dump([policy], sort_keys=False), nl=False)


async def _explain(settings: Settings, topic: str, headers: dict[str, bytes], key: Any, value: bytes) -> dict[str, Any]:
    from fnmatch import fnmatchcase

    source = next((s for s in settings.sources if fnmatchcase(topic, s.topic)), None)
    if source is None:
        return {"topic": topic, "outcome": "not read", "because": "no source names this topic"}
    extractor = Extractor(tenant=source.tenant, stream=source.stream, type=source.type, id=source.id, tenants=source.tenants)
    try:
        who = extractor.identify(topic, 0, 0, str(key).encode() if key is not None else None, value, headers)
    except MalformedRecord as error:
        return {"topic": topic, "outcome": "dead letter", "because": f"{error.reason}: {error}"}
    rule = Classifier([c.rule() for c in settings.classes]).match(topic=topic, type=who.type, stream=who.stream, headers=headers)
    async with connected(settings.postgres.for_role("control")) as connection:
        known = await _known_stream(connection, who.tenant, who.stream)
        loaded = await load_policies(connection, settings.policies.unmatched)
    stream_class = known["stream_type_class"] if known else rule.stream_class if rule else "unclassified"
    because = ["the stream has this class since its first event" if known else f"class rule {rule}" if rule else "no class rule matches"]
    out = {"tenant": who.tenant, "stream": who.stream, "type": who.type, "class": stream_class}
    out |= _outcome(loaded, who.tenant, stream_class, known, because)
    decision = loaded.decide(who.tenant, stream_class)
    if isinstance(decision, Encrypt) and decision.subject is not None:
        try:
            out["subject"] = subject_of(decision.subject, topic, str(key).encode() if key is not None else None, value, headers)
        except MalformedRecord as error:
            out |= {"outcome": "dead letter", "because": [*because, f"{error.reason}: {decision.subject} names no person: {error}"]}
    if isinstance(decision, Encrypt) and decision.fields is not None:
        try:
            out["sealed"] = [place.path for place in decision.fields.find(value).places]
        except MalformedRecord as error:
            out |= {"outcome": "dead letter", "because": [*because, f"{error.reason}: {error}"]}
    return out


async def _known_stream(connection: Connection, tenant: str, stream: str) -> Any:
    with mapped():
        return await connection.fetchrow("SELECT * FROM streams WHERE tenant_id = $1 AND stream_id = $2", tenant, stream)


def _outcome(loaded: PolicySet, tenant: str, stream_class: str, known: Any, because: list[str]) -> dict[str, Any]:
    policy, decision = loaded.find(tenant, stream_class), loaded.decide(tenant, stream_class)
    because.append(f"policy {policy.policy_id} (tenant {policy.tenant})" if policy else f"no policy: policies.unmatched is {loaded.unmatched}")
    out: dict[str, Any] = {"outcome": "plain", "algorithm": None, "key_scope": None}
    if isinstance(decision, Encrypt):
        out = {"outcome": "encrypted", "algorithm": decision.suite.label, "key_scope": decision.key_scope.value}
        if decision.fields is not None:
            out["fields"] = list(decision.fields.pointers)
    elif known and known["is_encrypted"]:
        out = {"outcome": "encrypted", "algorithm": known["encryption_algorithm"], "key_scope": "stream"}
        because.append("the stream was encrypted before, and stays so")
    elif isinstance(decision, Refuse):
        out["outcome"] = "refused"
    return out | {"because": because}
