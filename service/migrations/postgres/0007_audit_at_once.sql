-- What one statement tells of waits for the audit by one statement, too: orders come many at a time.
CREATE FUNCTION outbox_is_audited_at_once() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit_waiting (event) SELECT event FROM told ORDER BY seq;
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER outbox_is_audited AFTER INSERT ON outbox REFERENCING NEW TABLE AS told
FOR EACH STATEMENT EXECUTE FUNCTION outbox_is_audited_at_once();
