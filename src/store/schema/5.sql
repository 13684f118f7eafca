-- Version 5.

-- Usage per minute of upstreams with limits, of all environments together, for the time of `store.history`.
CREATE TABLE upstream_usage (
    minute            INTEGER NOT NULL, -- minutes since the Unix epoch
    upstream          TEXT NOT NULL,
    model             TEXT NOT NULL,    -- the name that was sent to the upstream; 'other': usage whose model is not recorded
    requests          INTEGER NOT NULL,
    rejections        INTEGER NOT NULL, -- requests that had no room in the limits of the upstream
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    total_tokens      INTEGER NOT NULL,
    PRIMARY KEY (minute, upstream, model)
) WITHOUT ROWID;

-- Usage per day, merged from minutes that are older than `store.history`.
CREATE TABLE upstream_usage_daily (
    day               INTEGER NOT NULL, -- days since the Unix epoch
    upstream          TEXT NOT NULL,
    model             TEXT NOT NULL,
    requests          INTEGER NOT NULL,
    rejections        INTEGER NOT NULL,
    prompt_tokens     INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    total_tokens      INTEGER NOT NULL,
    PRIMARY KEY (day, upstream, model)
) WITHOUT ROWID;

-- Views for readers with an SQLite shell.
CREATE VIEW upstream_usage_by_minute AS
    SELECT datetime(minute * 60, 'unixepoch') AS minute, upstream, model, requests, rejections, prompt_tokens,
           completion_tokens, total_tokens
    FROM upstream_usage;
CREATE VIEW upstream_usage_by_day AS
    SELECT day, upstream, model, sum(requests) AS requests, sum(rejections) AS rejections,
           sum(prompt_tokens) AS prompt_tokens, sum(completion_tokens) AS completion_tokens,
           sum(total_tokens) AS total_tokens
    FROM (
        SELECT date(day * 86400, 'unixepoch') AS day, upstream, model, requests, rejections, prompt_tokens,
               completion_tokens, total_tokens FROM upstream_usage_daily
        UNION ALL
        SELECT date(minute * 60, 'unixepoch'), upstream, model, requests, rejections, prompt_tokens, completion_tokens,
               total_tokens FROM upstream_usage
    )
    GROUP BY day, upstream, model;
