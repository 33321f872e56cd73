"""The tenants and streams in hand: heads, decisions, sealing keys. In memory while the lease is held, never the truth.

Whatever a batch changed here before it committed is dropped with it (`discard`): the next touch reads Postgres again.
A tenant whose epoch moved (shred, rotation, policy) is dropped whole, keys and all.
"""

from collections.abc import Iterable

from sidecar.core.aead import Suite, lp
from sidecar.core.envelope import EVENT_DOMAIN, Header
from sidecar.core.errors import KeyUnavailable
from sidecar.core.keys import DekRow, Kek, TenantState
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.policy import Decision, Encrypt, PolicySet, Refuse
from sidecar.core.streams import Fresh, SealingKey, Stream, Tenant, Touch
from sidecar.keys import KeyManagement, dek_row, kek_row, make_dek, open_dek
from sidecar.postgres.keystore import KeyStore


class Streams:
    """The cache. One flow uses it, between its own awaits; not thread-safe."""

    def __init__(self, store: KeyStore, keys: KeyManagement, *, max_streams: int) -> None:
        self.store, self._keys = store, keys
        self._max, self._young = max(max_streams // 2, 1), 0
        self.tenants: dict[bytes, Tenant] = {}

    def find(self, tenant: Tenant, raw: bytes) -> Stream | None:
        stream = tenant.streams.get(raw)
        if stream is None and (stream := tenant.aged.pop(raw, None)) is not None:
            self._keep(tenant, raw, stream)
        return stream

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
        for name in names:
            row, raw = found.get(name), name.encode()
            self.tenants[raw] = Tenant(
                id=name,
                id_lp=lp(raw),
                aad=lp(EVENT_DOMAIN, raw),
                exists=row is not None,
                state=row["state"] if row else TenantState.ACTIVE,
                generation=row["generation"] if row else 1,
                epoch=row["epoch"] if row else 1,
                erased_classes=frozenset(row["erased_classes"] if row else ()),
            )
        for record in rows:
            if record["kek_version"] is not None and record["state"] == TenantState.ACTIVE:
                tenant = self.tenants[record["tenant_id"].encode()]
                tenant.keks[record["kek_version"]] = await self._keys.open_kek(kek_row(record))

    async def load_streams(self, touches: list[Touch], policies: PolicySet, fresh: Fresh) -> None:
        """Heads, decisions and sealing keys of streams that are not in hand. May call the KMS; raises Unavailable."""
        rows = {(r["tenant_id"], r["stream_id"]): r for r in await self.store.streams([(t.tenant.id, t.stream) for t in touches])}
        plans: list[tuple[Touch, Stream, Encrypt]] = []
        for touch in touches:
            row = rows[touch.tenant.id, touch.stream]
            stream, decision = self._plan(touch, row, policies)
            self._keep(touch.tenant, touch.raw, stream)
            if stream.refusal is None and row["stream_type_class"] is None:
                fresh.streams.append((touch.tenant.id, stream))
            if stream.refusal is None and isinstance(decision, Encrypt):
                plans.append((touch, stream, decision))
        await self._equip(plans, rows, fresh)

    def _plan(self, touch: Touch, row: object, policies: PolicySet) -> tuple[Stream, Decision]:
        known = row["stream_type_class"]  # type: ignore[index]
        stream_class = known or touch.stream_class
        decision = policies.decide(touch.tenant.id, stream_class)
        if row["is_encrypted"] and not isinstance(decision, Encrypt):  # type: ignore[index]
            decision = Encrypt(Suite.AES_256_GCM, ScopeKind.STREAM)  # once encrypted, encrypted for good
        refusal = "scope_erased" if row["erased"] or stream_class in touch.tenant.erased_classes else None  # type: ignore[index]
        if refusal is None and isinstance(decision, Refuse):
            refusal = "policy_refuse"
        head = row["head"]  # type: ignore[index]
        return Stream(touch.stream, lp(touch.stream.encode()), stream_class, refusal, None, head), decision

    async def _equip(self, plans: list[tuple[Touch, Stream, Encrypt]], rows: dict[tuple[str, str], object], fresh: Fresh) -> None:
        """Give each encrypted stream its sealing key: in hand, from the store, or made now."""
        missing = {}
        for touch, stream, decision in plans:
            scope = scope_of(touch.tenant.id, stream, decision.key_scope)
            if (scope.kind, scope.id, decision.suite) not in touch.tenant.shared:
                missing[scope.tenant, scope.kind, scope.id] = scope
        stored = await self.store.newest_keys(list(missing)) if missing else []
        found = {(r["tenant_id"], r["scope_kind"], r["scope_id"]): dek_row(r) for r in stored}
        for touch, stream, decision in plans:
            tenant, scope = touch.tenant, scope_of(touch.tenant.id, stream, decision.key_scope)
            key = tenant.shared.get((scope.kind, scope.id, decision.suite))
            if key is None:
                key = await self._sealing_key(tenant, scope, decision.suite, found, fresh)
                if scope.kind is not ScopeKind.STREAM:
                    tenant.shared[scope.kind, scope.id, decision.suite] = key
            stream.key = key
            self._note_use(tenant.id, stream, rows[tenant.id, stream.id], fresh)

    async def shared_key(self, scope: Scope, tenant: Tenant, suite: Suite, fresh: Fresh) -> SealingKey:
        """The key of a class or tenant scope."""
        key = tenant.shared.get((scope.kind, scope.id, suite))
        if key is None:
            stored = await self.store.newest_keys([(scope.tenant, scope.kind, scope.id)])
            found = {(r["tenant_id"], r["scope_kind"], r["scope_id"]): dek_row(r) for r in stored}
            key = tenant.shared[scope.kind, scope.id, suite] = await self._sealing_key(tenant, scope, suite, found, fresh)
        return key

    def _note_use(self, tenant: str, stream: Stream, row: object, fresh: Fresh) -> None:
        """Which positions a key version sealed: the history gets a row when it differs from the last one."""
        key = stream.key
        if key is None or (row["last_key_id"], row["last_key_version"]) == (key.key_id, key.version):  # type: ignore[index]
            return
        fresh.history.append((tenant, stream.id, key.key_id, key.version, stream.head + 1))
        if row["stream_type_class"] is not None:  # type: ignore[index]
            fresh.turned.append((tenant, stream))

    async def _sealing_key(self, tenant: Tenant, scope: Scope, suite: Suite, found: dict[tuple[str, str, str], DekRow], fresh: Fresh) -> SealingKey:
        at = (scope.tenant, scope.kind.value, scope.id)
        row = found.get(at)
        if row is not None and row.is_active:
            cipher = open_dek(tenant.keks, row).into_cipher(suite)
        else:
            # marked by a rotation: the next version of the same key; destroyed and readmitted, or none: a new key
            successor = row if row is not None and row.wrapped is not None and row.name.generation == tenant.generation else None
            kek = await self._kek(tenant, fresh)
            name = (successor.name.key_id, successor.name.version + 1) if successor else (None, 1)
            row, cipher = make_dek(kek, scope, suite, *name)
            found[at] = row
            fresh.deks.append(row)
        header = Header(suite=suite, scope_kind=scope.kind, key_id=row.name.key_id, key_version=row.name.version, framed=True)
        return SealingKey(row.name.key_id, row.name.version, suite, header.prefix(), cipher)

    async def _kek(self, tenant: Tenant, fresh: Fresh) -> Kek:
        """The tenant's newest KEK, made if there is none. A tenant that is not active never gets one."""
        if tenant.state != TenantState.ACTIVE:
            raise KeyUnavailable("a tenant that is not active gets no key")
        if not tenant.keks:
            kek, row = await self._keys.make_kek(tenant.id, tenant.generation)
            tenant.keks[kek.version] = kek
            fresh.keks.append(row)
        return tenant.keks[max(tenant.keks)]


def scope_of(tenant: str, stream: Stream, kind: ScopeKind) -> Scope:
    """The scope that a stream's key belongs to."""
    if kind is ScopeKind.TENANT:
        return Scope.of_tenant(tenant)
    return Scope(tenant=tenant, kind=kind, id=stream.stream_class if kind is ScopeKind.CLASS else stream.id)
