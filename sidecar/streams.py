"""The tenants, streams and persons in hand: heads, decisions, sealing keys and how often they seal. In memory while the lease is held, never the truth.

Whatever a batch changed here before it committed is dropped with it (`discard`): the next touch reads Postgres again.
A tenant whose epoch moved (shred, rotation, policy) is dropped whole, keys and all.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from sidecar.core.aead import Cipher, Suite, lp
from sidecar.core.audit import scope_ref
from sidecar.core.blind_index import IndexKey, scope_of_index
from sidecar.core.envelope import EVENT_DOMAIN, Header
from sidecar.core.errors import KeyExhausted, KeyUnavailable
from sidecar.core.keys import SUBJECTS_PER_BLOCK, DekRow, Kek, TenantState, UseLimits
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.policy import Decision, Encrypt, Plain, PolicySet, Refuse
from sidecar.core.streams import Fresh, KeyRef, SealingKey, Stream, Subject, Tenant, Touch
from sidecar.keys import KeyManagement, dek_row, kek_row, make_dek, open_dek
from sidecar.postgres.keystore import KeyStore


class Streams:
    """The cache. One flow uses it, between its own awaits; not thread-safe."""

    def __init__(self, store: KeyStore, keys: KeyManagement, *, max_streams: int, limits: UseLimits | None = None) -> None:
        self.store, self._keys, self._limits = store, keys, limits or UseLimits()
        self._max, self._young = max(max_streams // 2, 1), 0
        self.tenants: dict[bytes, Tenant] = {}

    def ciphers(self) -> int:
        """How many are in hand."""
        held = self.tenants.values()
        keys = {stream.key for tenant in held for stream in (*tenant.streams.values(), *tenant.aged.values())}
        persons = (person.key for tenant in held for person in (*tenant.subjects.values(), *tenant.aged_subjects.values()))
        return len(keys.union(*(tenant.shared.values() for tenant in held), persons) - {None})

    def find(self, tenant: Tenant, raw: bytes) -> Stream | None:
        stream = tenant.streams.get(raw)
        if stream is None and (stream := tenant.aged.pop(raw, None)) is not None:
            self._keep(tenant, raw, stream)
        return stream

    def find_subject(self, tenant: Tenant, name: str, suite: Suite) -> Subject | None:
        at = (name, suite)
        subject = tenant.subjects.get(at)
        if subject is None and (subject := tenant.aged_subjects.pop(at, None)) is not None:
            tenant.subjects[at] = subject
            self._young += 1
        return subject

    def _keep(self, tenant: Tenant, raw: bytes, stream: Stream) -> None:
        tenant.streams[raw] = stream
        self._young += 1

    def age(self) -> None:
        """Between batches: two generations bound the memory; what was not used for a whole one goes."""
        if self._young < self._max:
            return
        self._young = 0
        for raw, tenant in list(self.tenants.items()):
            tenant.aged, tenant.streams = tenant.streams, {}
            tenant.aged_subjects, tenant.subjects = tenant.subjects, {}
            if not tenant.aged:
                self.tenants.pop(raw).forget()

    def discard(self, tenants: Iterable[str]) -> None:
        for name in tenants:
            tenant = self.tenants.pop(name.encode(), None)
            if tenant is not None:
                tenant.forget()

    def discard_all(self) -> None:
        self.discard([tenant.id for tenant in self.tenants.values()])

    async def load_tenants(self, names: list[str]) -> None:
        """Read tenants that are not in hand; one that Postgres does not know is made by this batch."""
        rows = await self.store.tenants(names)
        found = {row["tenant_id"]: row for row in rows}
        if len(found) < len(names):
            await self.store.ask_the_ledger(tenants=[name for name in names if name not in found])
        loaded: dict[bytes, Tenant] = {}
        for name in names:
            row, raw = found.get(name), name.encode()
            loaded[raw] = Tenant(
                id=name,
                id_lp=lp(raw),
                aad=lp(EVENT_DOMAIN, raw),
                exists=row is not None,
                state=row["state"] if row else TenantState.ACTIVE,
                generation=row["generation"] if row else 1,
                epoch=row["epoch"] if row else 1,
                erased_classes=frozenset(row["erased_classes"] if row else ()),
                foretold_classes=frozenset((row and row["foretold_classes"]) or ()),
            )
        # Read after the tenants: a shred in between moved the epoch, so the batch is not stored with what is missing here.
        shredded_once = {row["tenant_id"] for row in rows if row["has_barriers"]}
        for barrier in await self.store.barriers(sorted(shredded_once)) if shredded_once else ():
            of_scope = loaded[barrier["tenant_id"].encode()].barriers.setdefault((barrier["scope_kind"], barrier["scope_id"]), {})
            of_scope[barrier["source_id"], barrier["partition"]] = barrier["end_offset"]
        try:
            for record in rows:
                if record["kek_version"] is not None and record["state"] == TenantState.ACTIVE:
                    tenant = loaded[record["tenant_id"].encode()]
                    tenant.keks[record["kek_version"]] = await self._keys.open_kek(kek_row(record))
        except BaseException:  # whole, or not at all
            for tenant in loaded.values():
                tenant.forget()
            raise
        self.tenants |= loaded

    async def load_streams(self, touches: list[Touch], policies: PolicySet, fresh: Fresh) -> None:
        """Heads, decisions and sealing keys of streams that are not in hand. May call the KMS; raises Unavailable."""
        rows = {(r["tenant_id"], r["stream_id"]): r for r in await self.store.streams([(t.tenant.id, t.stream) for t in touches])}
        plans: list[tuple[Touch, Stream, Encrypt]] = []
        foretold = [scope for touch in touches for scope in _foretold(touch, rows[touch.tenant.id, touch.stream])]
        if foretold:
            await self.store.ask_the_ledger(scopes=foretold)
        for touch in touches:
            row = rows[touch.tenant.id, touch.stream]
            stream, decision = self._plan(touch, row, policies)
            self._keep(touch.tenant, touch.raw, stream)
            if stream.refusal is None and row["stream_type_class"] is None:
                fresh.streams.append((touch.tenant.id, stream))
            if stream.refusal is None and isinstance(decision, Encrypt) and stream.by_subject is None:
                plans.append((touch, stream, decision))
        await self._equip(plans, rows, fresh)

    def _plan(self, touch: Touch, row: Any, policies: PolicySet) -> tuple[Stream, Decision]:
        known = row["stream_type_class"]
        stream_class = known or touch.stream_class
        decision = policies.decide(touch.tenant.id, stream_class)
        if row["is_encrypted"] and isinstance(decision, Plain):
            decision = Encrypt(Suite.AES_256_GCM, ScopeKind.STREAM)  # once encrypted, encrypted for good
        if row["own_key"] and isinstance(decision, Encrypt) and decision.key_scope in (ScopeKind.CLASS, ScopeKind.TENANT):
            decision = Encrypt(decision.suite, ScopeKind.STREAM, fields=decision.fields)
        refusal = "scope_erased" if row["erased"] or stream_class in touch.tenant.erased_classes else None
        if refusal is None and isinstance(decision, Refuse):
            refusal = "policy_refuse"
        stream = Stream(touch.stream, lp(touch.stream.encode()), stream_class, refusal, None, row["head"], turns=known is not None)
        stream.fields = decision.fields if isinstance(decision, Encrypt) else None
        if isinstance(decision, Encrypt) and decision.key_scope is ScopeKind.SUBJECT:
            stream.by_subject = decision
            stream.turns = stream.turns and (not row["is_encrypted"] or row["encryption_key_id"] is not None)
        return stream, decision

    async def _equip(self, plans: list[tuple[Touch, Stream, Encrypt]], rows: dict[tuple[str, str], Any], fresh: Fresh) -> None:
        """Give each encrypted stream its sealing key: in hand, from the store, or made now."""
        missing = {}
        for touch, stream, decision in plans:
            scope = scope_of(touch.tenant.id, stream, decision.key_scope)
            if (scope.kind, scope.id, decision.suite) not in touch.tenant.shared:
                missing[scope.tenant, scope.kind, scope.id] = scope
        found = await self._newest(list(missing)) if missing else {}
        for touch, stream, decision in plans:
            tenant, scope = touch.tenant, scope_of(touch.tenant.id, stream, decision.key_scope)
            key = tenant.shared.get((scope.kind, scope.id, decision.suite))
            if key is None:
                known = found.get(scope)
                key = await self._sealing_key(tenant, scope, decision.suite, found, fresh)
                if scope.kind is not ScopeKind.STREAM:
                    tenant.shared[scope.kind, scope.id, decision.suite] = key
                elif known is not None and known.row.is_active and known.open_from is not None:
                    key.uses += stream.head - known.open_from + 1
            stream.key = key
            row = rows[tenant.id, stream.id]
            if (row["last_key_id"], row["last_key_version"]) == (key.key_id, key.version):
                stream.noted = key

    async def shared_key(self, scope: Scope, tenant: Tenant, suite: Suite, fresh: Fresh) -> SealingKey:
        """The key of a class or tenant scope."""
        key = tenant.shared.get((scope.kind, scope.id, suite))
        if key is None:
            found = await self._newest([(scope.tenant, scope.kind, scope.id)])
            key = tenant.shared[scope.kind, scope.id, suite] = await self._sealing_key(tenant, scope, suite, found, fresh)
        return key

    async def index_key(self, tenant: Tenant, fresh: Fresh) -> IndexKey:
        """The key of the tenant's blind index: its newest version, made if there is none."""
        if tenant.index_key is None:
            scope = scope_of_index(tenant.id)
            found = await self._newest([(scope.tenant, scope.kind, scope.id)])
            await self._sealing_key(tenant, scope, Suite.AES_256_GCM, found, fresh)
            tenant.index_key = open_dek(tenant.keks, found[scope].row).into_index_key()
        return tenant.index_key

    async def load_subjects(self, wanted: Iterable[tuple[Tenant, str, Suite]], fresh: Fresh) -> None:
        """Persons that are not in hand, with their keys, in one round trip."""
        asked = list(wanted)
        rows = {(r["of_tenant"], r["subject"]): r for r in await self.store.subjects(list({(t.id, name): None for t, name, _ in asked}))}
        found = {}
        for (tenant_id, name), row in rows.items():
            if row["key_id"] is not None:
                found[Scope(tenant=tenant_id, kind=ScopeKind.SUBJECT, id=name)] = _Found(dek_row(row), row["uses_reserved"], None)
        if foretold := [Scope(tenant=tenant, kind=ScopeKind.SUBJECT, id=name) for (tenant, name), row in rows.items() if row["foretold"]]:
            await self.store.ask_the_ledger(scopes=foretold)
        for tenant, name, suite in asked:
            subject = Subject(name, "scope_erased" if rows[tenant.id, name]["erased"] else None, None)
            if subject.refusal is None:
                scope = Scope(tenant=tenant.id, kind=ScopeKind.SUBJECT, id=name)
                subject.key = await self._sealing_key(tenant, scope, suite, found, fresh)
            tenant.subjects[name, suite] = subject
            self._young += 1

    async def _newest(self, scopes: list[tuple[str, ScopeKind, str]]) -> "dict[Scope, _Found]":
        out = {}
        for row in await self.store.newest_keys(scopes):
            dek = dek_row(row)
            stream = dek.name.scope.kind is ScopeKind.STREAM
            out[dek.name.scope] = _Found(dek, row["uses_reserved"] + ((row["closed"] or 0) if stream else 0), row["open_from"])
        return out

    async def _sealing_key(self, tenant: Tenant, scope: Scope, suite: Suite, found: "dict[Scope, _Found]", fresh: Fresh) -> SealingKey:
        known = found.get(scope)
        if known is not None and known.row.is_active:
            return _ready(known.row, suite, open_dek(tenant.keks, known.row).into_cipher(suite), known.uses)
        # marked by a rotation: the next version of the same key; destroyed and readmitted, or none: a new key
        last = known.row if known is not None and known.row.wrapped is not None and known.row.name.generation == tenant.generation else None
        name = (last.name.key_id, last.name.version + 1) if last else (None, 1)
        row, cipher = make_dek(await self._kek(tenant, fresh), scope, suite, *name)
        found[scope] = _Found(row, 0, None)
        fresh.deks.append(row)
        return _ready(row, suite, cipher, 0)

    # ── counting ────────────────────────────────────────────────────────────────────────────────────────────────────

    def make_room(self, needs: dict[SealingKey, int], fresh: Fresh, fields: Mapping[SealingKey, int] = MappingProxyType({})) -> None:
        """Before a batch is sealed: each key may be used as often as the batch has records for it, or has a successor from here on.

        `fields`: how many more seals each is needed for, of fields of documents. Of a stream's key those are on record, in blocks: its
        positions do not tell of them. Raises KeyExhausted where the batch alone is more than a key may seal: then nothing of it is sealed.
        """
        limits, full = self._limits, self._full({key: n + fields.get(key, 0) for key, n in needs.items()})
        for used, records in needs.items():
            key, n = used, records + fields.get(used, 0)
            if n > key.left:
                if key.ref in full:
                    key = self._rotate(used, fresh)
                more = min(max(limits.next_block(key.scope.kind, key.uses), n - key.left), limits.hard - key.uses)
                if key.left + more < n:
                    raise KeyExhausted(f"{n} seals at once are more than the {limits.hard} that a key of {key.scope.kind} scope may seal")
                key.uses += more
                key.left += more
                if key.scope.kind is not ScopeKind.STREAM:
                    self._reserve(key.ref, more, fresh)
            key.left -= n
            if n > records and key.scope.kind is ScopeKind.STREAM:
                if (short := n - records - key.fields_left) > 0:  # no more of them than the key may still seal
                    block = min(max(limits.block // SUBJECTS_PER_BLOCK, short), short + key.left)
                    self._reserve(key.ref, block, fresh)
                    key.fields_left += block
                key.fields_left -= n - records

    def _full(self, needs: dict[SealingKey, int]) -> set[KeyRef]:
        """The versions that have reached the soft limit, or would go beyond the hard one now. Under several suites it is still one version."""
        short: Counter[KeyRef] = Counter()
        for key, n in needs.items():
            short[key.ref] += max(n - key.left, 0)
        return {key.ref for key in needs if key.uses >= self._limits.soft or 0 <= self._limits.hard - short[key.ref] < key.uses}

    def _reserve(self, key: KeyRef, uses: int, fresh: Fresh) -> None:
        fresh.reserved[key] = fresh.reserved.get(key, 0) + uses

    def _rotate(self, old: SealingKey, fresh: Fresh) -> SealingKey:
        """The next version, for everything here that seals with the old one. Staged, as all that a batch makes."""
        tenant, scope = self.tenants[old.scope.tenant.encode()], old.scope
        made = next((d for d in fresh.deks if (d.name.key_id, d.name.version) == (old.key_id, old.version + 1)), None)
        if made is None:
            if not tenant.keks:
                raise KeyUnavailable("a tenant without a tenant key gets no key")
            made, cipher = make_dek(tenant.keks[max(tenant.keks)], scope, old.suite, old.key_id, old.version + 1)
            fresh.retired.append(old.ref)
            fresh.deks.append(made)
        else:  # under another suite, in this batch
            cipher = open_dek(tenant.keks, made).into_cipher(old.suite)
        new = _ready(made, old.suite, cipher, 0)
        if scope.kind is ScopeKind.SUBJECT:
            subject = self.find_subject(tenant, scope.id, old.suite)
            if subject is not None:
                subject.key = new
                subject.noted.clear()
            return new
        if scope.kind is not ScopeKind.STREAM:
            tenant.shared[scope.kind, scope.id, old.suite] = new
        for stream in (*tenant.streams.values(), *tenant.aged.values()):
            if stream.key is old:
                stream.key = new
        return new

    def note_use(self, tenant: Tenant, stream: Stream, key: SealingKey, subject: Subject | None, position: int, fresh: Fresh) -> None:
        """`key` seals the position, and the record does not say so yet: a row of the history begins here, and the one before ends."""
        row = (tenant.id, stream.id, key.key_id, key.version, position)
        if subject is not None:
            if stream in subject.noted:
                return
            subject.noted.add(stream)
            self._young += 1
            fresh.persons.append(row)
        else:
            stream.noted = key
            fresh.history.append(row)
        if stream.turns:
            fresh.turned.append((tenant.id, stream.id, None if subject else key.key_id, key.suite.label, position))
        stream.turns = subject is None

    async def _kek(self, tenant: Tenant, fresh: Fresh) -> Kek:
        """The tenant's newest KEK, made if there is none. A tenant that is not active never gets one."""
        if tenant.state != TenantState.ACTIVE:
            raise KeyUnavailable("a tenant that is not active gets no key")
        if not tenant.keks:
            kek, row = await self._keys.make_kek(tenant.id, tenant.generation)
            tenant.keks[kek.version] = kek
            fresh.keks.append(row)
        return tenant.keks[max(tenant.keks)]


def _foretold(touch: Touch, row: Any) -> Iterator[Scope]:
    """What of a stream that is touched first has a name now, and stood in the ledger without one."""
    if row["foretold"]:
        yield Scope(tenant=touch.tenant.id, kind=ScopeKind.STREAM, id=touch.stream)
    if touch.tenant.foretold_classes:
        of_class = Scope(tenant=touch.tenant.id, kind=ScopeKind.CLASS, id=row["stream_type_class"] or touch.stream_class)
        if scope_ref(of_class) in touch.tenant.foretold_classes:
            yield of_class


class _Found(NamedTuple):
    """A key as the store has it: uses reserved, and of a stream's key the positions sealed up to `open_from`, which are not reserved."""

    row: DekRow
    uses: int
    open_from: int | None


def _ready(row: DekRow, suite: Suite, cipher: Cipher, uses: int) -> SealingKey:
    name = row.name
    header = Header(suite=suite, scope_kind=name.scope.kind, key_id=name.key_id, key_version=name.version, framed=True)
    return SealingKey(name.scope, name.key_id, name.version, suite, header.prefix(), cipher, uses)


def scope_of(tenant: str, stream: Stream, kind: ScopeKind) -> Scope:
    """The scope that a stream's key belongs to."""
    if kind is ScopeKind.TENANT:
        return Scope.of_tenant(tenant)
    return Scope(tenant=tenant, kind=kind, id=stream.stream_class if kind is ScopeKind.CLASS else stream.id)
