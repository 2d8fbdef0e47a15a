"""Tar shards and object storage: listing, indexes, reading of byte ranges."""
