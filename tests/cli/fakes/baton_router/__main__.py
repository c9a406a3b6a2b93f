"""`python -m baton_router`, the fake."""

import sys

from fake_service import run

if __name__ == "__main__":
    sys.exit(run("router"))
