"""A fake of the prefill service."""
