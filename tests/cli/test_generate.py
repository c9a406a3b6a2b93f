"""`baton generate` and `baton chat`: the answer on standard output, all about it on standard error."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from baton.cli.console import printable
from baton.cli.main import app
from tests.client.scripted import ScriptedServer

ANSWER = "Once upon a time"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A scripted router."""
    with ScriptedServer() as running:
        yield running


def run(server: ScriptedServer, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """A `baton` command against the scripted router: exit code, output, errors."""
    done = CliRunner(env={"BATON_TARGET": server.target}).invoke(app, arguments, input=stdin)
    return done.exit_code, done.stdout, done.stderr


def test_the_answer_alone_goes_to_standard_output(server: ScriptedServer) -> None:
    code, out, err = run(server, "generate", "Once")
    assert (code, out) == (0, ANSWER + "\n")
    assert "3 (1 cached) → 4 tokens" in err
    assert "KV by grpc" in err
    assert "length limit" in err
    assert "decode compute 79%" in err


@pytest.mark.parametrize("flag", ["--no-stream", "--quiet"])
def test_other_ways_to_print_print_the_same(server: ScriptedServer, flag: str) -> None:
    code, out, err = run(server, "generate", "Once", flag)
    assert (code, out) == (0, ANSWER + "\n")
    assert (err == "") == (flag == "--quiet")


def test_explain_shows_every_part_of_the_ledger(server: ScriptedServer) -> None:
    _, _, err = run(server, "generate", "Once", "--explain")
    assert "whole request: 10.0 ms" in err
    for words in (("router", "tokenize", "0.50", "5.0%"), ("compute", "7.90", "79.0%"), ("residual", "0.10")):
        assert any(all(word in line for word in words) for line in err.splitlines()), words
    assert "0.30 ms of KV transfer hidden" in err


def test_json_is_one_object_with_everything(server: ScriptedServer) -> None:
    code, out, _ = run(server, "generate", "Once", "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["text"], answer["token_ids"], answer["seed"]) == (ANSWER, [1, 2, 3, 4], 7)
    total = answer["ledger"]["total"]
    parts = sum(entry["duration_ns"] for entry in total["entries"])
    assert parts + total["residual_ns"] == total["total_ns"]
    assert 0 < answer["client"]["first_token_ns"] <= answer["client"]["elapsed_ns"]


def test_flags_become_sampling_fields_and_the_prompt_may_come_by_pipe(server: ScriptedServer) -> None:
    flags = ["--max-tokens", "9", "--temperature", "0", "--top-p", "0.5", "--seed", "3", "--stop", "a", "--stop", "b"]
    run(server, "generate", "-", *flags, "--no-cache", "--ignore-eos", stdin="from a pipe")
    request = server.inference.requests[0]
    assert request.text == "from a pipe"
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.seed) == (9, 0.0, 3)
    assert list(request.sampling.stop) == ["a", "b"]
    assert request.sampling.ignore_eos
    assert not request.sampling.HasField("top_k")
    assert request.cache_control.mode == 2


def test_flags_of_the_cache(server: ScriptedServer) -> None:
    run(server, "generate", "x", "--refresh")
    run(server, "generate", "x", "--only-cached", "--original-pace", "--semantic")
    refresh, only = (request.cache_control for request in server.inference.requests)
    assert (refresh.mode, refresh.original_pace, refresh.semantic) == (3, False, False)
    assert (only.mode, only.original_pace, only.semantic) == (4, True, True)
    code, _, err = run(server, "generate", "x", "--refresh", "--no-cache")
    assert code == 2
    assert "give one of them" in err


def test_errors_say_what_to_do_and_set_the_exit_code(server: ScriptedServer) -> None:
    code, out, err = run(server, "generate", "overloaded")
    assert (code, out) == (1, "")
    assert "no room (OVERLOADED)" in err
    assert "Try again in 2.5 s" in err
    code, _, err = run(server, "generate", "x", "--max-tokens", "-1")
    assert code == 2
    assert "Traceback" not in err


def test_a_broken_answer_ends_its_line_before_the_error(server: ScriptedServer) -> None:
    code, out, err = run(server, "generate", "truncated")
    assert code == 1
    assert out == ANSWER + "\n"
    assert "before it was complete" in err


def test_ctrl_c_stops_the_servers_work_too(server: ScriptedServer) -> None:
    command = [sys.executable, "-m", "baton.cli", "generate", "hang", "--target", server.target]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.inference.hanging.wait(20)
    time.sleep(0.3)
    process.send_signal(2)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == "Once\n"
    assert "cancelled" in err
    assert server.inference.cancelled.wait(5)


def test_text_of_a_model_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\r\n\tc\x9bd\u202e") == "a[2Jb\n\tcd"
    assert printable("größer 日本 🙂") == "größer 日本 🙂"


def test_chat_from_a_pipe_remembers_and_forgets(server: ScriptedServer) -> None:
    code, out, _ = run(server, "chat", "--system", "S ", stdin="one\n\ntwo\n/reset\nthree\n/quit\nnever\n")
    assert code == 0
    # The scripted model repeats every message it is sent.
    assert out.splitlines() == ["S one", "S oneS onetwo", "S three"]
    roles = [[message.role for message in request.messages] for request in server.inference.requests[1:]]
    assert roles == [[1, 2], [1, 2, 3, 2], [1, 2]]


def test_chat_on_a_terminal_greets_and_prompts(server: ScriptedServer) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "baton.cli", "chat", "--target", server.target]
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    os.write(master, b"hello\n/nonsense\n/quit\n")
    seen = b""
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                seen += os.read(master, 4096)
            except OSError:
                break
    assert process.wait(10) == 0
    os.close(master)
    assert b"tiny" in seen
    assert b"/reset forgets" in seen
    assert b"4 tokens" in seen
