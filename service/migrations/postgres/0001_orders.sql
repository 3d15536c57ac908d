CREATE TABLE orders (
    id         uuid   PRIMARY KEY,  -- UUIDv7, so the key orders by creation
    customer   text   NOT NULL,
    currency   text   NOT NULL,
    status     text   NOT NULL CHECK (status IN ('open', 'cancelled')),
    created_at bigint NOT NULL,     -- milliseconds since the Unix epoch
    updated_at bigint NOT NULL
);

CREATE TABLE order_items (
    order_id         uuid   NOT NULL REFERENCES orders (id),
    line             bigint NOT NULL,
    sku              text   NOT NULL,
    quantity         bigint NOT NULL CHECK (quantity > 0),
    unit_price_cents bigint NOT NULL CHECK (unit_price_cents >= 0),
    PRIMARY KEY (order_id, line)
);
