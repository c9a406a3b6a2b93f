"""`python -m baton_cache`."""

import sys

from baton.rpc.service import main
from baton_cache.app import build
from baton_cache.settings import CacheSettings

if __name__ == "__main__":
    sys.exit(main("cache", CacheSettings, build))
