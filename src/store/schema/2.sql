-- Version 2.

-- The calibrations of prompt estimates, so that they survive a restart.
CREATE TABLE calibration (
    upstream TEXT NOT NULL,
    model    TEXT NOT NULL, -- the model name of the requests
    kind     TEXT NOT NULL, -- plain, tools or images
    answers  TEXT NOT NULL, -- the last answers, oldest first, separated by spaces: estimated:reported prompt tokens
    PRIMARY KEY (upstream, model, kind)
) WITHOUT ROWID;

-- Overrides get the column "window", because a rolling and a calendar quota can have the same length: a month and 30 days.
ALTER TABLE limit_override RENAME TO limit_override_1;
CREATE TABLE limit_override (
    environment TEXT NOT NULL,
    scope       TEXT NOT NULL,
    name        TEXT NOT NULL,
    kind        TEXT NOT NULL,
    per_ms      INTEGER NOT NULL,
    "window"    TEXT NOT NULL,    -- rolling or calendar
    per         TEXT NOT NULL,
    "limit"     INTEGER NOT NULL,
    burst       INTEGER NOT NULL,
    PRIMARY KEY (environment, scope, name, kind, per_ms, "window")
) WITHOUT ROWID;
-- An existing override belongs to the quota with the same spelling of the period.
INSERT OR REPLACE INTO limit_override
    SELECT environment, scope, name, kind, per_ms,
           coalesce("window", CASE WHEN per_ms < 86400000 THEN 'rolling' ELSE 'calendar' END),
           per, limit_override_1."limit", burst
    FROM limit_override_1 LEFT JOIN quota USING (environment, scope, name, kind, per_ms, per);
DROP TABLE limit_override_1;

-- Calendar quotas: the end of the period. It cannot be computed from `at_ms` after a change of the time zone.
ALTER TABLE quota ADD COLUMN until_ms INTEGER NOT NULL DEFAULT 0;
