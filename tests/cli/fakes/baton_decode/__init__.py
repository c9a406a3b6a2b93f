"""A fake of the decode service."""
