"""Settings of the prefill service."""

from pydantic_settings import SettingsConfigDict

from baton.worker.settings import WorkerSettings


class PrefillSettings(WorkerSettings):
    """`python -m baton_prefill`: computes prompts and hands their KV over."""

    model_config = SettingsConfigDict(cli_prog_name="python -m baton_prefill")
