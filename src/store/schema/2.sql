-- Version 2: how far prompt estimates were off, so that what was learned outlives the process.
CREATE TABLE calibration (
    upstream TEXT NOT NULL,
    model    TEXT NOT NULL, -- as the requests name it
    kind     TEXT NOT NULL, -- plain, tools or images
    answers  TEXT NOT NULL, -- the last ones, oldest first: prompt tokens estimated:reported, between spaces
    PRIMARY KEY (upstream, model, kind)
) WITHOUT ROWID;
