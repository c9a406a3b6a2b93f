"""Runs first in every process of an experiment: moves its wall clock, and lets its engine's steps be slowed down.

Nothing of this is in the services themselves. `BATON_VERIFY_CLOCK_SECONDS` is added to the wall clock;
`BATON_VERIFY_STEP_FILE` names a file: while it exists, every step of an engine takes that many seconds longer.
"""

import importlib.abc
import importlib.util
import os
import sys
import time

_offset = float(os.environ.get("BATON_VERIFY_CLOCK_SECONDS", "0"))
_step_file = os.environ.get("BATON_VERIFY_STEP_FILE", "")

if _offset:
    _time, _time_ns = time.time, time.time_ns
    time.time = lambda: _time() + _offset
    time.time_ns = lambda: _time_ns() + int(_offset * 1e9)


class _SlowRunner(importlib.abc.MetaPathFinder):
    """Imports baton.engine.runner as it is, and wraps Runner.run."""

    def find_spec(self, name, path=None, target=None):
        if name != "baton.engine.runner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            run = module.Runner.run

            def slow(self, *args, **kwargs):
                try:
                    with open(_step_file) as file:
                        longer = float(file.read() or 0)
                except FileNotFoundError:
                    longer = 0.0
                # Half of it before and half after: what others do with the step's news falls into the second.
                time.sleep(longer / 2)
                result = run(self, *args, **kwargs)
                time.sleep(longer / 2)
                return result

            module.Runner.run = slow

        spec.loader.exec_module = exec_module
        return spec


if _step_file:
    sys.meta_path.insert(0, _SlowRunner())
