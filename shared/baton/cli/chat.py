"""`baton chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Annotated, Final

import typer

from baton.cli import connection, console
from baton.cli.generate import follow, sampling_options, tell
from baton.cli.mesh import target_or_default
from baton.client import BatonRpcError, Client, Message, Options, Role

_HELP: Final = "/reset forgets the conversation, /system TEXT sets the instructions, /quit (or Ctrl-D) ends."


class Conversation:
    """What was said, and the instructions it was said under."""

    def __init__(self, system: str) -> None:
        self.system = system
        self._turns: list[Message] = []

    def messages(self, question: str) -> list[Message]:
        """The whole conversation with a new question at its end."""
        instructions = [Message(Role.SYSTEM, self.system)] if self.system else []
        return [*instructions, *self._turns, Message(Role.USER, question)]

    def add(self, question: str, answer: str) -> None:
        """Remember one exchange."""
        self._turns += [Message(Role.USER, question), Message(Role.ASSISTANT, answer)]

    def reset(self) -> None:
        """Forget all exchanges; the instructions stay."""
        self._turns.clear()


def chat(
    target: console.Target = None,
    model: Annotated[str, typer.Option(help="Model name. Needed only where several are served.")] = "",
    system: Annotated[str, typer.Option(help="Instructions for the whole conversation.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens per answer.", show_default="256")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; up to 2.", show_default="the model's")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.", show_default="the model's")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.", show_default="drawn")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds one answer may take.")] = 300.0,
    explain: Annotated[bool, typer.Option("--explain", help="Show where each answer's time went.")] = False,
) -> None:
    """Talk with the model.

    Ctrl-C stops an answer; /quit, Ctrl-D or the end of the input ends. Without a terminal, each line of standard input
    is one turn.
    """
    address = target_or_default(target)
    options = sampling_options(
        model=model, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, timeout=timeout
    )
    conversation = Conversation(system)
    with console.rpc_errors(address), connection.client(address) as client:
        served = client.models()
        if console.interactive():
            names = ", ".join(info.name for info in served)
            console.err.print(f"[bold]{names}[/] at {address}. [dim]{_HELP}[/]\n")
        for line in _lines():
            if line == "/quit":
                break
            if line.startswith("/"):
                _command(line, conversation)
            elif line:
                _turn(client, conversation, line, options, explain)


def _turn(client: Client, conversation: Conversation, question: str, options: Options, explain: bool) -> None:
    started = time.monotonic_ns()
    try:
        with client.stream_chat(conversation.messages(question), **options) as stream:
            answer, first_token_ns = follow(stream, started, show=True)
    except KeyboardInterrupt:
        console.err.print("[dim]stopped; this exchange is not remembered[/]")
        return
    except BatonRpcError as error:
        # A person can ask again; a script must learn that its line got no answer.
        if not console.interactive():
            raise
        console.err.print(f"[bold red]error:[/] {console.describe(error, client.target)}", markup=True)
        return
    conversation.add(question, answer.text)
    if console.interactive() or explain:
        tell(answer, first_token_ns, time.monotonic_ns() - started, explain=explain)
        console.err.print()


def _command(line: str, conversation: Conversation) -> None:
    verb, _, argument = line.partition(" ")
    if verb == "/reset":
        conversation.reset()
        console.err.print("[dim]forgotten[/]")
    elif verb == "/system":
        conversation.system = argument.strip()
        console.err.print("[dim]instructions set[/]" if conversation.system else "[dim]no instructions[/]")
    else:
        console.err.print(f"[dim]{_HELP}[/]")


def _lines() -> Iterator[str]:
    """Lines of the person or the pipe, stripped."""
    if not (sys.stdin.isatty() and console.interactive()):
        for line in sys.stdin:
            yield line.strip()
        return
    import readline  # noqa: F401  input() gets history and editing by it

    while True:
        try:
            yield input("› ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            console.err.print("[dim]Ctrl-D or /quit ends.[/]")
