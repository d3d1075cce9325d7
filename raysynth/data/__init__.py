"""Ray Data pipelines into the store (ingest, shard, encode), and the stream that training reads."""
