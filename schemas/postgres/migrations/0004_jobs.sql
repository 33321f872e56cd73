-- Migration 4: long jobs. kind: expand

ALTER TABLE streams ADD COLUMN own_key BOOLEAN NOT NULL DEFAULT false;   -- split off: sealed under a key of its own, whatever its policy's key scope is

CREATE TABLE jobs (                              -- chunks of re-encryptions: on the jobs topic, worked by any `sidecar worker`, each until it is done
  command_id UUID NOT NULL, chunk INT NOT NULL, tenant_id TEXT NOT NULL, streams TEXT[] NOT NULL, plain BOOLEAN NOT NULL, into_stream TEXT,
  suite INT, key_version INT,                    -- only events that are sealed so; NULL: whatever is not under the present key
  state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending','done')),
  attempts INT NOT NULL DEFAULT 0, resealed BIGINT NOT NULL DEFAULT 0, left_alone BIGINT NOT NULL DEFAULT 0, worker TEXT,
  created_at TIMESTAMPTZ NOT NULL DEFAULT now(), published_at TIMESTAMPTZ, done_at TIMESTAMPTZ,
  PRIMARY KEY (command_id, chunk)
);
CREATE INDEX commands_reencrypting ON commands (received_at) WHERE op = 'reencrypt' AND step = 'done' AND status = 'accepted';   -- whose chunks are watched
CREATE INDEX jobs_pending ON jobs (published_at) WHERE state = 'pending';
