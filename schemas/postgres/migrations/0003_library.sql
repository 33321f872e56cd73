-- Migration 3: appends from inside an application, and consumers of the store. kind: expand

CREATE INDEX dead_letters_sealed ON dead_letters (tenant_id) WHERE value_encrypted IS NOT NULL;   -- clean-up asks which keys they need

-- One append, in one call: guard, tenant state, fences, the stream's row, its head, the rows. Locks are the transaction's.
-- `expected`: a version (0: no stream yet), -1 any, -2 the stream exists. `epoch`: the tenant's, as of which the caller knows policy, keys and
-- what is erased (0: there was no tenant yet); NULL from a caller that knows nothing of them, and appends plain events. `noted`: the caller
-- knows that at `expected` the key version of all these envelopes was the one on the stream's record.
-- Raises KS002 refused, KS003 the tenant or its policy has changed since (reload the keys), KS004 plaintext for an encrypted stream,
-- KS005 the stream is not at the expected version, KS006 the ledger has entries of a name that is new here: ask, wait. A unique violation means that the data plane wrote in between: try again.
CREATE FUNCTION append_events(
  stripe INT, tenant TEXT, stream TEXT, stream_class TEXT, expected BIGINT, epoch BIGINT, policies BIGINT, noted BOOLEAN,
  ids TEXT[], types TEXT[], schema_versions INT[], occurred TIMESTAMPTZ[], plain BYTEA[], sealed BYTEA[], attributes JSONB[], tombstones BOOLEAN[],
  OUT first BIGINT, OUT last BIGINT, OUT created BOOLEAN
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE t RECORD; s RECORD; is_sealed BOOLEAN := sealed[1] IS NOT NULL; head BIGINT;
BEGIN
  PERFORM pg_advisory_xact_lock_shared(1, stripe);
  SELECT x.state, x.epoch, CASE WHEN policies IS NOT NULL THEN (SELECT p.version FROM policy_version p) END AS policies INTO t
    FROM tenants x WHERE x.tenant_id = tenant;
  IF NOT FOUND THEN
    IF epoch > 0 THEN RAISE EXCEPTION 'the tenant is gone' USING ERRCODE = 'KS003'; END IF;
    IF EXISTS (SELECT FROM ledger l WHERE l.tenant_ref = tenant_ref(tenant)) THEN
      RAISE EXCEPTION 'the ledger knows the tenant' USING ERRCODE = 'KS006';
    END IF;
    INSERT INTO tenants (tenant_id) VALUES (tenant) ON CONFLICT DO NOTHING;
    t.policies := (SELECT p.version FROM policy_version p);
  ELSIF t.state <> 'active' THEN
    RAISE EXCEPTION 'tenant_shredded' USING ERRCODE = 'KS002';
  ELSIF epoch IS NOT NULL AND t.epoch <> epoch THEN
    RAISE EXCEPTION 'the tenant epoch moved' USING ERRCODE = 'KS003';
  END IF;
  IF policies <> t.policies THEN
    RAISE EXCEPTION 'the policies changed' USING ERRCODE = 'KS003';
  END IF;
  SELECT x.position, x.stream_type_class, x.is_encrypted INTO s FROM streams x WHERE x.tenant_id = tenant AND x.stream_id = stream FOR UPDATE;
  created := NOT FOUND;
  IF created THEN
    IF expected = -2 OR expected > 0 THEN RAISE EXCEPTION 'there is no stream yet' USING ERRCODE = 'KS005'; END IF;
    IF EXISTS (SELECT FROM erased_refs r WHERE r.ref IN (scope_ref(tenant, 'stream', stream), scope_ref(tenant, 'class', stream_class))) THEN
      RAISE EXCEPTION 'the ledger knows the stream or its class' USING ERRCODE = 'KS006';
    END IF;
    INSERT INTO streams (tenant_id, stream_id, stream_type_class, is_encrypted) VALUES (tenant, stream, stream_class, false) ON CONFLICT DO NOTHING;
    SELECT x.position, x.stream_type_class, x.is_encrypted INTO s FROM streams x WHERE x.tenant_id = tenant AND x.stream_id = stream FOR UPDATE;
  END IF;
  -- Every shred moves the epoch: who has the present one knows what is erased, but not of a stream that was made since.
  IF (epoch IS NULL OR created) AND EXISTS (SELECT FROM erased_scopes e WHERE e.tenant_id = tenant AND e.readmitted_at IS NULL
             AND (e.scope_kind = 'stream' AND e.scope_id = stream OR e.scope_kind = 'class' AND e.scope_id = s.stream_type_class)) THEN
    RAISE EXCEPTION 'scope_erased' USING ERRCODE = 'KS002';
  END IF;
  IF s.is_encrypted AND NOT is_sealed THEN
    RAISE EXCEPTION 'the stream is encrypted' USING ERRCODE = 'KS004';
  END IF;
  -- The data plane writes rows before `position`: only where that is what was expected does it need no look at the rows, of which a key is unique.
  IF expected = s.position THEN
    head := expected;
  ELSE
    head := greatest(s.position, coalesce((SELECT m.stream_position FROM messages m WHERE m.tenant_id = tenant AND m.stream_id = stream
                                           ORDER BY m.stream_position DESC LIMIT 1), 0));
  END IF;
  IF expected >= 0 AND expected <> head OR expected = -2 AND head = 0 THEN
    RAISE EXCEPTION 'the stream is at %', head USING ERRCODE = 'KS005';
  END IF;
  INSERT INTO messages (tenant_id, stream_id, stream_position, message_id, message_type, schema_version, occurred_at, data, data_encrypted, metadata, is_tombstone)
    SELECT tenant, stream, head + x.n, x.id, x.type, x.version, x.at, x.plain, x.sealed, x.attributes, x.tombstone
    FROM unnest(ids, types, schema_versions, occurred, append_events.plain, append_events.sealed, append_events.attributes, tombstones)
      WITH ORDINALITY x(id, type, version, at, plain, sealed, attributes, tombstone, n);
  first := head + 1;
  last := head + cardinality(ids);
  IF is_sealed AND NOT coalesce(noted AND s.is_encrypted, false) THEN
    PERFORM note_keys(tenant, stream, first, append_events.sealed);
  END IF;
  UPDATE streams x SET position = last WHERE x.tenant_id = tenant AND x.stream_id = stream;
END $$;

-- Which positions a key version sealed, and that the stream is encrypted: read off the envelopes' headers (key id at byte 5, version at 21).
-- Of a key that a whole stream, class or tenant shares one version is in use at a time; of persons' keys as many as there are persons.
CREATE FUNCTION note_keys(tenant TEXT, stream TEXT, first BIGINT, sealed BYTEA[]) RETURNS VOID LANGUAGE plpgsql AS $$
DECLARE k RECORD;
BEGIN
  -- All under the key version that the stream's last events were sealed with, as nearly always: nothing to note.
  IF NOT EXISTS (SELECT FROM unnest(sealed) x(e) WHERE substring(x.e FOR 25) <> substring(sealed[1] FOR 25))
     AND EXISTS (SELECT FROM stream_key_history h WHERE h.tenant_id = tenant AND h.stream_id = stream AND h.used_to_position IS NULL
                 AND h.key_id = encode(substring(sealed[1] FROM 6 FOR 16), 'hex')::uuid
                 AND h.key_version = (get_byte(sealed[1], 21)::bigint << 24 | get_byte(sealed[1], 22) << 16 | get_byte(sealed[1], 23) << 8 | get_byte(sealed[1], 24))::int)
  THEN
    RETURN;
  END IF;
  FOR k IN
    SELECT encode(substring(x.e FROM 6 FOR 16), 'hex')::uuid AS id,
      (get_byte(x.e, 21)::bigint << 24 | get_byte(x.e, 22) << 16 | get_byte(x.e, 23) << 8 | get_byte(x.e, 24))::int AS version,
      get_byte(x.e, 3) AS suite, get_byte(x.e, 4) & 3 AS scope, first - 1 + min(x.n) AS used_from
    FROM unnest(sealed) WITH ORDINALITY x(e, n) GROUP BY 1, 2, 3, 4 ORDER BY 5
  LOOP
    CONTINUE WHEN EXISTS (SELECT FROM stream_key_history h WHERE h.tenant_id = tenant AND h.stream_id = stream
                          AND h.key_id = k.id AND h.key_version = k.version AND h.used_to_position IS NULL);
    UPDATE stream_key_history h SET used_to_position = k.used_from - 1
      WHERE h.tenant_id = tenant AND h.stream_id = stream AND h.used_to_position IS NULL
        AND (k.scope <> 3 OR h.key_id = k.id OR EXISTS (SELECT FROM streams x WHERE x.tenant_id = tenant AND x.stream_id = stream
                                                        AND x.encryption_key_id = h.key_id));
    INSERT INTO stream_key_history (tenant_id, stream_id, key_id, key_version, used_from_position) VALUES (tenant, stream, k.id, k.version, k.used_from);
    UPDATE streams x SET is_encrypted = true, encrypted_from_position = coalesce(x.encrypted_from_position, first),
        encryption_key_id = CASE WHEN k.scope = 3 THEN NULL ELSE k.id END,
        encryption_algorithm = CASE k.suite WHEN 1 THEN 'AES-256-GCM' WHEN 2 THEN 'ChaCha20-Poly1305' ELSE 'AES-256-GCM-SIV' END,
        key_rotation_count = x.key_rotation_count + (x.is_encrypted AND k.scope <> 3)::int,
        last_key_rotation = CASE WHEN x.is_encrypted AND k.scope <> 3 THEN now() ELSE x.last_key_rotation END
      WHERE x.tenant_id = tenant AND x.stream_id = stream;
  END LOOP;
END $$;

CREATE TABLE policy_history (                    -- what was decided when, by whom and why
  policy_id TEXT NOT NULL, policy_version BIGINT NOT NULL, definition JSONB NOT NULL, deleted BOOLEAN NOT NULL DEFAULT false,
  actor TEXT NOT NULL, reason TEXT NOT NULL, at TIMESTAMPTZ NOT NULL, PRIMARY KEY (policy_id, policy_version)
);

CREATE TABLE consumer_checkpoints (              -- where a consumer of the store stands: behind which (transaction, global position)
  consumer TEXT PRIMARY KEY, transaction_id XID8 NOT NULL DEFAULT '0', global_position BIGINT NOT NULL DEFAULT 0,
  listening_until TIMESTAMPTZ NOT NULL DEFAULT '-infinity', updated_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE TABLE consumer_set_aside (                -- events that a consumer's handler cannot digest: named, and passed over
  consumer TEXT NOT NULL REFERENCES consumer_checkpoints ON DELETE CASCADE, tenant_id TEXT NOT NULL, stream_id TEXT NOT NULL, stream_position BIGINT NOT NULL,
  error TEXT NOT NULL, at TIMESTAMPTZ NOT NULL DEFAULT now(), PRIMARY KEY (consumer, tenant_id, stream_id, stream_position)
);
CREATE TABLE imports (                           -- how far another event table is taken over: behind which of its rows, in the order of its map
  name TEXT PRIMARY KEY, source_table TEXT NOT NULL, ordered_by TEXT[] NOT NULL, after TEXT[],
  imported BIGINT NOT NULL DEFAULT 0, refused BIGINT NOT NULL DEFAULT 0,
  started_at TIMESTAMPTZ NOT NULL DEFAULT now(), updated_at TIMESTAMPTZ NOT NULL DEFAULT now(), verified_at TIMESTAMPTZ
);
-- A wake-up per statement, and only while somebody listens: a notification serialises commits.
CREATE FUNCTION notify_consumers() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT FROM consumer_checkpoints WHERE listening_until > clock_timestamp()) THEN
    PERFORM pg_notify('sidecar_messages', '');
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER wake_consumers AFTER INSERT ON messages FOR EACH STATEMENT EXECUTE FUNCTION notify_consumers();

-- The tenant's guard, shared, until the end of the transaction, and then its epoch and the policies' as they stand under it. VOLATILE, as begin_batch.
CREATE FUNCTION guarded(stripe INT, tenant TEXT, OUT epoch BIGINT, OUT policies BIGINT) LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  PERFORM pg_advisory_xact_lock_shared(1, stripe);
  SELECT t.epoch INTO epoch FROM tenants t WHERE t.tenant_id = tenant;
  SELECT p.version INTO policies FROM policy_version p;
END $$;
