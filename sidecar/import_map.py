"""The map of an import, as a person writes it: which table, and what its columns are to us. schemas/examples/ has two.

name: shop                      # the import's own name: its checkpoint is kept under it
source: {dsn: postgresql://reader@db/shop, table: emt_messages}
order: [global_position]        # columns that are unique together: the order in which rows are taken over
where: {is_archived: false}     # columns and the one value, or a list of values, that they must have
events:
  tenant: {const: acme}         # or {column: …}, or {column: …, match: '^([^/]+)/'}
  stream: stream_id             # short for {column: stream_id}
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator

from sidecar.core.errors import ConfigurationError
from sidecar.postgres.imports import Table, Value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class MappedValue(_Section):
    """A text: from a column, from what a pattern finds in it, or the same for all."""

    column: str | None = None
    match: str | None = None
    """A regular expression of Postgres; what its first group finds in the column."""
    const: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.column is None) == (self.const is None):
            raise ValueError("a value has a column or a const")
        if self.match is not None and self.column is None:
            raise ValueError("match: goes with a column")
        return self

    def value(self) -> Value:
        return Value(column=self.column, match=self.match, const=self.const)


class MappedColumn(_Section):
    """A column, by name."""

    column: str

    def value(self) -> Value:
        return Value(column=self.column)


class MappedData(MappedColumn):
    """The column with the event's data."""

    as_: Literal["json", "bytes"] | None = Field(default=None, alias="as")
    """Of a column that is not JSON to Postgres: whether readers get JSON or bytes. Nothing said: bytes."""


def _short(value: Any) -> Any:
    return {"column": value} if isinstance(value, str) else value


ValueField = Annotated[MappedValue, BeforeValidator(_short)]
ColumnField = Annotated[MappedColumn, BeforeValidator(_short)]


class MappedEvents(_Section):
    """Where the columns of an event are."""

    tenant: ValueField
    stream: ValueField
    position: ColumnField
    """Of the event in its stream. It may begin anywhere and have gaps, but must rise in the map's order."""
    type: ValueField
    data: Annotated[MappedData, BeforeValidator(_short)]
    """NULL is a tombstone."""
    metadata: ColumnField | None = None
    """A JSON object."""
    id: ColumnField | None = None
    """Without one, an id is made of the import's name and the event's place."""
    occurred_at: ColumnField | None = None
    """A time without a zone is taken as UTC."""
    schema_version: ColumnField | None = None
    subject: ValueField | None = None
    """The person, for policies with key scope subject."""
    stream_class: ValueField | None = Field(default=None, alias="class")
    """Without one, the class rules of the configuration say."""


class MappedSource(_Section):
    """The table, and the database that it is in."""

    dsn: SecretStr | None = None
    """Without one (and without dsn_file) the table is in our own database."""
    dsn_file: Path | None = None
    table: str = Field(min_length=1)


class ImportMap(_Section):
    """One import, by name: from where, in which order, of which rows, and what they mean."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    source: MappedSource
    order: list[str] = Field(min_length=1)
    where: dict[str, str | bool | int | list[str] | list[int] | None] = {}
    events: MappedEvents
    rows: int = Field(default=200, ge=1, le=10_000)
    """How many are stored in one transaction, which holds the guards of their tenants: a shred waits a second for it, no longer."""

    def table(self) -> Table:
        fields = {name: getattr(self.events, name) for name in MappedEvents.model_fields}
        values = {name: field.value() for name, field in fields.items() if field is not None}
        return Table(name=self.source.table, values=values, order=tuple(self.order), where=self.where)

    def dsn(self, ours: str) -> str:
        if self.source.dsn is not None:
            return self.source.dsn.get_secret_value()
        return ours if self.source.dsn_file is None else self.source.dsn_file.read_text().strip()


def load_map(file: Path) -> ImportMap:
    """Raises ConfigurationError: what, where, how to mend. Never quotes the file: a password may stand in it."""
    mend = "docs/migration.md has maps that fit"
    try:
        found = ImportMap.model_validate(yaml.safe_load(file.read_text()))
    except OSError as error:
        raise ConfigurationError(f"the map cannot be read: {error.strerror}", where=str(file), mend="name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigurationError("the map is no YAML", where=str(file), mend=mend) from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = f"{file}: {'.'.join(str(part) for part in first['loc'])}"
        raise ConfigurationError(first["msg"].removeprefix("Value error, "), where=where, mend=mend) from None
    secret = found.source.dsn_file
    if secret is None:
        return found
    secret = (file.parent / secret).resolve()
    if not secret.is_file():
        raise ConfigurationError("the secret's file cannot be read", where=f"{file}: source.dsn_file", mend="name a file that this user may read")
    return found.model_copy(update={"source": found.source.model_copy(update={"dsn_file": secret})})
