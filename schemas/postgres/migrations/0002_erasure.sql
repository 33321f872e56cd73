-- Migration 2: what a shred leaves to do and to show. kind: expand
-- Everything here is the control plane's; the data plane reads seal_epochs, erased_refs and shred_barriers.

-- ── seal epochs ─────────────────────────────────────────────────────────────────────────────────────────────────────
CREATE TABLE seal_epochs (                       -- a version of a KMS key, or one of successive keys, that wraps tenant keys
  kms_uri TEXT NOT NULL, kms_key_version TEXT NOT NULL,
  state TEXT NOT NULL DEFAULT 'active' CHECK (state IN ('active','retiring','retired','destroying','destroyed')),
  tenant_id TEXT,                                -- of a dedicated key: whose
  created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
  retiring_at TIMESTAMPTZ, retired_at TIMESTAMPTZ,               -- no new KEK under it; no surviving KEK under it
  backup_confirmed_at TIMESTAMPTZ, backup_confirmed_by TEXT,     -- a keystore backup from after retired_at exists
  destroy_requested_at TIMESTAMPTZ, destroy_expected_at TIMESTAMPTZ,   -- expected: what the KMS announces; it can still be cancelled
  destroyed_at TIMESTAMPTZ, irrecoverable_at TIMESTAMPTZ,        -- only once the KMS itself says destroyed
  PRIMARY KEY (kms_uri, kms_key_version)
);
ALTER TABLE tenant_keys ADD COLUMN dedicated BOOLEAN NOT NULL DEFAULT false;   -- wrapped by a KMS key of this tenant alone
ALTER TABLE erased_scopes ALTER COLUMN fingerprints SET STORAGE EXTERNAL;   -- hashes do not compress, and of a class there may be a million
ALTER TABLE erased_scopes ADD COLUMN below_kek INT;   -- every KEK that ever wrapped its keys has a lower version; NULL: the newest one may have
CREATE INDEX tenant_keys_epoch ON tenant_keys (kms_uri, kms_key_version) WHERE wrapped IS NOT NULL;
CREATE INDEX erased_scopes_pending ON erased_scopes (tenant_id) WHERE below_kek IS NULL;
INSERT INTO seal_epochs (kms_uri, kms_key_version, created_at) SELECT kms_uri, kms_key_version, min(created_at) FROM tenant_keys GROUP BY 1, 2;

-- Whoever stores a wrapped KEK shares the epoch's row until the end of the transaction. The roller's `retiring` waits for the sharers
-- and is seen by all who come later, so its scan finds every KEK that the old version wraps. 40001: wrap again, under the current one.
CREATE FUNCTION share_seal_epoch() RETURNS TRIGGER LANGUAGE plpgsql AS $$
DECLARE stands TEXT;
BEGIN
  IF NOT EXISTS (SELECT FROM seal_epochs e WHERE e.kms_uri = NEW.kms_uri AND e.kms_key_version = NEW.kms_key_version) THEN
    INSERT INTO seal_epochs (kms_uri, kms_key_version, tenant_id)
      VALUES (NEW.kms_uri, NEW.kms_key_version, CASE WHEN NEW.dedicated THEN NEW.tenant_id END) ON CONFLICT DO NOTHING;
  END IF;
  SELECT e.state INTO stands FROM seal_epochs e
    WHERE e.kms_uri = NEW.kms_uri AND e.kms_key_version = NEW.kms_key_version AND coalesce(e.tenant_id, NEW.tenant_id) = NEW.tenant_id FOR SHARE;
  IF TG_OP = 'UPDATE' AND stands = 'retiring' THEN
    IF NEW.kms_key_version = OLD.kms_key_version THEN
      RETURN NEW;                                  -- back from quarantine, where the roller counted it all the while
    END IF;
  END IF;
  -- Out of quarantine a KEK may come back under a version that is retiring: what is in there keeps that from being retired.
  IF stands IS DISTINCT FROM 'active' AND NOT (stands = 'retiring' AND TG_OP = 'UPDATE' AND OLD.wrapped IS NULL) THEN
    RAISE EXCEPTION 'the seal epoch is over' USING ERRCODE = '40001';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER seal_epoch BEFORE INSERT OR UPDATE OF wrapped, kms_key_version ON tenant_keys
  FOR EACH ROW WHEN (NEW.wrapped IS NOT NULL) EXECUTE FUNCTION share_seal_epoch();

