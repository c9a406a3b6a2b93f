"""`python -m baton_cache`, the fake."""

import sys

from fake_service import run

if __name__ == "__main__":
    sys.exit(run("cache"))
