"""Database roles: of every table it is decided whether the data plane may read it."""

import re

from sidecar.postgres import migrations, roles


def undecided(reads: str, not_for_data: str) -> set[str]:
    made = set(re.findall(r"CREATE TABLE (\w+)", "".join(migration.sql for migration in migrations.known())))
    return (made | {"schema_migrations"}) ^ (set(reads.split()) | set(not_for_data.split()))


def test_every_table_is_the_data_planes_to_read_or_expressly_not() -> None:
    assert undecided(roles.DATA_READS, roles.NOT_FOR_DATA) == set()
    assert not set(roles.DATA_READS.split()) & set(roles.NOT_FOR_DATA.split())


def test_control_a_table_that_nobody_thought_of_is_noticed() -> None:
    assert undecided(roles.DATA_READS.replace("legal_holds", ""), roles.NOT_FOR_DATA) == {"legal_holds"}
