-- Version 6.

-- Facts about a quota besides its counter. If an upgrade fails, a process of the earlier version continues to write to this
-- file, so the table of counters must keep its columns. A quota without such facts has no row.
CREATE TABLE quota_facts (
    environment     TEXT NOT NULL,
    scope           TEXT NOT NULL,
    name            TEXT NOT NULL,
    kind            TEXT NOT NULL,
    per_ms          INTEGER NOT NULL,
    "window"        TEXT NOT NULL,
    excess          INTEGER NOT NULL, -- the used amount that a lower limit has cut off
    excess_until_ms INTEGER NOT NULL, -- until when it counts again if the limit is raised
    is_removed      INTEGER NOT NULL, -- 1: the config of the process that wrote the row did not have the quota
    PRIMARY KEY (environment, scope, name, kind, per_ms, "window")
) WITHOUT ROWID;
