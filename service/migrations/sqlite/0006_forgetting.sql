-- What was kept for those who repeat themselves is forgotten by its time.
CREATE INDEX inbox_done_at ON inbox (done_at);
CREATE INDEX idempotency_keys_created_at ON idempotency_keys (created_at);

-- Orders whose cancellation was heard of first: when they are told to be placed, they are not counted.
CREATE TABLE cancelled_uncounted (
    order_id BLOB PRIMARY KEY NOT NULL
) STRICT, WITHOUT ROWID;