-- ── shreds ──────────────────────────────────────────────────────────────────────────────────────────────────────────
CREATE TABLE quarantined_keys (                  -- within a grace: bytes that nobody may use, until they are destroyed
  command_id UUID NOT NULL, tenant_id TEXT NOT NULL, generation INT NOT NULL, kek_version INT,
  key_id UUID, key_version INT, wrapped BYTEA NOT NULL, until TIMESTAMPTZ NOT NULL,
  was TEXT NOT NULL CHECK (was IN ('active','retired'))         -- what it is again if the scope is brought back
);
CREATE INDEX quarantined_keys_command ON quarantined_keys (command_id);
CREATE INDEX quarantined_keys_tenant ON quarantined_keys (tenant_id);

CREATE TABLE residue (                           -- where copies outlive the keys: one job each, watched to its end
  command_id UUID NOT NULL, kind TEXT NOT NULL, place TEXT NOT NULL,
  state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending','done')),
  until TIMESTAMPTZ,                             -- when it ends by itself; NULL: not known, or nobody set an end
  details JSONB NOT NULL DEFAULT '{}', attempts INT NOT NULL DEFAULT 0, next_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  created_at TIMESTAMPTZ NOT NULL DEFAULT now(), done_at TIMESTAMPTZ,
  PRIMARY KEY (command_id, kind, place)
);
CREATE INDEX residue_pending ON residue (next_at) WHERE state = 'pending';

-- A view's topic holds what any of its matches ever put there, under the key of that time. As an array of one, to be appended or looked for:
-- a match whose globs are all among those of another adds nothing to it, which is what @> tells.
ALTER TABLE views ADD COLUMN earlier JSONB NOT NULL DEFAULT '[]';
CREATE FUNCTION view_was(v views) RETURNS JSONB LANGUAGE sql STABLE
  RETURN jsonb_build_array(jsonb_build_object('topic', v.topic, 'key', v.key_mode, 'match', v.definition->'match'));

-- of a readmitted tenant or scope, what its late records are refused by
CREATE INDEX shred_barriers_tenant ON shred_barriers (tenant_id);
CREATE INDEX erased_scopes_command ON erased_scopes (tenant_id, command_id);
CREATE INDEX erased_scopes_readmitted ON erased_scopes (tenant_id) WHERE readmitted_at IS NOT NULL;

-- ── legal holds ─────────────────────────────────────────────────────────────────────────────────────────────────────
ALTER TABLE legal_holds ADD COLUMN released_by TEXT;
CREATE INDEX legal_holds_in_force ON legal_holds (tenant_id) WHERE released_at IS NULL;

-- ── ledger ──────────────────────────────────────────────────────────────────────────────────────────────────────────
CREATE TABLE ledger (                            -- the entries that this database has; those not yet published are the topic's outbox
  seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, entry_id UUID NOT NULL UNIQUE, command_id UUID NOT NULL, tenant_ref BYTEA NOT NULL,
  envelope BYTEA NOT NULL, created_at TIMESTAMPTZ NOT NULL DEFAULT now(), published_at TIMESTAMPTZ
);
CREATE INDEX ledger_tenant ON ledger (tenant_ref, seq);
CREATE INDEX ledger_command ON ledger (command_id);   -- a command that comes again after a restore
CREATE INDEX ledger_unpublished ON ledger (seq) WHERE published_at IS NULL;
CREATE TABLE ledger_watermark (                  -- up to where this database has the topic's entries, and which server it was on
  only_row BOOLEAN PRIMARY KEY DEFAULT true CHECK (only_row),
  deployment TEXT, topic_id TEXT, next_offset BIGINT NOT NULL DEFAULT 0, system_identifier TEXT, timeline INT, replayed_at TIMESTAMPTZ
);
INSERT INTO ledger_watermark DEFAULT VALUES;
CREATE TABLE control_cursors (                   -- up to where the control topic's records are in this database: what was acked beyond is read again
  topic_id TEXT NOT NULL, partition INT NOT NULL, next_offset BIGINT NOT NULL, PRIMARY KEY (topic_id, partition)
);
CREATE TABLE erased_refs (                       -- streams, classes and subjects that the ledger has entries of, and this database no name (yet)
  ref BYTEA PRIMARY KEY, tenant_ref BYTEA NOT NULL, scope_kind TEXT NOT NULL, command_id UUID NOT NULL, erased_at TIMESTAMPTZ NOT NULL
);
CREATE INDEX erased_refs_tenant ON erased_refs (tenant_ref, scope_kind);
CREATE TABLE foretold (                          -- of those the ones whose name came up: the data plane asks, the control plane applies the entries
  tenant_id TEXT NOT NULL, scope_kind TEXT NOT NULL, scope_id TEXT NOT NULL, asked_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, scope_kind, scope_id)
);
-- The pseudonyms of core/audit.py: the first 16 bytes of SHA-256 over the parts, each behind its length.
CREATE FUNCTION lp(part TEXT) RETURNS BYTEA LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
  RETURN int4send(length(convert_to(part, 'UTF8'))) || convert_to(part, 'UTF8');
