"""Text in, packed token shards out, and the loader that reads them."""
