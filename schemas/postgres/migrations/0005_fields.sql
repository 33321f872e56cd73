-- Migration 5: fields of a document that are sealed one by one. kind: expand

-- Both are set: `data` is the document with `ks1.…` strings for its sealed fields, `data_encrypted` the envelope of everything else about the event.
ALTER TABLE messages DROP CONSTRAINT messages_check;
ALTER TABLE messages ADD CONSTRAINT messages_hold_something CHECK (data IS NOT NULL OR data_encrypted IS NOT NULL OR is_tombstone);
