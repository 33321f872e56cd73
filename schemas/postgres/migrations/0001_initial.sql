-- Migration 1: the whole store. kind: expand
-- tenant_id leads the primary keys, so that data can be distributed or partitioned by tenant.
-- A key is (tenant_id, key_id, key_version); key_material is NULL once destroyed: destroyed means gone.

CREATE TABLE tenants (
  tenant_id   TEXT PRIMARY KEY,
  state       TEXT NOT NULL DEFAULT 'active' CHECK (state IN ('active','shredding','shredded')),
  generation  INT  NOT NULL DEFAULT 1,           -- +1 by readmit only
  epoch       BIGINT NOT NULL DEFAULT 1,         -- +1 by every shred, rotation, hold or policy change that concerns the tenant; batches verify it under the guard
  created_at  TIMESTAMPTZ NOT NULL DEFAULT now()
);

CREATE TABLE tenant_keys (                       -- KEKs
  tenant_id TEXT NOT NULL REFERENCES tenants, generation INT NOT NULL, kek_version INT NOT NULL,
  kms_uri TEXT NOT NULL, kms_key_version TEXT NOT NULL,          -- the seal epoch that wraps it
  wrapped BYTEA,                                                 -- NULL once destroyed
  fingerprint BYTEA NOT NULL,                                    -- SHA-256 over the commitment; outlives the key
  state TEXT NOT NULL CHECK (state IN ('active','retired','destroyed')),
  created_at TIMESTAMPTZ NOT NULL DEFAULT now(), destroyed_at TIMESTAMPTZ,
  PRIMARY KEY (tenant_id, generation, kek_version)
);

CREATE TABLE encryption_keys (                   -- DEKs
  tenant_id TEXT NOT NULL, key_id UUID NOT NULL, key_version INT NOT NULL DEFAULT 1,
  scope_kind TEXT NOT NULL CHECK (scope_kind IN ('stream','class','tenant','subject')), scope_id TEXT NOT NULL,
  generation INT NOT NULL, kek_version INT NOT NULL,
  key_material BYTEA,                                            -- wrapped by the KEK; NULL once destroyed
  commitment BYTEA NOT NULL,
  uses_reserved BIGINT NOT NULL DEFAULT 0,
  is_active BOOLEAN NOT NULL DEFAULT true, is_destroyed BOOLEAN NOT NULL DEFAULT false,
  created_at TIMESTAMPTZ NOT NULL DEFAULT now(), retired_at TIMESTAMPTZ, destroyed_at TIMESTAMPTZ,
  PRIMARY KEY (tenant_id, key_id, key_version)
);
CREATE UNIQUE INDEX one_active_key ON encryption_keys (tenant_id, scope_kind, scope_id) WHERE is_active;
CREATE INDEX encryption_keys_scope ON encryption_keys (tenant_id, scope_kind, scope_id, key_version);   -- retired versions too: a shred enumerates them

CREATE TABLE erased_scopes (                     -- the fence below tenant level; a row here means: never again a key, unless readmitted
  tenant_id TEXT NOT NULL, scope_kind TEXT NOT NULL, scope_id TEXT NOT NULL, command_id UUID NOT NULL,
  fingerprints BYTEA[] NOT NULL, erased_at TIMESTAMPTZ NOT NULL DEFAULT now(), readmitted_at TIMESTAMPTZ,
  PRIMARY KEY (tenant_id, scope_kind, scope_id, command_id)
);

CREATE TABLE encryption_policies (
  policy_id TEXT PRIMARY KEY, stream_type_class TEXT NOT NULL, tenant_id TEXT NOT NULL DEFAULT '*',   -- '*' is for tenants only; classes match exactly
  encryption_required BOOLEAN NOT NULL, encryption_algorithm TEXT, key_scope TEXT NOT NULL DEFAULT 'stream', fields TEXT[], subject TEXT,
  key_rotation_interval_days INT, version INT NOT NULL DEFAULT 1,
  created_at TIMESTAMPTZ NOT NULL DEFAULT now(), updated_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  UNIQUE (tenant_id, stream_type_class)
);

CREATE TABLE policy_version (only_row BOOLEAN PRIMARY KEY DEFAULT true CHECK (only_row), version BIGINT NOT NULL DEFAULT 1);   -- +1 by every policy change; verified with the tenant epochs

