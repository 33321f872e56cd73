"""Fields that a schema calls sensitive become the pointers of a policy; what cannot be said exactly is said by more, or is an error."""

import json
from pathlib import Path
from typing import Any

import pytest

from sidecar.cli import main
from sidecar.core.detection import sensitive_fields
from sidecar.core.errors import ConfigurationError
from sidecar.settings import PolicySpec

PII: dict[str, Any] = {"type": "string", "confluent:tags": ["PII"]}
CLEAR: dict[str, Any] = {"type": "string"}


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


JSON_SCHEMA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "x-sensitive": (of(a={"type": "string", "x-sensitive": True}, b={"x-sensitive": False}, c=CLEAR), ("/a",)),
    "x-pii, said in words": (of(a={"x-pii": "email"}, b={"x-pii": None}), ("/a",)),
    "tags, in any case": (of(a={"confluent:tags": ["internal", "pii"]}, b={"confluent:tags": ["PUBLIC"]}), ("/a",)),
    "nested": (of(user=of(name=PII, id=CLEAR)), ("/user/name",)),
    "a marked object covers what is in it": (of(user={"x-pii": True, "properties": {"name": PII}}), ("/user",)),
    "arrays": (of(mails={"type": "array", "items": PII}, people={"items": of(name=PII)}), ("/mails/*", "/people/*/name")),
    "tuples are taken together": (of(a={"prefixItems": [PII, CLEAR]}, b={"items": [CLEAR, PII]}), ("/a/*", "/b/*")),
    "maps": (of(labels={"additionalProperties": PII}, more={"patternProperties": {"^x": of(n=PII)}}), ("/labels/*", "/more/*/n")),
    "a map beside names of its own": ({"properties": {"user": of(name=PII)}, "additionalProperties": of(mail=PII)}, ("/*/mail", "/user/name")),
    "a map's pointer that names one of them too": ({"properties": {"user": of(mail=PII)}, "additionalProperties": of(mail=PII)}, ("/*/mail",)),
    "a map's pointer that reaches into one of them": ({"properties": {"user": PII}, "additionalProperties": of(mail=PII)}, ("/*",)),
    "names are escaped": (of(**{"a/b": PII, "c~d": PII}), ("/a~1b", "/c~0d")),
    "unions": ({"oneOf": [of(a=PII), {"anyOf": [of(b=PII)]}], "allOf": [of(c=PII)]}, ("/a", "/b", "/c")),
    "conditions": ({"if": of(kind=CLEAR), "then": of(a=PII), "else": of(b=PII), "dependentSchemas": {"x": of(c=PII)}}, ("/a", "/b", "/c")),
    "what it is not": ({"properties": {"not": PII}, "not": of(a=PII)}, ("/not",)),
    "$ref": ({**of(home={"$ref": "#/$defs/address"}, a={"$ref": "#mail"}), "$defs": {"address": of(street=PII), "m": {**PII, "$anchor": "mail"}}},
             ("/a", "/home/street")),
    "a mark beside a $ref": ({**of(home={"$ref": "#/definitions/address", "x-pii": True}), "definitions": {"address": of(city=CLEAR)}}, ("/home",)),
    "$ref by id": ({"$id": "https://a/b", **of(a={"$ref": "https://a/b#/$defs/x"}, b={"$ref": "urn:x"}), "$defs": {"x": {**PII, "$id": "urn:x"}}},
                   ("/a", "/b")),
    "a definition that nothing uses": ({**of(a=CLEAR), "$defs": {"x": PII}}, ()),
    "recursion without a mark": ({**of(parent={"$ref": "#/$defs/n"}, mail=PII), "$defs": {"n": of(parent={"$ref": "#/$defs/n"})}}, ("/mail",)),
    "the whole document": ({"x-sensitive": True, **of(a=CLEAR)}, ("",)),
    "a property that is called tags": (of(tags={"type": "array", "items": {"enum": ["PII"]}}, id=CLEAR), ()),
}  # fmt: skip


@pytest.mark.parametrize("case", JSON_SCHEMA)
def test_fields_of_a_json_schema(case: str) -> None:
    schema, expected = JSON_SCHEMA[case]
    assert sensitive_fields(schema) == expected


def record(name: str, *fields: Any, **more: Any) -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": list(fields), **more}


def field(name: str, kind: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, **more}


