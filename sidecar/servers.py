"""What the sidecar connects to, as sections of the configuration: Kafka, Postgres, the KMS."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, SecretStr, field_validator, model_validator

from sidecar.core.errors import ConfigurationError
from sidecar.core.model import duration_ms


class _Section(BaseModel):
    """A misspelt name is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KafkaSecurity(_Section):
    """TLS and SASL as Kafka names them; a secret is better a file, which is read when it is needed."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    username: str | None = None
    password: SecretStr | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None

    @model_validator(mode="after")
    def _sasl_is_whole(self) -> Self:
        if self.protocol.startswith("SASL") and not (self.mechanism and self.username and (self.password or self.password_file)):
            raise ValueError(f"{self.protocol} needs mechanism, username and password_file")
        return self

    def secret(self) -> str:
        """The password, read when it is needed: a mounted secret may change."""
        if self.password_file is not None:
            return read_secret(self.password_file, "kafka.security.password_file")
        return self.password.get_secret_value() if self.password else ""


class KafkaSettings(_Section):
    """The brokers, and how to get in."""

    bootstrap_servers: str = "127.0.0.1:9092"
    security: KafkaSecurity = KafkaSecurity()
    client: dict[str, str | int | float | bool] = {}
    """Passed to librdkafka as it is."""
    group_protocol: Literal["auto", "consumer", "classic"] = "auto"


class PostgresSettings(_Section):
    """One DSN for all, or one for each database role (`sidecar db roles`)."""

    dsn: SecretStr = SecretStr("postgresql:///sidecar")
    dsn_data: SecretStr | None = None
    dsn_control: SecretStr | None = None
    dsn_worker: SecretStr | None = None
    dsn_reader: SecretStr | None = None
    dsn_migrator: SecretStr | None = None

    def for_role(self, role: Literal["data", "control", "worker", "reader", "migrator"]) -> str:
        """The DSN of a role, or the common one."""
        own: SecretStr | None = getattr(self, f"dsn_{role}")
        return (own or self.dsn).get_secret_value()


class KmsSettings(_Section):
    """Whose key wraps the tenants' keys, and how often it changes."""

    uri: str = "file:./keys/kek"
    """PROVIDER:KEY, with the identity to use as options (docs/kms.md). A secret is a file that an option names."""
    uri_data: str | None = None
    uri_control: str | None = None
    uri_reader: str | None = None
    """The same key through a role's own identity; without one, `uri`. Only the control plane's may be allowed to destroy."""
    dedicated: bool = False
    """A KMS key per tenant for tenants that come from now on, destroyed at the tenant's shred."""
    roll_every: str | None = None
    """How old a seal epoch gets before the control plane rolls it (30d); none: `sidecar keys roll-epoch` by hand."""
    backup: Literal["confirmed", "none"] = "confirmed"
    """confirmed: a retired version of the KMS key is destroyed only after `sidecar keys confirm-backup`; none: at once."""

    @field_validator("roll_every")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            duration_ms(value)
        return value

    def for_role(self, role: Literal["data", "control", "reader"]) -> str:
        """The URI of a role, or the common one."""
        own: str | None = getattr(self, f"uri_{role}")
        return own or self.uri

    def uris(self) -> set[str]:
        return {self.for_role(role) for role in ("data", "control", "reader")}


def read_secret(path: Path, where: str) -> str:
    """Its text without the white space around it. Raises ConfigurationError; `where` is the setting's name."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the secret's file cannot be read: {getattr(error, 'strerror', 'it is no text')}",
            where=f"{where}: {path}",
            mend="name a file that this user may read",
        ) from None
