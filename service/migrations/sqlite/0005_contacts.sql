-- How to reach whoever has placed the order: encrypted, see src/keyring.rs.
ALTER TABLE orders ADD COLUMN contact BLOB;
