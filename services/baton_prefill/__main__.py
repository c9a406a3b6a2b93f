"""`python -m baton_prefill`."""

import sys

from baton.rpc.service import main
from baton_prefill.app import build
from baton_prefill.settings import PrefillSettings

if __name__ == "__main__":
    sys.exit(main("prefill", PrefillSettings, build))
