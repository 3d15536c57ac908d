-- The holder of a lease shows its token with what it writes; each new holder has a larger one.
ALTER TABLE leases ADD COLUMN token INTEGER NOT NULL DEFAULT 0;

-- The newest token that was seen for each lock, of whatever kind: older ones are refused.
CREATE TABLE fences (
    name  TEXT    PRIMARY KEY NOT NULL,
    token INTEGER NOT NULL
) STRICT;
