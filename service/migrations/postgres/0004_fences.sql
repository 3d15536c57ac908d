-- The holder of a lease shows its token with what it writes; each new holder has a larger one.
ALTER TABLE leases ADD COLUMN token bigint NOT NULL DEFAULT 0;

-- The newest token that was seen for each lock, of whatever kind: older ones are refused.
CREATE TABLE fences (
    name  text   PRIMARY KEY,
    token bigint NOT NULL
);