TAGGED = {"confluent:tags": ["PII"]}
ADDRESS = record("Address", field("street", "string", **TAGGED), field("city", "string"))
AVRO: dict[str, tuple[Any, tuple[str, ...]]] = {
    "confluent:tags on a field": (record("U", field("mail", "string", **TAGGED), field("id", "long")), ("/mail",)),
    "tags, as a list or a line": (record("U", field("a", "string", tags=["PII"]), field("b", "string", tags="x, pii"), field("c", "int", tags=[])), ("/a", "/b")),
    "on the type": (record("U", field("a", {"type": "string", **TAGGED}), field("b", {"type": "bytes", "logicalType": "decimal"})), ("/a",)),
    "x-pii": (record("U", field("a", "string", **{"x-pii": True})), ("/a",)),
    "nested records": (record("U", field("home", ADDRESS)), ("/home/street",)),
    "a marked record": (record("U", field("home", {**ADDRESS, **TAGGED})), ("/home",)),
    "arrays and maps": (record("U", field("a", {"type": "array", "items": ADDRESS}), field("m", {"type": "map", "values": "Address"})), ("/a/*/street", "/m/*/street")),
    "unions": (record("U", field("a", ["null", ADDRESS]), field("b", ["null", "string"], **TAGGED)), ("/a/street", "/b")),
    "by full name": (record("shop.U", field("a", {**ADDRESS, "namespace": "geo"}), field("b", "geo.Address"), field("c", ["null", "geo.Address"])),
                     ("/a/street", "/b/street", "/c/street")),
    "in the namespace": (record("U", field("a", ADDRESS), field("b", "Address"), namespace="shop"), ("/a/street", "/b/street")),
    "defined behind its use": ([record("U", field("a", "Address")), ADDRESS], ("/a/street", "/street")),
    "a tree without a mark": (record("N", field("next", ["null", "N"]), field("n", "int")), ()),
    "a union of events": ([record("A", field("x", "string", **TAGGED)), record("B", field("y", "string", **TAGGED))], ("/x", "/y")),
    "an array of records": ({"type": "array", "items": ADDRESS}, ("/*/street",)),
}  # fmt: skip


@pytest.mark.parametrize("case", AVRO)
def test_fields_of_an_avro_schema(case: str) -> None:
    schema, expected = AVRO[case]
    assert sensitive_fields(schema) == expected


@pytest.mark.parametrize("case", [*JSON_SCHEMA, *AVRO])
def test_what_is_found_makes_a_policy(case: str) -> None:
    found = (JSON_SCHEMA | AVRO)[case][1]
    if found != ("",):
        assert PolicySpec(stream_class="C", fields=found).fields == found


def test_tags_are_those_that_are_asked_for() -> None:
    schema = of(a=PII, b={"confluent:tags": ["GDPR"]}, c={"x-sensitive": True})
    assert sensitive_fields(schema, ["gdpr"]) == ("/b", "/c")


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({**of(a={"$ref": "other.json#/x"})}, "refers to what does not stand in it"),
        ({**of(a={"$ref": "#/$defs/missing"})}, "refers to what does not stand in it"),
        ({**of(a={"$ref": "#nowhere"})}, "refers to what does not stand in it"),
        (record("U", field("a", "elsewhere.Address")), "refers to what does not stand in it"),
        ({**of(child={"$ref": "#"}, name=PII)}, "a part that contains itself has sensitive fields"),
        (record("N", field("next", ["null", "N"]), field("mail", "string", **TAGGED)), "a part that contains itself has sensitive fields"),
        ({"schema": "{}", "schemaType": "AVRO"}, "neither JSON Schema nor Avro"),
        ({"openapi": "3.1.0"}, "neither JSON Schema nor Avro"),
        (record("U", {"name": "a"}), "the schema is malformed"),
        (record("U", field("a", 7)), "neither a name nor a schema"),
    ],
)
def test_what_pointers_cannot_say_is_an_error_and_no_field_that_is_passed_over(schema: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        sensitive_fields(schema)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["policy", "detect", *words])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_the_command_prints_a_policy_that_can_be_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "user.json"
    file.write_text(json.dumps(of(mail=PII, address=of(street={"x-sensitive": True}, city=CLEAR)), indent="\t"))
    code, out, _ = run(capsys, str(file), "--class", "Users", "-o", "json")
    fields = ["/address/street", "/mail"]
    assert (code, json.loads(out)) == (0, {"fields": fields, "policy": {"class": "Users", "fields": fields}})
    code, out, _ = run(capsys, str(file), "--class", "Users")  # also into a file, with `>`
    assert (code, out) == (0, "- class: Users\n  fields:\n  - /address/street\n  - /mail\n")
    code, out, said = run(capsys, str(file), "--class", "Users", "--tag", "GDPR", "-o", "json")
    assert json.loads(out)["fields"] == ["/address/street"]
    file.write_text(json.dumps(of(id=CLEAR)))
    code, out, said = run(capsys, str(file), "--class", "Users", "-o", "json")
    assert (code, out) == (1, "")
    assert "no field" in said
    file.write_text("nonsense: [")
    assert run(capsys, str(file), "--class", "Users")[0] == 2


def test_a_document_that_is_marked_whole_gives_a_policy_without_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "user.json"
    file.write_text(json.dumps({"x-pii": True, **of(id=CLEAR)}))
    assert json.loads(run(capsys, str(file), "--class", "Users", "-o", "json")[1])["policy"] == {"class": "Users"}
