-- The store of one node. All times are UTC. `minute` counts minutes since the Unix epoch.

-- The state of every quota at the last commit. If the process crashes, a restart counts `used + held` as used, so requests
-- in flight are charged in full.
CREATE TABLE quota (
    environment    TEXT NOT NULL,
    scope          TEXT NOT NULL,    -- environment, caller or model
    name           TEXT NOT NULL,    -- the caller's name, the model pattern, or empty
    kind           TEXT NOT NULL,    -- total_tokens, prompt_tokens, completion_tokens or requests
    per_ms         INTEGER NOT NULL, -- length of the period in milliseconds
    "window"       TEXT NOT NULL,    -- rolling or calendar
    per            TEXT NOT NULL,    -- the period as the config writes it
    "limit"        INTEGER NOT NULL,
    used           INTEGER NOT NULL, -- spent and not yet refilled
    level_fraction INTEGER NOT NULL, -- rolling quotas: the fraction of a token in the level, in units of 1/per_ms
    held           INTEGER NOT NULL, -- held by requests in flight
    at_ms          INTEGER NOT NULL, -- rolling quotas: time of the last refill; calendar quotas: start of the period
    PRIMARY KEY (environment, scope, name, kind, per_ms, "window")
) WITHOUT ROWID;

-- Totals since the store was created, and the amounts that requests in flight have reserved.
CREATE TABLE totals (
    environment       TEXT PRIMARY KEY,
    requests          INTEGER NOT NULL,
    rejected          INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    total_tokens      INTEGER NOT NULL,
    held_requests     INTEGER NOT NULL,
    held_prompt       INTEGER NOT NULL,
    held_completion   INTEGER NOT NULL,
    held_total        INTEGER NOT NULL
) WITHOUT ROWID;

-- Usage per minute, for the time of `store.history`.
CREATE TABLE usage (
    minute            INTEGER NOT NULL,
    environment       TEXT NOT NULL,
    model             TEXT NOT NULL, -- 'other': usage whose model is not recorded
    caller            TEXT NOT NULL, -- empty in an open environment
    requests          INTEGER NOT NULL,
    rejections        INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    total_tokens      INTEGER NOT NULL,
    PRIMARY KEY (minute, environment, model, caller)
) WITHOUT ROWID;

-- Usage per day, merged from minutes that are older than `store.history`.
CREATE TABLE usage_daily (
    day               INTEGER NOT NULL, -- days since the Unix epoch
    environment       TEXT NOT NULL,
    model             TEXT NOT NULL,
    caller            TEXT NOT NULL,
    requests          INTEGER NOT NULL,
    rejections        INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    total_tokens      INTEGER NOT NULL,
    PRIMARY KEY (day, environment, model, caller)
) WITHOUT ROWID;

-- Limits that an administrator has set instead of the limits of the config.
CREATE TABLE limit_override (
    environment TEXT NOT NULL,
    scope       TEXT NOT NULL,
    name        TEXT NOT NULL,
    kind        TEXT NOT NULL,
    per_ms      INTEGER NOT NULL,
    per         TEXT NOT NULL,
    "limit"     INTEGER NOT NULL,
    burst       INTEGER NOT NULL,
    PRIMARY KEY (environment, scope, name, kind, per_ms)
) WITHOUT ROWID;

-- Actions of administrators.
CREATE TABLE audit (
    at_ms       INTEGER NOT NULL,
    environment TEXT NOT NULL,
    action      TEXT NOT NULL
);

-- Views for readers with an SQLite shell.
CREATE VIEW usage_by_minute AS
    SELECT datetime(minute * 60, 'unixepoch') AS minute, environment, model, caller, requests, rejections,
           prompt_tokens, completion_tokens, total_tokens
    FROM usage;
CREATE VIEW usage_by_day AS
    SELECT day, environment, model, caller, sum(requests) AS requests, sum(rejections) AS rejections,
           sum(prompt_tokens) AS prompt_tokens, sum(completion_tokens) AS completion_tokens,
           sum(total_tokens) AS total_tokens
    FROM (
        SELECT date(day * 86400, 'unixepoch') AS day, environment, model, caller, requests, rejections,
               prompt_tokens, completion_tokens, total_tokens FROM usage_daily
        UNION ALL
        SELECT date(minute * 60, 'unixepoch'), environment, model, caller, requests, rejections,
               prompt_tokens, completion_tokens, total_tokens FROM usage
    )
    GROUP BY day, environment, model, caller;
