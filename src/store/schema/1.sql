-- The store of one node. All times are UTC; a minute is counted from the Unix epoch.

-- The state of every quota, as of the last commit. What requests in flight held is spent, should the
-- process die: `used + held` is what a restart finds used.
CREATE TABLE quota (
    environment    TEXT NOT NULL,
    scope          TEXT NOT NULL,    -- environment, caller or model
    name           TEXT NOT NULL,    -- the caller's name, the models' pattern, or empty
    kind           TEXT NOT NULL,    -- total_tokens, prompt_tokens, completion_tokens or requests
    per_ms         INTEGER NOT NULL, -- the period's length
    "window"       TEXT NOT NULL,    -- rolling or calendar
    per            TEXT NOT NULL,    -- the period as written in the config
    "limit"        INTEGER NOT NULL,
    used           INTEGER NOT NULL, -- spent and not yet back
    level_fraction INTEGER NOT NULL, -- of a rolling quota: what is left beyond whole tokens, in 1/period_ms
    held           INTEGER NOT NULL, -- by requests in flight
    at_ms          INTEGER NOT NULL, -- of a rolling quota: last refilled; of a calendar quota: its period's start
    PRIMARY KEY (environment, scope, name, kind, per_ms, "window")
) WITHOUT ROWID;

-- Sums since the store began, and what requests in flight have reserved.
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

-- Usage per minute, kept as long as `store.history` says.
CREATE TABLE usage (
    minute            INTEGER NOT NULL,
    environment       TEXT NOT NULL,
    model             TEXT NOT NULL, -- 'other': not told apart
    caller            TEXT NOT NULL, -- empty in an open environment
    requests          INTEGER NOT NULL,
    rejections        INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    total_tokens      INTEGER NOT NULL,
    PRIMARY KEY (minute, environment, model, caller)
) WITHOUT ROWID;

-- What was per minute and has become old: per day from then on.
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

-- Limits that an administrator has set in place of the config's.
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

-- What administrators have done.
CREATE TABLE audit (
    at_ms       INTEGER NOT NULL,
    environment TEXT NOT NULL,
    action      TEXT NOT NULL
);

-- For those who look with a shell.
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
