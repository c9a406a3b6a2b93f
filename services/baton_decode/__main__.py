"""`python -m baton_decode`."""

import sys

from baton.rpc.service import main
from baton_decode.app import build
from baton_decode.settings import DecodeSettings

if __name__ == "__main__":
    sys.exit(main("decode", DecodeSettings, build))
