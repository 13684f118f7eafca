-- Version 6.

-- What is left to remember of a quota besides its counter. A table of its own, because a process of an earlier version can
-- still write to the table of counters, if it is not replaced after all. A quota without such facts has no row.
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
