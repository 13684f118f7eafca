-- Version 2.

-- How far prompt estimates were off, so that what was learned outlives the process.
CREATE TABLE calibration (
    upstream TEXT NOT NULL,
    model    TEXT NOT NULL, -- as the requests name it
    kind     TEXT NOT NULL, -- plain, tools or images
    answers  TEXT NOT NULL, -- the last ones, oldest first: prompt tokens estimated:reported, between spaces
    PRIMARY KEY (upstream, model, kind)
) WITHOUT ROWID;

-- Overrides tell quotas that roll from those of the calendar, which may be as long: a month and 30 days.
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
-- An older one is of the quota that was written like that.
INSERT OR REPLACE INTO limit_override
    SELECT environment, scope, name, kind, per_ms,
           coalesce("window", CASE WHEN per_ms < 86400000 THEN 'rolling' ELSE 'calendar' END),
           per, limit_override_1."limit", burst
    FROM limit_override_1 LEFT JOIN quota USING (environment, scope, name, kind, per_ms, per);
DROP TABLE limit_override_1;

-- Of a calendar quota: the end of its period, which a change of its time zone would not tell otherwise.
ALTER TABLE quota ADD COLUMN until_ms INTEGER NOT NULL DEFAULT 0;
