CREATE TABLE orders (
    id         BLOB    PRIMARY KEY NOT NULL,  -- UUIDv7, so the key orders by creation
    customer   TEXT    NOT NULL,
    currency   TEXT    NOT NULL,
    status     TEXT    NOT NULL CHECK (status IN ('open', 'cancelled')),
    created_at INTEGER NOT NULL,              -- milliseconds since the Unix epoch
    updated_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE order_items (
    order_id         BLOB    NOT NULL REFERENCES orders (id),
    line             INTEGER NOT NULL,
    sku              TEXT    NOT NULL,
    quantity         INTEGER NOT NULL CHECK (quantity > 0),
    unit_price_cents INTEGER NOT NULL CHECK (unit_price_cents >= 0),
    PRIMARY KEY (order_id, line)
) STRICT, WITHOUT ROWID;