CREATE TABLE streams (
  tenant_id TEXT NOT NULL, stream_id TEXT NOT NULL,
  position BIGINT NOT NULL DEFAULT 0,            -- a hint; the truth is messages' primary key
  stream_type_class TEXT NOT NULL,               -- fixed by the first event
  is_encrypted BOOLEAN NOT NULL, encrypted_from_position BIGINT,   -- once encrypted, encrypted for good
  encryption_key_id UUID, encryption_algorithm TEXT, key_rotation_count INT NOT NULL DEFAULT 0, last_key_rotation TIMESTAMPTZ,
  created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, stream_id)
);

CREATE TABLE stream_key_history (
  tenant_id TEXT NOT NULL, stream_id TEXT NOT NULL, key_id UUID NOT NULL, key_version INT NOT NULL,
  used_from_position BIGINT NOT NULL, used_to_position BIGINT, created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, stream_id, key_id, key_version, used_from_position)
);

CREATE TABLE source_topics (                     -- a topic that was deleted and made again is another source
  source_id INT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, topic TEXT NOT NULL, topic_id TEXT NOT NULL, UNIQUE (topic, topic_id)
);

CREATE TABLE messages (
  tenant_id TEXT NOT NULL, stream_id TEXT NOT NULL, stream_position BIGINT NOT NULL,
  message_id TEXT NOT NULL, message_type TEXT NOT NULL, schema_version INT NOT NULL DEFAULT 1, occurred_at TIMESTAMPTZ,
  data BYTEA, data_encrypted BYTEA,              -- exactly one is set; storage EXTERNAL
  metadata JSONB,                                -- of plain events: headers and key; encrypted events carry theirs inside the envelope
  source_id INT, source_partition INT, source_offset BIGINT,   -- NULL for library appends; no foreign keys on this table, they cost a trigger per row
  global_position BIGINT GENERATED ALWAYS AS IDENTITY, transaction_id XID8 NOT NULL DEFAULT pg_current_xact_id(),   -- readers order by both, up to pg_snapshot_xmin
  created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  is_tombstone BOOLEAN NOT NULL DEFAULT false,   -- the source value was null; of encrypted events the sealed attributes say so too
  PRIMARY KEY (tenant_id, stream_id, stream_position),
  CHECK (num_nonnulls(data, data_encrypted) = 1 OR (is_tombstone AND data_encrypted IS NULL))
);
CREATE UNIQUE INDEX messages_source ON messages (source_id, source_partition, source_offset);   -- add tenant_id where the table is distributed by tenant
CREATE INDEX messages_global ON messages (transaction_id, global_position);

ALTER TABLE messages ALTER COLUMN data SET STORAGE EXTERNAL, ALTER COLUMN data_encrypted SET STORAGE EXTERNAL;   -- ciphertext does not compress

