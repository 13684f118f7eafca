-- Version 4.

-- Rolling quotas: what was settled in the current period of the clock, and when that period began. An unlimited quota has
-- the limit 0.
ALTER TABLE quota ADD COLUMN clock_used INTEGER NOT NULL DEFAULT 0;
ALTER TABLE quota ADD COLUMN clock_at_ms INTEGER NOT NULL DEFAULT 0;

-- Overrides: who set one, when, until when, and why. The limit 0 is unlimited. `since_ms` 0: not known.
ALTER TABLE limit_override ADD COLUMN set_by TEXT NOT NULL DEFAULT '';
ALTER TABLE limit_override ADD COLUMN since_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE limit_override ADD COLUMN until_ms INTEGER; -- NULL: until it is deleted
ALTER TABLE limit_override ADD COLUMN reason TEXT;

-- Whether quotas are enforced, where an administrator has set it.
CREATE TABLE enforce_override (
    environment TEXT PRIMARY KEY,
    enforce     INTEGER NOT NULL, -- 0: shadow mode
    set_by      TEXT NOT NULL,
    since_ms    INTEGER NOT NULL,
    until_ms    INTEGER,
    reason      TEXT
) WITHOUT ROWID;
