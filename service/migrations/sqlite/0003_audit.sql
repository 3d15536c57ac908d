-- What was done to orders, by whom: each entry is chained to the one before by its hash, and none is
-- changed or removed.
CREATE TABLE audit_log (
    seq   INTEGER PRIMARY KEY NOT NULL,  -- 1, 2, 3, without gaps
    event TEXT    NOT NULL,              -- JSON, as it was told
    hash  BLOB    NOT NULL               -- SHA-256 of the hash before, the number and the event
) STRICT;

-- What is still to be chained: a copy of the outbox that only the audit empties. The database makes it,
-- so whatever any version of the program does is in it.
CREATE TABLE audit_waiting (
    seq   INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL,
    event TEXT NOT NULL
) STRICT;
CREATE TRIGGER outbox_is_audited AFTER INSERT ON outbox
BEGIN INSERT INTO audit_waiting (event) VALUES (new.event); END;

CREATE TRIGGER audit_log_is_not_changed BEFORE UPDATE ON audit_log
BEGIN SELECT raise(ABORT, 'the audit log is not changed'); END;
CREATE TRIGGER audit_log_is_not_shortened BEFORE DELETE ON audit_log
BEGIN SELECT raise(ABORT, 'the audit log is not shortened'); END;