CREATE TABLE partition_leases (
  source_id INT NOT NULL REFERENCES source_topics, partition INT NOT NULL, epoch BIGINT NOT NULL DEFAULT 0, owner TEXT, next_offset BIGINT NOT NULL DEFAULT 0,
  PRIMARY KEY (source_id, partition)
);
CREATE TABLE instances (
  instance_id TEXT PRIMARY KEY, transactional_id TEXT NOT NULL UNIQUE, guard_pid INT, guard_started TIMESTAMPTZ,
  state TEXT NOT NULL CHECK (state IN ('running','stopped','fenced')), heartbeat_at TIMESTAMPTZ NOT NULL
);
CREATE TABLE commands (
  command_id UUID PRIMARY KEY, op TEXT NOT NULL, tenant_id TEXT, payload BYTEA NOT NULL, payload_sha256 BYTEA NOT NULL, issuer TEXT,
  status TEXT NOT NULL, step TEXT, result JSONB, receipt JSONB, received_at TIMESTAMPTZ NOT NULL DEFAULT now(), finished_at TIMESTAMPTZ
);
CREATE TABLE audit_log (                         -- one chain per writer; checkpoints sign all heads; a batch that makes 500 keys is one row naming 500 key ids
  writer TEXT NOT NULL, seq BIGINT NOT NULL, at TIMESTAMPTZ NOT NULL, action TEXT NOT NULL, actor TEXT NOT NULL, tenant_ref BYTEA, details JSONB NOT NULL,
  prev_hash BYTEA NOT NULL, hash BYTEA NOT NULL, PRIMARY KEY (writer, seq)
);
CREATE TABLE dead_letters (                      -- without a valid tenant there is no key: hash and coordinates only
  id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, source_id INT, partition INT, "offset" BIGINT, reason TEXT NOT NULL,
  tenant_id TEXT, value_sha256 BYTEA, value_encrypted BYTEA, at TIMESTAMPTZ NOT NULL DEFAULT now(),
  UNIQUE (source_id, partition, "offset")
);
CREATE TABLE refusals (
  source_id INT NOT NULL, partition INT NOT NULL, "offset" BIGINT NOT NULL, tenant_id TEXT, reason TEXT NOT NULL,
  at TIMESTAMPTZ NOT NULL DEFAULT now(), PRIMARY KEY (source_id, partition, "offset")
);
CREATE TABLE shred_barriers (                    -- source offsets below: refused for ever
  command_id UUID NOT NULL, tenant_id TEXT NOT NULL, source_id INT NOT NULL, partition INT NOT NULL, end_offset BIGINT NOT NULL,
  PRIMARY KEY (command_id, source_id, partition)
);
CREATE TABLE views (
  name TEXT PRIMARY KEY, topic TEXT NOT NULL, partitions INT NOT NULL, key_mode TEXT NOT NULL, definition JSONB NOT NULL,
  created_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE TABLE legal_holds (
  hold_id UUID PRIMARY KEY, tenant_id TEXT NOT NULL, scope_kind TEXT NOT NULL, scope_id TEXT NOT NULL, reason TEXT NOT NULL,
  placed_by TEXT NOT NULL, placed_at TIMESTAMPTZ NOT NULL DEFAULT now(), released_at TIMESTAMPTZ
);
CREATE TABLE receipts (                          -- the outbox of the receipts topic; a command has one row per status
  receipt_id UUID PRIMARY KEY, command_id UUID, status TEXT NOT NULL, body JSONB NOT NULL,
  created_at TIMESTAMPTZ NOT NULL DEFAULT now(), published_at TIMESTAMPTZ
);
CREATE INDEX receipts_command ON receipts (command_id, created_at);
CREATE INDEX receipts_unpublished ON receipts (created_at) WHERE published_at IS NULL;
CREATE INDEX commands_pending ON commands (received_at) WHERE finished_at IS NULL;

INSERT INTO policy_version DEFAULT VALUES;
INSERT INTO encryption_policies (policy_id, stream_type_class, tenant_id, encryption_required, encryption_algorithm, key_rotation_interval_days) VALUES
  ('default-user-personal-data', 'UserPersonalData', '*', true, 'AES-256-GCM', 90),
  ('default-audit-log', 'AuditLog', '*', true, 'AES-256-GCM', 365),
  ('default-form-submissions', 'FormSubmissions', '*', true, 'AES-256-GCM', 180),
  ('default-cart-data', 'CartData', '*', false, NULL, NULL);

-- The first call of a batch's transaction: guard, lease, tenant state, in one round trip.
-- VOLATILE on purpose: each statement in it then sees what was committed while the one before waited for a lock.
-- The locks are the session's: they outlive the transaction, until the batch's views are committed in Kafka.
-- Answers a row per known tenant, and one with a NULL tenant whose epoch is the policy version.
-- Raises KS001 (fenced) when a lease is not at the epoch and cursor that the caller remembers.
CREATE FUNCTION begin_batch(stripes INT[], source_ids INT[], partitions INT[], epochs BIGINT[], starts BIGINT[], ends BIGINT[], tenant_ids TEXT[])
RETURNS TABLE (tenant_id TEXT, state TEXT, generation INT, epoch BIGINT) LANGUAGE plpgsql VOLATILE AS $$
DECLARE moved INT;
BEGIN
  PERFORM pg_advisory_lock_shared(1, s) FROM unnest(stripes) s;
  UPDATE partition_leases l SET next_offset = x.e
    FROM unnest(source_ids, partitions, epochs, starts, ends) x(source, part, ep, s, e)
    WHERE l.source_id = x.source AND l.partition = x.part AND l.epoch = x.ep AND l.next_offset = x.s;
  GET DIAGNOSTICS moved = ROW_COUNT;
  IF moved <> cardinality(source_ids) THEN
    RAISE EXCEPTION 'fenced: % of % leases held', moved, cardinality(source_ids) USING ERRCODE = 'KS001';
  END IF;
  RETURN QUERY SELECT NULL::TEXT, NULL::TEXT, NULL::INT, p.version FROM policy_version p
    UNION ALL SELECT t.tenant_id, t.state, t.generation, t.epoch FROM tenants t WHERE t.tenant_id = ANY (tenant_ids);
END $$;

-- Whoever keeps keys in memory hears at once that a tenant's changed; the epoch check of each batch is the guarantee.
CREATE FUNCTION notify_tenant_epoch() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('sidecar_tenant_epoch', NEW.tenant_id);
  RETURN NULL;
END $$;
CREATE TRIGGER tenant_epoch AFTER UPDATE OF epoch ON tenants FOR EACH ROW WHEN (NEW.epoch > OLD.epoch) EXECUTE FUNCTION notify_tenant_epoch();
