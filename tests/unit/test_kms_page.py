"""docs/kms.md says what the code does."""

import json
import re
from dataclasses import replace
from datetime import timedelta

import pytest
import yaml

from sidecar.kms import PROVIDERS, provider
from sidecar.servers import KmsSettings
from tests.unit.kms_page import PAGE, filled, traits

TEXT = PAGE.read_text()


def test_table_of_providers_is_that_of_the_code() -> None:
    assert filled(TEXT) == TEXT, "run python -m tests.unit.kms_page"


@pytest.mark.parametrize(
    "changed", [{"reversible": True}, {"delay": timedelta(days=30)}, {"destroys": "key"}, {"outlives": "nothing"}, {"ran_against": "it"}]
)
def test_control_a_page_that_promises_something_else_is_noticed(changed: dict[str, object]) -> None:
    others = [replace(one, **changed) if one.provider == "pkcs11" else one for one in traits()]
    assert filled(TEXT, others) != TEXT


def test_every_provider_has_its_traits_and_its_heading() -> None:
    assert [one.provider for one in traits()] == [*PROVIDERS]
    for one in traits():
        assert one.ran_against
        assert one.rights
        assert f"### `{one.provider}:" in TEXT


def test_configuration_in_the_page_is_read() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    settings = KmsSettings.model_validate(yaml.safe_load(block)["kms"])
    assert {provider(uri).uri for uri in settings.uris()} == {"vault:transit/sidecar"}


def test_policies_of_aws_in_the_page_are_json_and_only_the_control_plane_may_schedule_a_deletion() -> None:
    data, control = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL))
    assert not any("Delet" in action for statement in data["Statement"] for action in statement["Action"])
    assert "kms:ScheduleKeyDeletion" in control["Statement"][0]["Action"]
