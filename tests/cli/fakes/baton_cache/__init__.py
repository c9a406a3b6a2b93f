"""A fake of the cache service."""
