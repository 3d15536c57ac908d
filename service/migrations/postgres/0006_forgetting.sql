-- What was kept for those who repeat themselves is forgotten by its time. Rows come in that order, so an index
-- of blocks will do: it is made in one look at the table, and costs writes next to nothing.
CREATE INDEX inbox_done_at ON inbox USING brin (done_at);
CREATE INDEX idempotency_keys_created_at ON idempotency_keys USING brin (created_at);

-- Orders whose cancellation was heard of first: when they are told to be placed, they are not counted.
CREATE TABLE cancelled_uncounted (
    order_id uuid PRIMARY KEY
);
