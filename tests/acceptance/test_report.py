"""Promise: a compliance report of a tenant or of all, for a period, in which one tenant's report holds nothing of another's."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest

from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres.connection import connect
from sidecar.postgres.reports import STATEMENTS
from sidecar.report_page import render
from sidecar.reports import SECTIONS
from sidecar.testing import control_plane as kit
from sidecar.testing.local_stack import LocalStack
from tests.acceptance.world import World, blocking, until, world_on

NASTY = "<script>alert(1)</script>"
JANE = Scope(tenant="acme", kind=ScopeKind.STREAM, id="jane@acme.example")
THEIRS = ("globex", "their-stream", "eve@globex.example", "globex-hold", "GLOBEX-7")
"""What is of the other tenant, and of nobody else."""


async def seed(world: World) -> None:
    connection = await connect(world.dsn)
    old = datetime.now(UTC) - timedelta(days=400)
    try:
        await kit.seed(connection, "acme", {JANE.id: "UserPersonalData", NASTY: "UserPersonalData"}, created_at=old)
        await kit.seed(connection, "acme", {"held": "AuditLog", "fresh": "AuditLog"})
        await kit.seed(connection, "globex", {"their-stream": "UserPersonalData"}, created_at=old)
        await kit.seed(connection, NASTY, {"s": "UserPersonalData"})
        await kit.add_events(connection, "acme", JANE.id, 4, plain=True)
        await connection.execute("INSERT INTO source_topics (topic, topic_id) VALUES ('t', 'x')")
        for offset, (tenant, reason, days) in enumerate(
            [("acme", "tenant_shredded", 1), ("acme", "scope_erased", 1), ("acme", "scope_erased", 100), ("globex", "policy_refuse", 1)]
        ):
            at = datetime.now(UTC) - timedelta(days=days)
            await connection.execute(
                'INSERT INTO refusals (source_id, partition, "offset", tenant_id, reason, at) VALUES (1, 0, $1, $2, $3, $4)',
                offset,
                tenant,
                reason,
                at,
            )
        for offset, (tenant, reason) in enumerate([("acme", "too_large"), ("globex", "view_too_large"), (None, "no_tenant")]):
            await connection.execute(
                'INSERT INTO dead_letters (source_id, partition, "offset", tenant_id, reason) VALUES (1, 0, $1, $2, $3)', offset, tenant, reason
            )
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def world(local_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Three tenants, and a control plane that shredded, rotated, held, readmitted and refused for two of them."""
    with world_on(local_stack, tmp_path_factory.mktemp("report")) as world:
        blocking(lambda: seed(world))
        policies = world.folder / "policies.yaml"
        own = [{"class": "Letters", "tenant": "acme", "rotation_days": 7}, {"class": "Secret", "tenant": "globex"}, {"class": "Common"}]
        policies.write_text(json.dumps(own))
        assert world.cli("policy", "apply", str(policies)).returncode == 0
        control = world.control()
        by = {"requested_by": "dpo@acme.example", "ticket": "GDPR-1234"}
        theirs = {"requested_by": "eve@globex.example", "ticket": "GLOBEX-7"}
        held = Scope(tenant="acme", kind=ScopeKind.STREAM, id="held")
        done = [
            world.carry_out("hold", held, reason="lawsuit", **by),
            world.carry_out("shred", held, **by),
            world.carry_out("rotate", Scope(tenant="acme", kind=ScopeKind.STREAM, id="fresh"), **by),
            world.carry_out("shred", JANE, options={"dry_run": True}, **by),
            world.carry_out("shred", JANE, **by),
            world.carry_out("shred", Scope(tenant="acme", kind=ScopeKind.STREAM, id=NASTY), **by),
            world.carry_out("readmit", JANE, **by),
            world.carry_out("hold", Scope(tenant="globex", kind=ScopeKind.STREAM, id="their-stream"), reason="globex-hold", **theirs),
            world.carry_out("rotate", Scope.of_tenant("globex"), **theirs),
            world.carry_out("release", Scope(tenant="globex", kind=ScopeKind.STREAM, id="their-stream"), **theirs),
            world.carry_out("shred", Scope.of_tenant("globex"), **theirs),
        ]
        wanted = ["done", "rejected", "done", "done", "inaccessible", "inaccessible", "done", "done", "done", "done", "inaccessible"]
        assert [receipt["status"] for receipt in done] == wanted, [receipt["error"] for receipt in done]
        until(lambda: world.value("SELECT count(*) FROM certificates WHERE status = 'inaccessible'") == 3, "the certificates")
        assert control.stop() == 0
        yield world


