"""Image folders and token shards."""
