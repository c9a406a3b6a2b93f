"""The router: the public API in front of the tiers."""
