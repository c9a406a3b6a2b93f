"""Measurements of the response cache, one file each; `scripts/measure_cache.py` runs them."""
