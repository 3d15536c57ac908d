-- What was done to orders, by whom: each entry is chained to the one before by its hash, and none is
-- changed or removed. Made from events, by the consumer `audit`.
CREATE TABLE audit_log (
    seq   BIGINT PRIMARY KEY,  -- 1, 2, 3, without gaps
    event TEXT   NOT NULL,     -- JSON, as it was told
    hash  BYTEA  NOT NULL      -- SHA-256 of the hash before, the number and the event
);

CREATE FUNCTION audit_log_stays() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is not changed or shortened';
END $$;
CREATE TRIGGER audit_log_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
FOR EACH STATEMENT EXECUTE FUNCTION audit_log_stays();
