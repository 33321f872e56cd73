"""Configuration: flags, then environment (SIDECAR_KAFKA__BOOTSTRAP_SERVERS, …_FILE for a secret's file), then sidecar.yaml, then defaults.

Every limit has its unit in its name or is written with one (16MiB).
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from sidecar.core.aead import Suite
from sidecar.core.command import Command, Op, grace_seconds
from sidecar.core.dsse import MAX_SIGNATURES
from sidecar.core.errors import ConfigurationError, MalformedRecord, UnsupportedEnvelope
from sidecar.core.fields import Fields
from sidecar.core.keys import HARD_LIMIT_USES, SOFT_LIMIT_USES, USES_BLOCK, UseLimits
from sidecar.core.kms import KmsUri
from sidecar.core.model import ScopeKind, duration_ms, tenant_id
from sidecar.core.policy import SUBJECT_HEADER, ClassRule, Policy
from sidecar.servers import KafkaSettings, KmsSettings, PostgresSettings, read_secret

ENV_PREFIX = "SIDECAR_"
CONFIG_ENV = "SIDECAR_CONFIG"
# Variables under the prefix that are not settings: where the file is, the command line's key, and the test set-up's own.
_NOT_SETTINGS = ("CONFIG", "CAMPAIGN", "TEST_", "DEV_", "ISSUER_KEY")
_DEVELOPMENT_SIGNING_KEY = Path("keys/control-signing")


class _Section(BaseModel):
    """A misspelt name is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _off(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


def _an_extractor(value: str, kinds: tuple[str, ...]) -> str:
    names = {"header:": "header:NAME", "json:/": "json:/pointer", "const:": "const:VALUE", "topic:": "topic:REGEX"}
    if value != "key" and not value.startswith(kinds):
        raise ValueError(f"{value!r} is no extractor; use {', '.join(names[kind] for kind in kinds)} or key")
    return value


class SourceSettings(_Section):
    """A topic to read, and the extractors (core/extract.py) that find tenant, stream, type and id in a record."""

    topic: str
    """A name, or a glob over names."""
    format: Literal["cloudevents", "json"] = "cloudevents"
    tenant: str = "header:ce_tenantid"
    stream: str = "header:ce_streamid"
    type: str = "header:ce_type"
    id: str | None = "header:ce_id"
    """Without one the id is topic/partition/offset."""
    start: Literal["earliest", "latest"] = "earliest"
    on_lost_offsets: Literal["stop", "store", "replay"] = "stop"
    """Events of this source are stored, but its group has no committed offset (it expired, or was deleted), so what was
    projected is not known. stop: refuse the partition; store: go on from the store's cursor; replay: project all again."""
    tenants: list[str] = ["*"]
    purge: Annotated[Literal["off", "after_projection"], BeforeValidator(_off)] = "off"

    @field_validator("tenant", "stream", "type", "id")
    @classmethod
    def _extractor(cls, value: str | None) -> str | None:
        return value if value is None else _an_extractor(value, ("header:", "json:/", "const:", "topic:"))


class ClassWhen(_Section):
    """Globs, of which all that are given must match; `headers` maps a name to one."""

    topic: str | None = None
    type: str | None = None
    stream: str | None = None
    headers: dict[str, str] = {}


class ClassSettings(_Section):
    """The first class whose `when` matches is the stream's, for good from its first event."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    stream_class: str = Field(alias="class")
    when: ClassWhen

    def rule(self) -> ClassRule:
        when = self.when
        return ClassRule(stream_class=self.stream_class, topic=when.topic, type=when.type, stream=when.stream, headers=tuple(when.headers.items()))


class PolicySpec(_Section):
    """A policy as written in YAML and given to `sidecar policy apply`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    stream_class: str = Field(alias="class", min_length=1, max_length=255)
    tenant: str = "*"
    encrypt: bool = True
    algorithm: str = Suite.AES_256_GCM.label
    key_scope: Literal["stream", "class", "tenant", "subject"] = "stream"
    subject: str | None = None
    """With key_scope subject: what names a record's person; header:ce_subjectid unless given. A record without one is a dead letter."""
    rotation_days: int | None = Field(default=None, ge=1)
    fields: tuple[str, ...] = ()
    """JSON pointers, `*` for every name or index: only these fields are encrypted, the rest of the document stays clear JSON. Without, all is."""

    blind_index: tuple[str, ...] = ()
    """Of the fields, those whose values can be searched for: equality becomes visible within a tenant (docs/fields.md)."""

    @field_validator("tenant")
    @classmethod
    def _a_tenant(cls, value: str) -> str:
        try:
            return value if value == "*" else tenant_id(value)
        except MalformedRecord as error:
            raise ValueError(f"{error}; or * for all, no other pattern") from None

    @field_validator("algorithm")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return Suite.from_label(value).label
        except UnsupportedEnvelope as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _subject_has_its_scope(self) -> Self:
        if self.key_scope != "subject" and self.subject is not None:
            raise ValueError("subject: goes with key_scope: subject alone")
        if self.subject is not None:
            _an_extractor(self.subject, ("header:", "json:/"))
        return self

    @model_validator(mode="after")
    def _fields_are_encrypted(self) -> Self:
        Fields(self.fields, self.blind_index)
        if self.fields and not self.encrypt:
            raise ValueError("fields: go with encrypt: true alone")
        return self

    @property
    def subject_extractor(self) -> str | None:
        return (self.subject or SUBJECT_HEADER) if self.key_scope == "subject" else None

    def policy(self, policy_id: str, version: int = 1) -> Policy:
        return Policy(
            policy_id=policy_id,
            stream_class=self.stream_class,
            tenant=self.tenant,
            encrypt=self.encrypt,
            suite=Suite.from_label(self.algorithm),
            key_scope=ScopeKind(self.key_scope),
            subject=self.subject_extractor,
            rotation_days=self.rotation_days,
            fields=self.fields,
            blind_index=self.blind_index,
            version=version,
        )


class PoliciesSettings(_Section):
    """What becomes of events that no policy is about, and policies to begin with."""

    unmatched: Literal["encrypt", "plain", "refuse"] = "encrypt"
    install: list[PolicySpec] = []
    """Installed once, where no policy of that tenant and class exists yet; afterwards `sidecar policy apply`."""


class ViewMatch(_Section):
    """Globs: an event is in the view if each of them matches."""

    topics: list[str] = ["*"]
    classes: list[str] = ["*"]
    tenants: list[str] = ["*"]


class ViewSettings(_Section):
    """A topic with decrypted events. `key` is the record key: a tombstone erases by it; `retention` and `erase_within` are durations (7d, 1h)."""

    name: str
    topic: str
    partitions: int = Field(default=6, ge=1)
    match: ViewMatch = ViewMatch()
    key: Literal["event", "stream", "source"] = "event"
    retention: str = "7d"
    erase_within: str = "1h"

    @field_validator("retention", "erase_within")
    @classmethod
    def _duration(cls, value: str) -> str:
        duration_ms(value)
        return value


class IssuerSettings(_Section):
    """A key that commands may be signed with; entries of the same name are one issuer's keys, and one voice of an approval."""

    name: str = Field(min_length=1, max_length=100)
    public_key: str | None = None
    """The raw Ed25519 key in base64, as `sidecar issuer show` prints it."""
    public_key_file: Path | None = None
    ops: list[Op | Literal["*"]] = ["*"]
    tenants: list[str] = ["*"]
    """Globs over tenant ids."""

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if (self.public_key is None) == (self.public_key_file is None):
            raise ValueError("an issuer has a public_key or a public_key_file")
        return self


class ControlSettings(_Section):
    """Where commands, receipts and the ledger go, whose commands are carried out, and the keys to sign with."""

    topic: str = "sidecar.control"
    receipts: str = "sidecar.receipts"
    ledger: str = "sidecar.ledger"
    """What a restored or failed-over database is compared with before it is served. One partition; never delete it."""
    ledger_keys: list[Path] = []
    """Public keys of former control planes: `ledger replay` believes their entries too."""
    allow_unsigned: bool = False
    issuers: list[IssuerSettings] = []
    """Whose signed commands are carried out."""
    approvals: dict[Op, Annotated[int, Field(ge=1, le=MAX_SIGNATURES)]] = {}
    """How many issuers must have signed a command of that kind; 1 where nothing is said."""
    max_validity: str = "7d"
    """The longest time from a command's issued_at to its not_after."""
    grace: dict[Literal["shred"], str] = {}
    """How long what is irreversible waits, unless the command says so itself; data is inaccessible at once all the same."""
    clean_up_after: Annotated[str, BeforeValidator(_off)] = "30d"
    """Retired key versions that no stored event needs are destroyed this long after their rotation; `off`: only by `keys clean-up`."""
    issuer_key: Path | None = None
    """The private key that the command line signs with, unless --key or $SIDECAR_ISSUER_KEY names another."""
    signing_key: Path | None = None
    """The control plane's own private key, for ledger, certificates and checkpoints. In development it is made at the first use:
    keys/control-signing beside the configuration."""

    @field_validator("max_validity", "clean_up_after")
    @classmethod
    def _duration(cls, value: str) -> str:
        if value != "off":
            duration_ms(value)
        return value

    @field_validator("grace")
    @classmethod
    def _graces(cls, value: dict[str, str]) -> dict[str, str]:
        for text in value.values():
            grace_seconds(text)
        return value

    def grace_of(self, command: Command) -> float:
        """Seconds: what the command says, else what is configured for its op, else none."""
        if command.grace_seconds is not None:
            return command.grace_seconds
        configured = dict(self.grace).get(command.op)  # type: ignore[call-overload]
        return grace_seconds(configured) if configured else 0.0


class AuditSettings(_Section):
    """Signed checkpoints of the audit trail."""

    topic: str = "sidecar.audit"
    """Where signed checkpoints of the audit trail go; kept for ever."""
    checkpoint_every: str = "60s"

    @field_validator("checkpoint_every")
    @classmethod
    def _duration(cls, value: str) -> str:
        if duration_ms(value) < 100:
            raise ValueError("not more often than every 100ms")
        return value


class BackupSettings(_Section):
    """How many days copies are kept outside of the database; 0: none are made. What is not declared keeps a shred from being complete."""

    database_days: int | None = Field(default=None, ge=0)
    keystore_days: int | None = Field(default=None, ge=0)
    wal_days: int | None = Field(default=None, ge=0)


class JobSettings(_Section):
    """Re-encryptions, as `sidecar worker` gets them."""

    topic: str = "sidecar.jobs"
    """Chunks of long jobs, for `sidecar worker`."""
    partitions: int = Field(default=8, ge=1)
    """How many workers can share the work at most."""
    max_rows_per_second: int | None = Field(default=None, ge=1)
    """Of each worker; nothing said: as fast as it goes."""


class DeadLetterSettings(_Section):
    """Records that could not be stored: the topic has where they stand and why, never their values."""

    topic: str = "sidecar.dead-letters"


class BatchSettings(_Section):
    """How much one transaction stores at most, and how long it waits for more."""

    max_records: int = Field(default=2000, ge=1, le=100_000)
    max_bytes: ByteSize = ByteSize(16 * 2**20)
    max_wait_ms: int = Field(default=50, ge=1)


class LimitSettings(_Section):
    """Of records, of what is kept in memory (entries), and of the uses of a key version."""

    max_record_bytes: ByteSize = ByteSize(2**20)
    max_headers: int = Field(default=256, ge=8)
    key_cache_entries: int = Field(default=10_000, ge=1000)
    stream_heads: int = Field(default=10_000, ge=1000)
    soft_uses: int = Field(default=SOFT_LIMIT_USES, ge=1)
    """Seals under one key version at which it is rotated."""
    hard_uses: int = Field(default=HARD_LIMIT_USES, ge=1, le=HARD_LIMIT_USES)
    """Seals under one key version beyond which nothing is sealed with it: what would exceed it goes under the next version."""
    uses_block: int = Field(default=USES_BLOCK, ge=1)
    """Uses of a class's or tenant's key that an instance sets aside at a time; of a person's key a 64th."""

    @property
    def uses(self) -> UseLimits:
        return UseLimits(soft=self.soft_uses, hard=self.hard_uses, block=self.uses_block)


class HttpSettings(_Section):
    """Where each process serves its probes and metrics."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    """0 takes a free one; the `ready` line says which."""


class Settings(_Section):
    """A configuration, checked; `load` makes one. `sidecar init` writes a file with each line explained, `sidecar config show` lists every setting."""

    deployment: str = Field(default="demo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    profile: Literal["development", "production"] = "development"
    kafka: KafkaSettings = KafkaSettings()
    postgres: PostgresSettings = PostgresSettings()
    kms: KmsSettings = KmsSettings()
    sources: list[SourceSettings] = []
    classes: list[ClassSettings] = []
    policies: PoliciesSettings = PoliciesSettings()
    views: list[ViewSettings] = []
    control: ControlSettings = ControlSettings()
    audit: AuditSettings = AuditSettings()
    dead_letters: DeadLetterSettings = DeadLetterSettings()
    jobs: JobSettings = JobSettings()
    backups: BackupSettings = BackupSettings()
    batch: BatchSettings = BatchSettings()
    limits: LimitSettings = LimitSettings()
    http: HttpSettings = HttpSettings()

    @property
    def group_id(self) -> str:
        return f"{self.deployment}.sidecar"

    def transactional_id(self, instance_id: str) -> str:
        return f"{self.deployment}.{instance_id}"

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for what, names in (("view name", [v.name for v in self.views]), ("view topic", [v.topic for v in self.views])):
            if len(names) != len(set(names)):
                raise ValueError(f"views: a {what} stands twice")
        return self

    @model_validator(mode="after")
    def _a_batch_fits_a_key(self) -> Self:
        if self.limits.hard_uses < self.batch.max_records:
            raise ValueError("limits.hard_uses: one key must be able to seal a whole batch (batch.max_records)")
        return self

    def check_profile(self) -> None:
        """The production profile refuses every development default by name."""
        if self.profile != "production":
            return
        refused = {
            "kms.uri": ("a key file is a copy away from being someone else's", any(u.startswith("file:") for u in self.kms.uris())),
            "control.allow_unsigned": ("anyone who may write to the control topic could shred", self.control.allow_unsigned),
            "kafka.security.protocol": ("events would cross the network in clear", self.kafka.security.protocol in ("PLAINTEXT", "SASL_PLAINTEXT")),
        }
        for where, (why, bad) in refused.items():
            if bad:
                raise ConfigurationError(
                    f"profile production refuses {where} as it is: {why}", where=where, mend="set it, or use profile: development"
                )


def find_config(path: Path | None) -> Path:
    """The file that `--config`, $SIDECAR_CONFIG or the current folder gives."""
    return path or Path(os.environ.get(CONFIG_ENV, "sidecar.yaml"))


def load(path: Path | str | None = None, *, flags: dict[str, Any] | None = None) -> Settings:
    """Read `path`, else $SIDECAR_CONFIG, else ./sidecar.yaml; merge with the environment and `flags`; check. Paths in it are relative to the file.

    Raises ConfigurationError: what, where, how to mend.
    """
    file = find_config(Path(path) if path else None)
    try:
        document = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        raise ConfigurationError(
            "there is no configuration file", where=str(file), mend="`sidecar init DIR` writes one; --config or $SIDECAR_CONFIG names it"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError("the configuration file cannot be read", where=f"{file}: {_first_line(error)}", mend="mend its YAML") from None
    if not isinstance(document, dict):
        raise ConfigurationError("the configuration file is no mapping", where=str(file), mend="start from `sidecar init DIR`")
    for layer in (_from_environment(), flags or {}):
        _merge(document, layer)
    return parse(document, where=str(file), base=file.parent)


def parse(document: dict[str, Any], *, where: str, base: Path) -> Settings:
    """Settings from a document; relative paths in it are relative to `base`."""
    try:
        settings = Settings.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"]) or "top level"
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = f"{at.rpartition('.')[2]!r} is no setting"
        raise ConfigurationError(what, where=f"{where}: {at}", mend="`sidecar config show` lists every setting and its value") from None
    settings.check_profile()
    return _with_absolute_paths(settings, base)


def _with_absolute_paths(settings: Settings, base: Path) -> Settings:
    security = settings.kafka.security
    files = {n: (base / p).resolve() for n in ("password_file", "ca_file", "certificate_file", "key_file") if (p := getattr(security, n))}
    kafka = settings.kafka.model_copy(update={"security": security.model_copy(update=files)})
    uris = {n: u for n in ("uri", "uri_data", "uri_control", "uri_reader") if (u := getattr(settings.kms, n))}
    kms = settings.kms.model_copy(update={n: str(KmsUri.parse(u).with_files(lambda path: str((base / path).resolve()))) for n, u in uris.items()})
    control = settings.control
    keys = {
        "issuer_key": control.issuer_key,
        "signing_key": control.signing_key or (_DEVELOPMENT_SIGNING_KEY if settings.profile == "development" else None),
    }
    issuers = [i.model_copy(update={"public_key_file": i.public_key_file and (base / i.public_key_file).resolve()}) for i in control.issuers]
    trusted = [(base / path).resolve() for path in control.ledger_keys]
    found = {name: path and (base / path).resolve() for name, path in keys.items()}
    control = control.model_copy(update={**found, "issuers": issuers, "ledger_keys": trusted})
    return settings.model_copy(update={"kafka": kafka, "kms": kms, "control": control})


def _from_environment() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in os.environ.items():
        path = name.removeprefix(ENV_PREFIX)
        if path == name or path.startswith(_NOT_SETTINGS):
            continue
        # a setting that is itself called …_file keeps its name
        if path.endswith("_FILE") and not path.lower().endswith(("password_file", "ca_file", "certificate_file", "key_file")):
            value, path = read_secret(Path(value), name), path.removesuffix("_FILE")
        keys = path.lower().split("__")
        here = out
        try:
            for key in keys[:-1]:
                here = here.setdefault(key, {})
            here[keys[-1]] = yaml.safe_load(value) if value[:1] in "[{" else value
        except (AttributeError, TypeError, yaml.YAMLError):
            raise ConfigurationError("the variable makes no sense", where=name, mend="a plain value, or YAML in [] or {}") from None
    return out


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
