-- Migration 5: fields of a document that are sealed one by one. kind: expand

-- Both are set: `data` is the document with `ks1.…` strings for its sealed fields, `data_encrypted` the envelope of everything else about the event.
ALTER TABLE messages DROP CONSTRAINT messages_check;
ALTER TABLE messages ADD CONSTRAINT messages_hold_something CHECK (data IS NOT NULL OR data_encrypted IS NOT NULL OR is_tombstone);

-- ── blind index ─────────────────────────────────────────────────────────────────────────────────────────────────────────
ALTER TABLE encryption_policies ADD COLUMN blind_index TEXT[];   -- of `fields`, those whose values can be searched for
CREATE TABLE blind_index (                       -- which events hold a value: a token tells equality within the tenant, and nothing else
  tenant_id TEXT NOT NULL, token BYTEA NOT NULL, stream_id TEXT NOT NULL, stream_position BIGINT NOT NULL,
  PRIMARY KEY (tenant_id, token, stream_id, stream_position)
);
CREATE INDEX blind_index_event ON blind_index (tenant_id, stream_id, stream_position);   -- a shred removes by event
-- No row outlives its event, whoever deletes that: a shred finds a row by its event's key.
CREATE FUNCTION forget_values() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM blind_index b USING gone g WHERE b.tenant_id = g.tenant_id AND b.stream_id = g.stream_id AND b.stream_position = g.stream_position;
  RETURN NULL;
END $$;
CREATE TRIGGER forget_values AFTER DELETE ON messages REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION forget_values();
