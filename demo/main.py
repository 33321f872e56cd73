"""`make demo`: the main job on a real broker and a real database. Each step is printed, checked, and ends the demo with one line if it fails.

    python demo/main.py [--dir DIR] [--small] [--break WHAT]

Everything it starts lives in DIR (.sidecar-dev/demo of this tree) and ends with it, on Ctrl-C too. After a good run the data stays for the commands
that the last step names; the next run begins anew.
"""

import argparse
import json
import os
import secrets
import shlex
import signal
import sys
from base64 import b64decode
from collections import Counter
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from applications import Event, Publisher, Subscriber, event_ids, header_texts, journal, make_topic
from database import Database, dissect, scan
from stage import Stage, check

ROOT = Path(__file__).resolve().parent.parent
TOPIC, VIEW = "users", "users.decrypted"
TENANTS = ("acme", "globex")
INSTANCE = "demo-0"
# Beside the defaults: UserPersonalData AES-256-GCM, CartData plain.
POLICIES = """\
- {class: AuditLog, algorithm: ChaCha20-Poly1305, rotation_days: 365}
- {class: UserPersonalData, tenant: initech, encrypt: false}   # encryption is not on yet for this one
"""
KINDS = (  # stream, event type, share of the events, streams of a tenant
    ("user", "UserChanged", 0.6, 30),
    ("audit", "AuditLogin", 0.2, 10),
    ("cart", "CartChanged", 0.2, 10),
)
SHOWN = ("acme", "user-0")
BREAKS = ("plaintext", "lost", "twice")
EVENT_BYTES = 1024
BATCH = 2000  # as `sidecar init` writes it


