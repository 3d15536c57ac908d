-- Events that are still to be told, in the order in which they happened. They are written with what
-- they tell of, in one transaction, and removed when the bus has taken them.
CREATE TABLE outbox (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    event      TEXT    NOT NULL,   -- CloudEvents, JSON
    created_at INTEGER NOT NULL    -- milliseconds since the Unix epoch
) STRICT;

-- Who may do what only one process does at a time, and until when, by the database's clock.
CREATE TABLE leases (
    name       TEXT    PRIMARY KEY NOT NULL,
    owner      TEXT    NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What each consumer has done already: an event may come twice.
CREATE TABLE inbox (
    consumer TEXT    NOT NULL,
    event_id BLOB    NOT NULL,
    done_at  INTEGER NOT NULL,
    PRIMARY KEY (consumer, event_id)
) STRICT, WITHOUT ROWID;

-- Events that a consumer could not do anything with.
CREATE TABLE dead_letters (
    consumer  TEXT    NOT NULL,
    event_id  BLOB    NOT NULL,
    event     TEXT    NOT NULL,
    error     TEXT    NOT NULL,
    failed_at INTEGER NOT NULL,
    PRIMARY KEY (consumer, event_id)
) STRICT, WITHOUT ROWID;

-- Answers to writes that a client may send again.
CREATE TABLE idempotency_keys (
    client      TEXT    NOT NULL,
    key         TEXT    NOT NULL,
    fingerprint BLOB    NOT NULL,  -- SHA-256 of the request
    order_id    BLOB    NOT NULL,
    created_at  INTEGER NOT NULL,
    PRIMARY KEY (client, key)
) STRICT, WITHOUT ROWID;

-- What customers have ordered and not cancelled: made from events, by the consumer `totals`.
CREATE TABLE customer_totals (
    customer    TEXT    NOT NULL,
    currency    TEXT    NOT NULL,
    orders      INTEGER NOT NULL CHECK (orders >= 0),
    total_cents INTEGER NOT NULL,
    PRIMARY KEY (customer, currency)
) STRICT, WITHOUT ROWID;

-- The orders that are in those sums. An order of a time, or of a release, that told nothing is in none
-- and is not taken out when it is cancelled.
CREATE TABLE counted_orders (
    order_id BLOB PRIMARY KEY NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO counted_orders SELECT id FROM orders WHERE status = 'open';
INSERT INTO customer_totals (customer, currency, orders, total_cents)
SELECT customer, currency, count(DISTINCT id), sum(quantity * unit_price_cents)
FROM orders JOIN order_items ON order_id = id
WHERE status = 'open'
GROUP BY customer, currency;
