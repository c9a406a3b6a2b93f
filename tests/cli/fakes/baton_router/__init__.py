"""A fake of the router service."""
