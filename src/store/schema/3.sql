-- Version 3.

-- The audit log also has who acted from where, what changed and why.
ALTER TABLE audit RENAME TO audit_2;
CREATE TABLE audit (
    id       INTEGER PRIMARY KEY,
    at_ms    INTEGER NOT NULL,
    "by"     TEXT NOT NULL, -- how the administrator was identified: token, session, local, anonymous, or file
    address  TEXT,          -- the address that the request came from
    action   TEXT NOT NULL, -- version 2 and earlier: a description
    target   TEXT NOT NULL, -- what it was done to
    "before" TEXT,          -- JSON
    "after"  TEXT,          -- JSON
    reason   TEXT
);
INSERT INTO audit (at_ms, "by", action, target)
    SELECT at_ms, 'unknown', action, 'environment ''' || environment || '''' FROM audit_2 ORDER BY rowid;
DROP TABLE audit_2;
