"""Settings of the prefill service."""

from baton.worker.settings import WorkerSettings


class PrefillSettings(WorkerSettings):
    """`python -m baton_prefill`: computes prompts and hands their KV over."""