class Demo:
    def __init__(self, stage: Stage, *, small: bool, broken: str | None) -> None:
        self.stage, self.broken = stage, broken
        self.many, self.per_phase, self.killed_over = (600, 5000, 3000) if small else (10_000, 8000, 8000)
        self.secret = {tenant: f"{tenant}-{secrets.token_hex(8)}.example" for tenant in (*TENANTS, "initech")}
        self.first: Event | None = None
        self.receipt: dict[str, Any] = {}

    def run(self) -> None:
        self.start()
        self.publish()
        self.three_ways()
        self.speed()
        self.rotate()
        self.shred()
        self.kill()
        self.next()

    # ── 1 ──────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        stage, say = self.stage, self.stage.say
        with stage.step("start broker and database, data plane and control plane"):
            stack = stage.start_stack()
            stage.sidecar("init", str(stage.dir), "--bootstrap-servers", stack.bootstrap_servers, "--dsn", stack.dsn)
            stage.sidecar("db", "migrate")
            make_topic(stack.bootstrap_servers, TOPIC, 4)
            self.data = stage.spawn("run", "--instance-id", INSTANCE, log="data-plane.log")
            control = stage.spawn("control", log="control-plane.log")
            (stage.dir / "policies.yaml").write_text(POLICIES)
            stage.sidecar("policy", "apply", str(stage.dir / "policies.yaml"))
            self.readies = stage.ready(self.data, "data-plane.log")
            stage.ready(control, "control-plane.log")
            self.database = Database(stack.dsn)
            self.publisher = Publisher(stack.bootstrap_servers, TOPIC)
            self.view = Subscriber(stack.bootstrap_servers, VIEW, lambda event_id: self.first is not None and event_id == self.first.id)
            self.stack = stack
            say("Kafka", stack.bootstrap_servers)
            say("Postgres", stack.dsn)
            say("data plane", f"sidecar run, pid {self.data.pid}")
            say("control plane", f"sidecar control, pid {control.pid}")
            stage.ok("both planes say `ready`")

    # ── 2 ──────────────────────────────────────────────────────────────────────

    def publish(self) -> None:
        stage = self.stage
        with stage.step(f"publish {self.many:,} events of two tenants and three classes"):
            events = [event for tenant in TENANTS for kind in KINDS for event in self._events(tenant, *kind)]
            self.first = next(event for event in events if (event.tenant, event.stream) == SHOWN)
            self.publisher.publish([*events, self._event("initech", "user-0", "UserChanged", 0)])
            self._settle("every event in the store and in the view")
            rows = self.database.rows(
                """SELECT stream_type_class AS class, coalesce(encryption_algorithm, 'plain') AS how, count(*) AS events, count(data_encrypted) AS sealed
                   FROM messages JOIN streams USING (tenant_id, stream_id) WHERE tenant_id = ANY($1) GROUP BY 1, 2 ORDER BY 1 DESC""",
                list(TENANTS),
            )
            for row in rows:
                stage.say("", f"{row['class']:<18}{row['how']:<20}{row['events']:>7,} events")
            got = {(row["class"], row["how"]): (row["events"], row["sealed"]) for row in rows}
            user, audit, cart = (round(self.many / 2 * kind[2]) * 2 for kind in KINDS)
            wanted = {
                ("UserPersonalData", "AES-256-GCM"): (user, user),
                ("AuditLog", "ChaCha20-Poly1305"): (audit, audit),
                ("CartData", "plain"): (cart, 0),
            }
            check(got == wanted, f"the store holds {got}, not {wanted}")
            stage.ok(f"{self.many:,} stored and in the view, each class as its policy says")

    def _events(self, tenant: str, name: str, type_: str, share: float, streams: int) -> list[Event]:
        return [self._event(tenant, f"{name}-{n % streams}", type_, n) for n in range(round(self.many / 2 * share))]

    def _event(self, tenant: str, stream: str, type_: str, number: int) -> Event:
        """About 1 KB. The e-mail address is what must not be found; a cart has none."""
        body: dict[str, Any] = {"name": f"Jane {number}", "email": f"jane.{number}@{self.secret[tenant]}"}
        if stream.startswith("cart-"):
            body = {"article": f"book {number}"} | ({"email": self.secret[tenant]} if self.broken == "plaintext" else {})
        return Event(tenant=tenant, stream=stream, type=type_, value=padded(body))

    def _settle(self, what: str) -> None:
        wanted = len(self.publisher.published)
        self.stage.until(lambda: self.view.poll() >= wanted and self.database.value("SELECT count(*) FROM messages") >= wanted, 120, what)

    # ── 3 ──────────────────────────────────────────────────────────────────────

    def three_ways(self) -> None:
        stage, say, event = self.stage, self.stage.say, self.first
        assert event is not None
        with stage.step("one event three ways"):
            stored = self.database.rows("SELECT * FROM messages WHERE message_id = $1", event.id)
            check(len(stored) == 1, f"the event is {len(stored)} times in the store")
            envelope, record = stored[0]["data_encrypted"], self.view.kept[event.id]
            headers = header_texts(record)
            say("as published", f"topic {TOPIC}, tenant {event.tenant}, stream {event.stream}")
            say("", clipped(event.value))
            say("in Postgres", f"messages.data_encrypted, {len(envelope):,} bytes")
            for raw, meaning in dissect(envelope):
                say("", f"{raw:<34}{meaning}")
            say("in the view", f"topic {VIEW}, key {(record.key() or b'').decode()}")
            say("", clipped(record.value() or b""))
            say("", f"ce_streamtype {headers['ce_streamtype']}, ce_streamposition {headers['ce_streamposition']}")
            check(stored[0]["data"] is None and stored[0]["metadata"] is None, "a row of an encrypted stream has a part in clear")
            secret = self.secret[event.tenant].encode()
            check(secret in event.value and secret not in envelope, "the stored bytes hold the published text")
            check(record.value() == event.value, "the view's value is not the published one")
            stage.ok("stored unreadable, in the view to the byte what was published")

    # ── 4 ──────────────────────────────────────────────────────────────────────

    def speed(self) -> None:
        """Both classes by turns: each phase is a backlog that appears at once, drained to store and view."""
        stage, rounds = self.stage, 3
        with stage.step("events per second, and what encryption costs"):
            rates: dict[str, list[float]] = {"cart-speed": [], "user-speed": []}
            for name in rates:  # both are warm before the first one counts
                self._phase(name, "warm", 3000)
            for number in range(rounds):
                for name in reversed(rates) if number % 2 else rates:
                    rates[name] += self._phase(name, str(number), self.per_phase)
            plain, encrypted = (median(each) for each in rates.values())
            batches = len(rates["user-speed"])
            cost = f"encryption costs {1 - encrypted / plain:.0%}" if encrypted < plain else "less than this run can tell apart"
            stage.say("plain", f"{plain:>8,.0f} events/s")
            stage.say("encrypted", f"{encrypted:>8,.0f} events/s   {encrypted / plain:.2f} of plain: {cost}")
            stage.say("measured", f"{rounds} × {self.per_phase:,} events of 1 KB each way, by turns, to store and view;")
            stage.say("", f"the median of {batches} batches of up to {BATCH:,}; all on these {os.cpu_count()} cores")
            stage.say("", "a glance, not a benchmark: that is `make bench`")
            stage.ok("all of one stored in clear, all of the other sealed")

    def _phase(self, name: str, mark: str, count: int) -> list[float]:
        """Events/s of each batch but the last, by the clock of the database: from its begin to the next one's."""
        value = padded({"speed": "x"})
        before = len(self.publisher.published)
        self.publisher.publish_at_once([Event(tenant="globex", stream=f"{name}-{mark}-{n % 8}", type="Speed", value=value) for n in range(count)])
        # wait with a look that costs nothing, and read the view only afterwards: both would compete with what is measured
        last = "SELECT count(*) FROM messages WHERE tenant_id = 'globex' AND stream_id = ANY($1) AND stream_position = $2"
        names = [f"{name}-{mark}-{n}" for n in range(8)]
        self.stage.until(lambda: self.database.value(last, names, count // 8) == 8, 120, f"{count} events drained")
        self._settle(f"{count} events in the view")
        found = self.database.rows(
            """SELECT created_at, count(*) AS events, count(data_encrypted) AS sealed FROM messages
               WHERE tenant_id = 'globex' AND stream_id LIKE $1 GROUP BY created_at ORDER BY created_at""",
            f"{name}-{mark}-%",
        )
        total, sealed = sum(row["events"] for row in found), sum(row["sealed"] for row in found)
        check(total == count == len(self.publisher.published) - before, f"{total} of {count} events are stored")
        check(sealed == (0 if name.startswith("cart") else count), f"{sealed} of {count} events of {name} are encrypted")
        return [row["events"] / (after["created_at"] - row["created_at"]).total_seconds() for row, after in pairwise(found)]

    # ── 5 ──────────────────────────────────────────────────────────────────────

    def rotate(self) -> None:
        stage, say, (tenant, stream) = self.stage, self.stage.say, SHOWN
        with stage.step(f"rotate the key of the stream {tenant}/{stream}"):
            before = len(self._list(tenant, stream))
            receipt = stage.sidecar("rotate", "--tenant", tenant, "--stream", stream, "--reason", "demo", "--wait", "30")
            check(receipt["status"] == "done", f"the receipt says {receipt['status']}, not done")
            self.publisher.publish([self._event(tenant, stream, "UserChanged", 100_000 + n) for n in range(5)])
            self._settle("the events after the rotation")
            rows = self._list(tenant, stream)
            used = self.database.rows(
                "SELECT key_version, used_from_position FROM stream_key_history WHERE tenant_id = $1 AND stream_id = $2 ORDER BY 1", tenant, stream
            )
            say("command", f"sidecar rotate --tenant {tenant} --stream {stream}")
            say("receipt", f"{receipt['status']}, {self._milliseconds(receipt)} ms after the command (Kafka's timestamps)")
            for row in used:
                say("key version", f"{row['key_version']}, from position {row['used_from_position']}")
            check([(row["key_version"], row["used_from_position"]) for row in used] == [(1, 1), (2, before + 1)], f"key versions are {used}")
            readable = sum(row["status"] == "ok" for row in rows)
            check(readable == len(rows) == before + 5, f"{readable} of {before + 5} events can be read")
            stage.ok(f"{before} old and 5 new events read: sidecar events list --tenant {tenant} --stream {stream}")

    def _list(self, tenant: str, stream: str | None = None) -> list[dict[str, Any]]:
        of_stream = ("--stream", stream) if stream else ()
        rows: list[dict[str, Any]] = self.stage.sidecar("events", "list", "--tenant", tenant, *of_stream, "--limit", "100000")
        return rows

    def _milliseconds(self, receipt: dict[str, Any]) -> int:
        """From the command's record on the control topic to this receipt's on the receipts topic."""
        bootstrap = self.stack.bootstrap_servers
        signed = ((at, json.loads(b64decode(envelope["payload"]))) for at, envelope in journal(bootstrap, "sidecar.control"))
        sent = next(at for at, command in signed if command["command_id"] == receipt["command_id"])
        return next(at for at, value in self._receipts() if value["receipt_id"] == receipt["receipt_id"]) - sent

    def _receipts(self) -> list[tuple[int, Any]]:
        return journal(self.stack.bootstrap_servers, "sidecar.receipts")

    # ── 6 ──────────────────────────────────────────────────────────────────────

    def shred(self) -> None:
        stage, say, tenant, other = self.stage, self.stage.say, *TENANTS
        with stage.step(f"shred the tenant {tenant}"):
            receipt = self.receipt = stage.sidecar("shred", "--tenant", tenant, "--reason", "Art. 17 request", "--yes", "--wait", "30")
            check(receipt["status"] == "inaccessible", f"the receipt says {receipt['status']}, not inaccessible")
            (stage.dir / "receipt.json").write_text(json.dumps(receipt, indent=2) + "\n")
            notices = self.view.notices
            stage.until(
                lambda: self.view.poll() and {at for at, _ in notices} == self.view.partitions, 30, "the notice on every partition of the view"
            )
            say("command", f'sidecar shred --tenant {tenant} --reason "Art. 17 request"')
            took = datetime.fromisoformat(receipt["inaccessible_at"]) - datetime.fromisoformat(receipt["accepted_at"])
            wait = self._milliseconds(receipt)
            say("receipt", f"{receipt['status']}, {wait} ms after the command, {took.total_seconds() * 1000:.0f} ms after it was accepted")
            events = receipt["events"]
            say("", f"keys {receipt['keys']['count']} · events unreadable {events['unreadable']:,} · plain remaining {events['plain_remaining']:,}")
            let_go = [f"{one['instance_id']} {one['outcome']}" for one in receipt["instances"]]
            barrier = [f"{partition}:{end}" for partition, end in sorted(receipt["barrier"][VIEW].items())]
            say("", f"instances: {', '.join(let_go)}")
            say("", f"no payload in the view at or beyond {' '.join(barrier)}")
            for residue in receipt["residue"] or ():
                say("", f"still there: {residue['where']}" + (f", until {residue['until']}" if residue.get("until") else ""))
            self._reads_as_erased(tenant, receipt)
            notice = self.view.notices[0][1]
            check(notice["command_id"] == receipt["command_id"], "the notice names another command")
            stage.ok(f"the view has the notice on {len(self.view.notices)} partitions: tenant {notice['tenant']}, scope {notice['scope']['kind']}")
            rows = self._list(other, "user-0")
            check(rows and all(row["status"] == "ok" for row in rows), f"events of {other} do not read")
            stage.ok(f"{other} is untouched: its events read as before")
            self._scan(tenant)
            self._certificate(receipt)

    def _reads_as_erased(self, tenant: str, receipt: dict[str, Any]) -> None:
        rows = self._list(tenant)
        erased, plain = (sum(row["status"] == status for row in rows) for status in ("erased", "ok"))
        check(all(row["stream_id"].startswith("cart-") for row in rows if row["status"] == "ok"), "an encrypted event still reads")
        sealed = self.database.value("SELECT count(data_encrypted) FROM messages WHERE tenant_id = $1", tenant)
        check((erased, plain) == (sealed, len(rows) - sealed), f"{erased} of {sealed} encrypted events read as erased")
        counted = (receipt["events"]["unreadable"], receipt["events"]["plain_remaining"])
        check(counted == (erased, plain), f"the receipt counts {counted}, there are {(erased, plain)}")
        keys = self.database.value("SELECT count(wrapped) FROM tenant_keys WHERE tenant_id = $1", tenant)
        check(keys == 0, f"the database still holds {keys} keys of the tenant")
        self.stage.ok(f"its {erased:,} encrypted events read `erased`;")
        self.stage.say("", f"its {plain:,} plain ones stay (shred --include-plain deletes them)")

    def _scan(self, tenant: str) -> None:
        """The control is an event of the same kind, of a tenant for which encryption is not on yet."""
        self.database.run("CHECKPOINT")
        (hits, control), files, size = scan(self.stage.dir / "postgres", [self.secret[name].encode() for name in (tenant, "initech")])
        check(control, "the scan finds nothing at all: not even the text that was stored before encryption was on")
        check(not hits, f"the scan finds sensitive text of {tenant} {hits} times in the database files")
        self.stage.ok(f"{files} database files with WAL, {size / 2**20:,.0f} MB: none of its sensitive text;")
        self.stage.say("", f"of a tenant without encryption yet, the same scan finds it ({control} times)")

    def _certificate(self, receipt: dict[str, Any]) -> None:
        """What an auditor gets: it verifies with a public key alone, and not after one byte was changed."""
        stage, file, key = self.stage, self.stage.dir / "certificate.json", self.stage.dir / "keys" / "control-signing.pub"
        command = str(receipt["command_id"])
        stage.until(lambda: stage.sidecar("evidence", "list", "--command", command), 30, "the certificate of the shred")
        stage.sidecar("evidence", "get", command, "--output", str(file), "--with-salt")
        found = stage.sidecar("evidence", "verify", str(file), "--key", str(key))
        check(found["verified"] is True, "the certificate does not verify")
        decrypts = found["certificate"]["sampled"]
        raw = file.read_bytes()
        forged = stage.dir / "forged.json"
        forged.write_bytes(raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])
        refused = stage.exit_code("evidence", "verify", str(forged), "--key", str(key))
        check(refused == 1, f"a certificate with one byte changed is not refused (exit {refused})")
        stage.ok(f"a signed certificate, checked with a public key alone: {decrypts['failed']} of {decrypts['attempted']} sampled decrypts failed;")
        stage.say("", "with one byte changed it does not verify")

    # ── 7 ──────────────────────────────────────────────────────────────────────

    def kill(self) -> None:
        stage, say, count = self.stage, self.stage.say, self.killed_over
        with stage.step("kill -9 the data plane in mid-stream, and restart it"):
            events = [self._event("globex", f"user-{n % 30}", "UserChanged", 200_000 + n) for n in range(count)]
            before = len(self.publisher.published)
            stored = lambda: self.database.value("SELECT count(*) FROM messages") - before  # noqa: E731
            self.publisher.publish(events[: count * 4 // 5])
            stage.until(lambda: stored() > 0, 30, "the stream flows")
            pid = self.data.pid
            stage.end(self.data, signal.SIGKILL)
            at = stored()
            self.publisher.publish(events[count * 4 // 5 :])
            self.data = stage.spawn("run", "--instance-id", INSTANCE, log="data-plane.log")
            self.readies = stage.ready(self.data, "data-plane.log", self.readies)
            self._break()
            self._settle("everything in the store and in the view")
            say("killed", f"pid {pid}, with {at:,} of {count:,} events stored")
            say("restarted", f"pid {self.data.pid}, as {INSTANCE} again")
            check(0 < at < count, f"{at} of {count} events were stored at the kill: that was not in mid-stream")
            self._once()

    def _break(self) -> None:
        """What `--break` asks for, behind the sidecar's back: the check must see it."""
        if self.broken == "lost":
            self._settle("everything, before one is taken away")
            self.database.run("DELETE FROM messages WHERE (tenant_id, stream_id, stream_position) = ('globex', 'user-1', 7)")
            self.publisher.published.pop()
        if self.broken == "twice":
            again = Publisher(self.stack.bootstrap_servers, VIEW)
            assert self.first is not None
            again.publish([self.first])

    def _once(self) -> None:
        """All that the demo has published, not only of this step."""
        wanted = self.publisher.published
        store = Counter(row["message_id"] for row in self.database.rows("SELECT message_id FROM messages"))
        for where, seen in (("store", store), ("view", event_ids(self.stack.bootstrap_servers, VIEW))):
            lost, twice = wanted - seen.keys(), [i for i, times in seen.items() if times > 1]
            check(not lost, f"{len(lost)} of {len(wanted):,} events are lost in the {where}")
            check(not twice, f"{len(twice)} events are twice in the {where}")
            self.stage.ok(f"{where}: {len(wanted):,} of {len(wanted):,} published events, none twice")

    # ── 8 ──────────────────────────────────────────────────────────────────────

    def next(self) -> None:
        stage = self.stage
        with stage.step("where the receipt lies, and what to try next"):
            receipt = stage.sidecar("receipts", "get", self.receipt["command_id"])
            # what is left of copies, and the status behind it, may have moved on
            same = ("command_id", "keys", "barrier", "instances", "inaccessible_at")
            check(all(receipt[name] == self.receipt[name] for name in same), "`receipts get` shows another receipt than `shred` did")
            check(
                any(value["receipt_id"] == self.receipt["receipt_id"] for _, value in self._receipts()),
                "the receipt is not on the topic sidecar.receipts",
            )
            stage.say("the receipt", shown(stage.dir / "receipt.json"))
            stage.say("", "and on the topic sidecar.receipts, and by `sidecar receipts get`")
            stage.say("the data stay", "broker and database stop with the demo; the first command")
            stage.say("", f"starts them again (`dev down --dir {shown(stage.dir)}` stops them)")
            for line in next_commands(stage.dir, receipt["command_id"]):
                print(f"   $ {line}")


def next_commands(directory: Path, command_id: str) -> list[str]:
    """They work as they stand, from the folder that the demo was started in."""
    sidecar, config = shlex.quote(shown(Path(sys.executable).parent / "sidecar")), shlex.quote(shown(directory / "sidecar.yaml"))
    return [
        f"{sidecar} dev up --dir {shlex.quote(shown(directory))}",
        f"{sidecar} --config {config} receipts get {command_id}",
        f"{sidecar} --config {config} events list --tenant acme --stream user-0 --limit 5",
    ]


def shown(path: Path) -> str:
    """Short, if it lies below the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def padded(body: dict[str, Any]) -> bytes:
    text = json.dumps(body)
    return (text[:-1] + ', "more": "' + "x" * (EVENT_BYTES - len(text) - 12) + '"}').encode()


def clipped(value: bytes) -> str:
    text = value.decode()
    return text if len(text) <= 64 else f"{text[:56]}… ({len(value):,} bytes)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo/main.py", description="The main job, step by step.")
    parser.add_argument("--dir", type=Path, default=ROOT / ".sidecar-dev" / "demo", help="where everything lives (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="fewer events")
    parser.add_argument("--break", dest="broken", choices=BREAKS, help="break a promise on purpose: the demo must notice")
    options = parser.parse_args()
    try:
        with Stage(options.dir.resolve()) as stage:
            Demo(stage, small=options.small, broken=options.broken).run()
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"\nall 8 steps hold, in {stage.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
