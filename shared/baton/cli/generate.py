"""`baton generate`: one question, its answer as it is generated, and where its time went."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

from baton.cli import connection, console, render
from baton.cli.mesh import target_or_default
from baton.cli.waterfall import waterfall
from baton.client import Answer, AnswerStream, CacheMode, Message, Options, Role


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue, or with --chat a question; -: standard input.")],
    target: console.Target = None,
    model: Annotated[str, typer.Option(help="Model name. Needed only where several are served.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.", show_default="256")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; up to 2.", show_default="the model's")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.", show_default="the model's")] = None,
    top_k: Annotated[int | None, typer.Option(help="Most likely tokens kept.", show_default="the model's")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least likelihood kept.", show_default="the model's")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.", show_default="drawn")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither read nor write the response cache.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Generate anew, and store that.")] = False,
    only_cached: Annotated[bool, typer.Option("--only-cached", help="Fail where no answer is stored.")] = False,
    original_pace: Annotated[
        bool, typer.Option("--original-pace", help="Stream a stored answer as slowly as it was generated.")
    ] = False,
    no_prefix_cache: Annotated[
        bool, typer.Option("--no-prefix-cache", help="Compute all of the prompt, whatever is known of its beginning.")
    ] = False,
    cache_salt: Annotated[str, typer.Option(help="Share caches with requests of the same salt only.")] = "",
    semantic: Annotated[bool, typer.Option("--semantic", help="Take the answer of a similar question, too.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds the whole request may take.")] = 300.0,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the answer when it is complete.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a user, through the model's chat template.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show where the time went, hop by hop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer only.")] = False,
) -> None:
    """Continue a prompt or answer a question, and see where the time went.

    The answer goes to standard output, all about it to standard error.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    options = sampling_options(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
        cache=cache_mode(no_cache=no_cache, refresh=refresh, only_cached=only_cached),
        timeout=timeout,
    )
    if original_pace:
        options["original_pace"] = True
    if no_prefix_cache:
        options["prefix_cache"] = False
    if cache_salt:
        options["cache_salt"] = cache_salt
    if semantic:
        options["semantic"] = True
    if ignore_eos:
        options["ignore_eos"] = True
    address = target_or_default(target)
    with console.rpc_errors(address), connection.client(address) as client:
        started = time.monotonic_ns()
        try:
            if chat:
                stream = client.stream_chat([Message(Role.USER, text)], **options)
            else:
                stream = client.stream(text, **options)
        except ValueError as error:
            console.fail(str(error), code=2)
        with stream:
            answer, first_token_ns = follow(stream, started, show=not (no_stream or as_json))
        elapsed_ns = time.monotonic_ns() - started
    if as_json:
        print(json.dumps(render.answer_json(answer, first_token_ns, elapsed_ns)))
        return
    if no_stream:
        print(console.printable(answer.text) if console.interactive() else answer.text)
    if not quiet:
        tell(answer, first_token_ns, elapsed_ns, explain=explain)


def sampling_options(
    *,
    model: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: list[str] | None = None,
    cache: CacheMode | None = None,
    timeout: float | None = None,
) -> Options:
    """The options given on the command line; the others stay the server's choice."""
    options = Options(model=model, timeout=timeout)
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if top_k is not None:
        options["top_k"] = top_k
    if min_p is not None:
        options["min_p"] = min_p
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    if cache is not None:
        options["cache"] = cache
    return options


def cache_mode(*, no_cache: bool = False, refresh: bool = False, only_cached: bool = False) -> CacheMode | None:
    """What the flags say; None: nothing. More than one is refused."""
    modes = {CacheMode.BYPASS: no_cache, CacheMode.REFRESH: refresh, CacheMode.ONLY: only_cached}
    wanted = [mode for mode, said in modes.items() if said]
    if len(wanted) > 1:
        console.fail("--no-cache, --refresh and --only-cached: give one of them", code=2)
    return wanted[0] if wanted else None


def follow(stream: AnswerStream, started_ns: int, *, show: bool) -> tuple[Answer, int | None]:
    """Read a stream to its end, printing its text as it comes. The answer, and nanoseconds to its first token."""
    first_token_ns: int | None = None
    printed = ""
    shown = console.printable if console.interactive() else str  # a file gets exactly what the model said
    try:
        for chunk in stream:
            if first_token_ns is None and chunk.token_ids:
                first_token_ns = time.monotonic_ns() - started_ns
            if show and chunk.text:
                sys.stdout.write(shown(chunk.text))
                sys.stdout.flush()
                printed = chunk.text
    finally:
        # Whatever follows, an error included, starts on a line of its own.
        if printed and not printed.endswith("\n"):
            print(flush=True)
    return stream.answer, first_token_ns


def tell(answer: Answer, first_token_ns: int | None, elapsed_ns: int, *, explain: bool) -> None:
    """Usage and ledger of an answer, on standard error."""
    console.err.print()
    console.err.print(render.usage_line(answer, first_token_ns, elapsed_ns))
    if explain:
        console.err.print(waterfall(answer.ledger))
        if answer.cache_similarity is not None:
            said = f"the answer of a similar question: cosine {answer.cache_similarity:.4f}, entry {answer.cache_entry}"
            console.err.print(f"[dim]{said}[/]")
        console.err.print(f"[dim]request {answer.request_id} · model {answer.model} · seed {answer.seed}[/]")
    else:
        line = render.ledger_line(answer)
        if line is not None:
            console.err.print(line)