def report(world: World, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = world.json("report", *words)
    return found


def test_report_of_a_tenant_has_every_section_and_what_happened_in_it(world: World) -> None:
    found = report(world, "--tenant", "acme")
    assert {section.name for section in SECTIONS} <= found.keys()
    assert (found["deployment"], found["tenant"], found["tenant_state"]) == (world.settings.deployment, "acme", "active")

    policies = {row["class"]: row for row in found["policies"]}
    assert (policies["Letters"]["rotation_days"], policies["Letters"]["encrypted"]) == (7, True)
    assert "Common" in policies and "Secret" not in policies
    assert {row["class"] for row in found["policy_changes"]} == {"Letters", "Common"}
    assert {row["class"]: (row["streams"], row["encrypted"]) for row in found["streams"]} == {"AuditLog": (2, 2), "UserPersonalData": (2, 2)}

    keys = {(row["key"], row["state"]): row["keys"] for row in found["keys"]}
    assert keys == {
        ("tenant key", "active"): 1,
        ("stream's data key", "destroyed"): 2,
        ("stream's data key", "active"): 1,
        ("stream's data key", "retired"): 1,
    }
    assert found["rotations_due"] == [], "the old keys were destroyed"
    rotations = {row["scope"]: (row["issuer"], row["status"]) for row in found["rotations"]}
    assert rotations["class UserPersonalData"] == ("timer", "done"), "the old ones, by age"
    assert rotations.keys() == {"stream fresh", "class UserPersonalData"}

    shreds = {row["scope"]: row for row in found["shreds"]}
    assert shreds.keys() == {f"stream {JANE.id}", f"stream {NASTY}"}, "what was tried out or refused is no shred"
    jane = shreds[f"stream {JANE.id}"]
    assert (jane["requested_by"], jane["ticket"], jane["keys"], jane["plain_events_remaining"]) == ("dpo@acme.example", "GDPR-1234", 1, 4)
    assert len(jane["certificates"]) == 1 and jane["inaccessible_at"]
    assert jane["outstanding"] == f"{sum(row['state'] != 'done' for row in found['residue'] if row['command_id'] == jane['command_id'])} of " + str(
        sum(row["command_id"] == jane["command_id"] for row in found["residue"])
    )
    assert [(row["scope"], row["reason"], row["placed_by"], row["released_at"]) for row in found["holds"]] == [
        ("stream held", "lawsuit", "dpo@acme.example", None)
    ]
    assert [(row["scope"], row["requested_by"]) for row in found["readmissions"]] == [(f"stream {JANE.id}", "dpo@acme.example")]
    assert [(row["op"], row["scope"]) for row in found["refused_commands"]] == [("shred", "stream held")]
    assert {row["reason"]: row["records"] for row in found["refusals"]} == {"tenant_shredded": 1, "scope_erased": 1}
    assert {row["reason"]: row["records"] for row in found["dead_letters"]} == {"too_large": 1}
    acts = {(row["actor"], row["action"]) for row in found["actors"]}
    assert acts >= {("dpo@acme.example", "stream.shred"), ("dpo@acme.example", "hold.place"), ("control-0", "certificate.issue")}
    assert sum(row["acts"] for row in found["actors"]) == found["totals"]["acts"] == len(found["acts"])
    summary = found["summary"]
    assert (summary["shreds"], summary["holds_in_force"], summary["records_refused"], summary["keys_destroyed"]) == (2, 1, 2, 2)


def test_report_of_one_tenant_holds_nothing_of_another(world: World) -> None:
    own, whole = (world.cli("-o", "json", "report", *words).stdout.decode() for words in (("--tenant", "acme"), ("--all",)))
    for word in THEIRS:
        assert word not in own, f"{word} in the report of acme"
        assert word in whole, f"control: {word} is there to be found"
    html = world.folder / "acme.html"
    assert world.cli("report", "--tenant", "acme", "--html", str(html)).returncode == 0
    assert not any(word in html.read_text() for word in THEIRS)
    shredded = [row["command_id"] for row in report(world, "--tenant", "globex")["shreds"]]
    assert len(shredded) == 1 and shredded[0] not in own and shredded[0] in whole
    mixed = json.dumps(report(world, "--tenant", "globex"))
    assert not any(word in mixed for word in ("acme", "jane", "GDPR-1234", "Letters"))


def test_report_of_all_names_the_tenants(world: World) -> None:
    found = report(world, "--all")
    assert (found["tenant"], found["summary"]["shreds"]) == (None, 3)
    assert {row["tenant"] for row in found["shreds"]} == {"acme", "globex"}
    assert {row["tenant"] for row in found["holds"]} == {"acme", "globex"}
    assert {row["reason"] for row in found["dead_letters"]} == {"too_large", "view_too_large", "no_tenant"}
    states = {row["state"] for row in found["keys"]}
    assert "unreadable: its tenant key is destroyed" in states


def test_report_keeps_to_its_period(world: World) -> None:
    longer = report(world, "--tenant", "acme", "--from", "2020-01-01")
    assert {row["reason"]: row["records"] for row in longer["refusals"]} == {"tenant_shredded": 1, "scope_erased": 2}
    before = report(world, "--tenant", "acme", "--from", "2020-01-01", "--to", (datetime.now(UTC) - timedelta(days=2)).isoformat())
    assert before["summary"]["shreds"] == before["totals"]["acts"] == before["totals"]["policy_changes"] == before["totals"]["holds"] == 0
    assert {row["reason"]: row["records"] for row in before["refusals"]} == {"scope_erased": 1}
    assert before["policies"] == longer["policies"], "how things stand is told as of now"
    exact = longer["shreds"][0]["received_at"]
    names = ("shreds", "acts", "refused_commands")
    from_there = report(world, "--tenant", "acme", "--from", exact)
    up_to_there = report(world, "--tenant", "acme", "--from", "2020-01-01", "--to", exact)
    assert [from_there["totals"][n] + up_to_there["totals"][n] for n in names] == [longer["totals"][n] for n in names], "from it on, and not up to it"
    assert exact in [row["received_at"] for row in from_there["shreds"]] and exact not in [row["received_at"] for row in up_to_there["shreds"]]


class Read(HTMLParser):
    """What a browser would make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_one_file_without_script_in_which_every_name_is_text(world: World) -> None:
    for words in (("--tenant", "acme"), ("--all",), ("--tenant", NASTY)):
        file = world.folder / "report.html"
        assert world.cli("report", *words, "--html", str(file)).returncode == 0
        text = file.read_text()
        read = Read()
        read.feed(text)
        tags = [tag for tag, _ in read.tags]
        assert not set(tags) & {"script", "img", "link", "iframe", "object"}
        assert not any(name.startswith("on") or name in ("src", "srcset") for _, attributes in read.tags for name in attributes)
        assert all((attributes.get("href") or "#").startswith("#") for _, attributes in read.tags)
        assert NASTY not in text and NASTY in read.text, "it is shown, as text"
        assert "@page" in text and tags.count("html") == 1
    broken = Read()
    broken.feed(text.replace("&lt;", "<").replace("&gt;", ">"))
    assert "script" in [tag for tag, _ in broken.tags], "control: unescaped it would be one"


def test_page_says_how_many_rows_it_leaves_out(world: World) -> None:
    found = report(world, "--all")
    found["totals"]["acts"] = 12_345
    page = render(found)
    assert f"the first {len(found['acts'])} of 12,345" in page
    assert "None." in page


def test_table_for_people_has_every_section(world: World) -> None:
    said = world.cli("-o", "table", "report", "--all").stdout.decode()
    for section in SECTIONS:
        assert section.title in said


@pytest.mark.parametrize(
    "words",
    [(), ("--tenant", "acme", "--all"), ("--all", "--from", "soon"), ("--all", "--from", "2026-02-01", "--to", "2026-01-01"), ("--tenant", "nobody"),
     ("--all", "--html", "/nowhere/at/all.html")],
)  # fmt: skip
def test_report_that_cannot_be_made_is_refused_with_the_reason(world: World, words: tuple[str, ...]) -> None:
    said = world.cli("report", *words)
    assert (said.returncode, said.stdout) == (2, b"")
    assert said.stderr.strip()


def test_every_section_is_one_statement_whatever_the_number_of_tenants() -> None:
    assert STATEMENTS.keys() == {section.name for section in SECTIONS}
    assert not any(";" in statement for statement in STATEMENTS.values())
