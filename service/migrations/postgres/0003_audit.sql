-- What was done to orders, by whom: each entry is chained to the one before by its hash, and none is
-- changed or removed.
CREATE TABLE audit_log (
    seq   BIGINT PRIMARY KEY,  -- 1, 2, 3, without gaps
    event TEXT   NOT NULL,     -- JSON, as it was told
    hash  BYTEA  NOT NULL      -- SHA-256 of the hash before, the number and the event
);

-- What is still to be chained: a copy of the outbox that only the audit empties. The database makes it,
-- so whatever any version of the program does is in it.
CREATE TABLE audit_waiting (
    seq   BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event TEXT NOT NULL
);
CREATE FUNCTION outbox_is_audited() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit_waiting (event) VALUES (new.event);
    RETURN NULL;
END $$;
CREATE TRIGGER outbox_is_audited AFTER INSERT ON outbox
FOR EACH ROW EXECUTE FUNCTION outbox_is_audited();

CREATE FUNCTION audit_log_stays() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is not changed or shortened';
END $$;
CREATE TRIGGER audit_log_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
FOR EACH STATEMENT EXECUTE FUNCTION audit_log_stays();
