"""`python -m baton_router`."""

import sys

from baton.rpc.service import main
from baton_router.app import build
from baton_router.settings import RouterSettings

if __name__ == "__main__":
    sys.exit(main("router", RouterSettings, build))
