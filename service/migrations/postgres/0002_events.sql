-- Events that are still to be told, in the order in which they happened. They are written with what
-- they tell of, in one transaction, and removed when the bus has taken them.
CREATE TABLE outbox (
    seq        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event      text    NOT NULL,   -- CloudEvents, JSON
    created_at bigint  NOT NULL    -- milliseconds since the Unix epoch
);

-- Who may do what only one process does at a time, and until when, by the database's clock.
CREATE TABLE leases (
    name       text   PRIMARY KEY,
    owner      text    NOT NULL,
    expires_at bigint  NOT NULL
);

-- What each consumer has done already: an event may come twice.
CREATE TABLE inbox (
    consumer text    NOT NULL,
    event_id uuid    NOT NULL,
    done_at  bigint  NOT NULL,
    PRIMARY KEY (consumer, event_id)
);

-- Events that a consumer could not do anything with.
CREATE TABLE dead_letters (
    consumer  text    NOT NULL,
    event_id  uuid    NOT NULL,
    event     text    NOT NULL,
    error     text    NOT NULL,
    failed_at bigint  NOT NULL,
    PRIMARY KEY (consumer, event_id)
);

-- Answers to writes that a client may send again.
CREATE TABLE idempotency_keys (
    client      text    NOT NULL,
    key         text    NOT NULL,
    fingerprint bytea   NOT NULL,  -- SHA-256 of the request
    order_id    uuid    NOT NULL,
    created_at  bigint  NOT NULL,
    PRIMARY KEY (client, key)
);

-- What customers have ordered and not cancelled: made from events, by the consumer `totals`.
CREATE TABLE customer_totals (
    customer    text    NOT NULL,
    currency    text    NOT NULL,
    orders      bigint  NOT NULL CHECK (orders >= 0),
    total_cents bigint  NOT NULL,
    PRIMARY KEY (customer, currency)
);

-- The orders that are in those sums. An order of a time, or of a release, that told nothing is in none
-- and is not taken out when it is cancelled.
CREATE TABLE counted_orders (
    order_id uuid PRIMARY KEY
);

INSERT INTO counted_orders SELECT id FROM orders WHERE status = 'open';
INSERT INTO customer_totals (customer, currency, orders, total_cents)
SELECT customer, currency, count(DISTINCT id), sum(quantity * unit_price_cents)::bigint
FROM orders JOIN order_items ON order_id = id
WHERE status = 'open'
GROUP BY customer, currency;
