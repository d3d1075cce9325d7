"""The store: a transactional Zarr v3 repository whose layout is `storage_schema`."""
