"""A conversation with a router that says `yes`."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem import Client
from tandem.cli.chat import Conversation
from tandem.cli.main import main
from tandem.completion import GenerateOptions
from tandem.deploy.private_file import write_private
from tandem.deploy.run_state import process_started_s
from tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc


class Yes(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []

    def Generate(self, request: Any, context: Any) -> Iterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        if "fail" in (request.text, *(message.content for message in request.chat.messages)):
            context.abort(grpc.StatusCode.UNAVAILABLE, "no worker")
        yield inference_pb2.GenerateResponse(text="ye")
        yield inference_pb2.GenerateResponse(text="s", finish_reason=common_pb2.FINISH_REASON_STOP)


@pytest.fixture
def router() -> Iterator[tuple[Yes, Client]]:
    servicer = Yes()
    server = grpc.server(ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client:
        yield servicer, client
    server.stop(None).wait()


def said(request: inference_pb2.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def test_each_question_brings_what_was_said(router: tuple[Yes, Client], capsys: pytest.CaptureFixture[str]) -> None:
    servicer, client = router
    conversation = Conversation(client, GenerateOptions(max_tokens=9, seed=3), system="be kind")
    assert conversation.answer("one?")
    assert conversation.answer("two?")
    assert capsys.readouterr().out == "yes\nyes\n"
    begin = [("system", "be kind"), ("user", "one?")]
    assert said(servicer.requests[0]) == begin
    assert said(servicer.requests[1]) == [*begin, ("assistant", "yes"), ("user", "two?")]
    assert servicer.requests[0].sampling.max_tokens == 9
    assert servicer.requests[0].sampling.seed == 3
    assert conversation.command("/history").endswith("user: two?\nassistant: yes")


def test_reset_forgets_all_but_the_beginning(router: tuple[Yes, Client]) -> None:
    servicer, client = router
    conversation = Conversation(client, GenerateOptions(), system="be kind")
    conversation.answer("one?")
    assert conversation.command("/reset") == "(forgotten)"
    conversation.answer("two?")
    assert said(servicer.requests[1]) == [("system", "be kind"), ("user", "two?")]


def test_a_failure_is_told_and_forgotten(router: tuple[Yes, Client], capsys: pytest.CaptureFixture[str]) -> None:
    servicer, client = router
    conversation = Conversation(client, GenerateOptions())
    assert not conversation.answer("fail")
    assert capsys.readouterr().err == "(the server cannot be reached (no worker))\n"
    assert conversation.answer("one?")
    assert said(servicer.requests[1]) == [("user", "one?")]


def test_completion_sends_the_text_as_it_is(router: tuple[Yes, Client]) -> None:
    servicer, client = router
    conversation = Conversation(client, GenerateOptions(), complete=True)
    conversation.answer("def f(")
    conversation.answer("def g(")
    assert [request.text for request in servicer.requests] == ["def f(", "def g("]


def test_commands(router: tuple[Yes, Client]) -> None:
    conversation = Conversation(router[1], GenerateOptions())
    assert "/reset" in conversation.command("/help")
    assert conversation.command("/history") == "(nothing yet)"
    assert conversation.command("/bye") == "/bye is not a command; /help lists them"


def test_it_talks_to_no_cluster_by_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path))
    own = {"pid": os.getpid(), "process_started_s": process_started_s(os.getpid()), "model": "m"}
    for number in (1, 2):
        addresses = {"http": "h:1", "grpc": f"h:{number}", "control": "h:3", "cluster_token": "t"}
        folders = {"log_folder": "/logs", "ray_folder": "", "cluster": f"c{number}"}
        write_private(tmp_path / f"serve-{number}.json", own | addresses | folders)
    assert main(["chat"]) == 2
    shown = capsys.readouterr().err
    assert "several clusters are running; name one: " in shown
    assert "--address h:2 (c2)" in shown


def test_bytes_count_as_utf_8_in_every_locale(router: tuple[Yes, Client]) -> None:
    servicer, client = router
    conversation = Conversation(client, GenerateOptions(), complete=True)
    for typed in ("naïve".encode(), b"\xff", b"plain"):
        assert conversation.answer(typed.decode("ascii", "surrogateescape"))
    assert [request.text for request in servicer.requests] == ["naïve", "\ufffd", "plain"]