CREATE FUNCTION tenant_ref(tenant TEXT) RETURNS BYTEA LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
  RETURN substring(sha256(lp('ks/tenant-ref/v1') || lp(tenant)) FOR 16);
CREATE FUNCTION scope_ref(tenant TEXT, kind TEXT, id TEXT) RETURNS BYTEA LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
  RETURN substring(sha256(lp('ks/scope-ref/v1') || lp(tenant) || lp(kind) || lp(id)) FOR 16);
CREATE INDEX tenants_ref ON tenants (tenant_ref(tenant_id));
-- A readmitted tenant gets new keys beside the ones of its older generations, whose rows stay as they were.
DROP INDEX one_active_key;
CREATE UNIQUE INDEX one_active_key ON encryption_keys (tenant_id, scope_kind, scope_id, generation) WHERE is_active;

-- ── persons' keys ───────────────────────────────────────────────────────────────────────────────────────────────────
ALTER TABLE encryption_keys ADD COLUMN used_outside BOOLEAN NOT NULL DEFAULT false;   -- the library sealed with it what stands in another store: no clean-up
ALTER TABLE encryption_keys ADD COLUMN outside_class TEXT;   -- the class of that stream, which has no row among `streams` until its first event here
CREATE INDEX encryption_keys_outside ON encryption_keys (tenant_id, outside_class) WHERE outside_class IS NOT NULL;
CREATE INDEX stream_key_history_key ON stream_key_history (tenant_id, key_id);   -- which streams hold events of a key: a person's, a shared one's

CREATE INDEX encryption_keys_retired ON encryption_keys (tenant_id, key_id, key_version) WHERE NOT is_active AND NOT is_destroyed;   -- what a clean-up looks at
CREATE INDEX encryption_keys_by_age ON encryption_keys (created_at) WHERE is_active;   -- which of them are too old is asked every minute

-- ── evidence ────────────────────────────────────────────────────────────────────────────────────────────────────────
CREATE TABLE certificates (
  certificate_id UUID PRIMARY KEY, command_id UUID NOT NULL, status TEXT NOT NULL, envelope BYTEA NOT NULL, salt BYTEA NOT NULL,
  created_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX certificates_command ON certificates (command_id, status);
CREATE INDEX receipts_of_shreds ON receipts (created_at) WHERE status IN ('inaccessible', 'complete');
CREATE TABLE audit_checkpoints (                 -- signed heads of all chains; also on a topic, where nobody can take one back
  checkpoint_id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at TIMESTAMPTZ NOT NULL, heads JSONB NOT NULL, envelope BYTEA NOT NULL,
  published_at TIMESTAMPTZ
);

CREATE INDEX audit_log_at ON audit_log (at);   -- reports are about a span of time

-- ── who holds the guard ─────────────────────────────────────────────────────────────────────────────────────────────
ALTER TABLE instances ADD COLUMN kind TEXT NOT NULL DEFAULT 'data';   -- data | worker | reader
