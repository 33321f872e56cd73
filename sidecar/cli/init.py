"""`sidecar init DIR`: a configuration that runs as it stands, and development keys."""

from pathlib import Path
from typing import Annotated

import typer

from sidecar.cli.context import Exit, fail, say
from sidecar.kms.file import create_key_file
from sidecar.signing import create_signing_key

_TEMPLATE = """\
# Precedence: flags, then environment (SIDECAR_KAFKA__BOOTSTRAP_SERVERS, ..._FILE for a secret's file), then this file, then defaults.
deployment: demo                      # audience of commands; prefix of groups and transactional ids
profile: development                  # production refuses every development default by name
kafka:
  bootstrap_servers: {bootstrap_servers}
  security: {{protocol: PLAINTEXT}}     # SASL_SSL, mechanism, username, password_file, ca_file
  client: {{}}                          # passed to librdkafka as it is
postgres:
  dsn: {dsn}   # one per role in production: dsn_data, dsn_control, dsn_worker, dsn_reader, dsn_migrator
kms:
  uri: file:./keys/kek                # development only: losing this file loses the data, a copy of it opens them
sources:
  - topic: users                      # or a glob
    format: cloudevents               # or json, with extractors like json:/tenant, key, const:acme
    tenant: header:ce_tenantid
    stream: header:ce_streamid
    type: header:ce_type
    id: header:ce_id
    start: earliest                   # earliest | latest, for a group without a position
    tenants: ["*"]                    # or the only ones that this topic may speak for
    purge: off                        # off | after_projection: delete what is stored and projected from the source topic
classes:                              # first match names the stream's class, at its first event, for good
  - {{class: AuditLog, when: {{type: "Audit*"}}}}
  - {{class: CartData, when: {{stream: "cart-*"}}}}
  - {{class: UserPersonalData, when: {{topic: users}}}}
policies:                             # installed once; afterwards `sidecar policy apply`
  unmatched: encrypt                  # encrypt | plain | refuse
views:
  - name: users-decrypted
    topic: users.decrypted
    partitions: 6
    match: {{topics: [users], classes: ["*"], tenants: ["*"]}}
    key: event                        # event | stream | source
    retention: 7d
    erase_within: 1h                  # by then tombstones have taken effect
control:
  topic: sidecar.control
  receipts: sidecar.receipts
  issuer_key: ./keys/issuer           # what `sidecar shred` and the like sign with; yours alone in production
  issuers:                            # whose signed commands are carried out; `sidecar issuer keygen` makes keys
    - {{name: developer, public_key_file: ./keys/issuer.pub, ops: ["*"], tenants: ["*"]}}
  signing_key: ./keys/control-signing # the control plane's own: it signs ledger and certificates
dead_letters: {{topic: sidecar.dead-letters}}
batch: {{max_records: 2000, max_bytes: 16MiB, max_wait_ms: 50}}
limits: {{max_record_bytes: 1MiB, max_headers: 256, key_cache_entries: 10000, stream_heads: 10000}}
http: {{host: 127.0.0.1, port: 8080}}   # /livez /readyz /metrics; 0 takes a free port
"""


def write_configuration(directory: Path, *, bootstrap_servers: str, dsn: str) -> Path:
    """Write DIR/sidecar.yaml and keys in DIR/keys. Raises FileExistsError rather than overwrite."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "sidecar.yaml"
    if file.exists():
        raise FileExistsError(str(file))
    create_key_file(directory / "keys" / "kek")
    for name in ("issuer", "control-signing"):
        create_signing_key(directory / "keys" / name)
    file.write_text(_TEMPLATE.format(bootstrap_servers=bootstrap_servers, dsn=dsn))
    return file


def init(
    directory: Annotated[Path, typer.Argument(help="Where to write sidecar.yaml and keys/.")],
    bootstrap_servers: Annotated[str, typer.Option(help="Kafka.")] = "127.0.0.1:9092",
    dsn: Annotated[str, typer.Option(help="Postgres.")] = "postgresql:///sidecar",
) -> None:
    """Write a configuration that runs as it stands, and development keys."""
    try:
        file = write_configuration(directory, bootstrap_servers=bootstrap_servers, dsn=dsn)
    except FileExistsError as error:
        fail(f"error: {error.args[-1]} is there already; nothing was changed\n  mend:  name another folder, or remove it", Exit.USAGE)
    say(f"wrote {file} and development keys beside it\nnext:  sidecar --config {file} run")


def add_to(app: typer.Typer) -> None:
    app.command()(init)
