"""`tandem chat`: talk to the model, in a terminal or through a pipe."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from tandem.cli.common import ApiKeyFile, Ca, ClientCertificate, ClientKey, read_api_key, state_folders
from tandem.cli.output import print_error, print_line
from tandem.client import DEFAULT_ADDRESS, Client
from tandem.client_tls import ClientTls
from tandem.completion import GenerateOptions
from tandem.core.address import split_address
from tandem.core.errors import ConfigError, TandemError

EPILOG = """\
examples:
  tandem chat
  tandem chat --temperature 0 --max-tokens 200
  tandem chat --complete                     the model continues your text
  echo "def read_json(path):" | tandem chat --complete
  tandem chat --address 127.0.0.1:9001       the gRPC port of another router
  tandem chat --address tandem.example.com:443 --tls --api-key-file key

in the conversation: /help, /reset (forget the conversation), /history, /quit"""
_MAX_LINE_CHARS = 8 << 20  # as many bytes a router takes (`router.max_body`)
_HELP_TEXT = """\
/reset    forget the conversation
/history  show it
/quit     leave (so does Ctrl-D)
Ctrl-C    ends the answer being written"""


def run(
    address: Annotated[str | None, typer.Option(help="gRPC HOST:PORT of a router (default: the running one)")] = None,
    model: Annotated[str | None, typer.Option(help="which model, where a router serves several")] = None,
    complete: Annotated[bool, typer.Option("--complete", help="continue the text; no chat template")] = False,
    system: Annotated[str, typer.Option(help="instructions at the start of the conversation")] = "",
    max_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0: always the likeliest token; default: the router's")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed gives the same answers")] = None,
    api_key_file: ApiKeyFile = None,
    tls: Annotated[bool, typer.Option("--tls", help="the router has TLS (the running one is known)")] = False,
    ca: Ca = None,
    certificate: ClientCertificate = None,
    key: ClientKey = None,
) -> int:
    """Talk to the model of the running cluster. Answers stream as they are generated; Ctrl-C ends an answer, Ctrl-D the
    conversation. Through a pipe each line of the input is one question and only the answers are printed."""
    options = GenerateOptions(max_tokens=max_tokens)
    if temperature is not None:
        options["temperature"] = temperature
    if model is not None:
        options["model"] = model
    if seed is not None:
        options["seed"] = seed
    if address is not None:
        split_address(address)  # raises; gRPC itself would only say that nobody answers
    runs = state_folders().running() if address is None else []
    if len(runs) > 1:
        which = ", ".join(f"--address {run.grpc} ({run.cluster or run.model})" for run in runs)
        raise ConfigError(f"several clusters are running; name one: {which}")
    if runs:
        address, tls = runs[0].grpc, runs[0].has_tls
    files = ClientTls(ca, certificate, key) if tls or ca is not None else None
    with Client(address or DEFAULT_ADDRESS, api_key=read_api_key(api_key_file), tls=files) as client:
        conversation = Conversation(client, options, system=system, complete=complete)
        interactive = sys.stdin.isatty()
        if interactive:
            print_line(f"{client.models()[0].id}; /help for help, Ctrl-D to leave")
        failed = False
        for line in _lines(interactive):
            if interactive and line.startswith("/"):
                if line.strip() == "/quit":
                    break
                print_line(conversation.command(line.strip()))
            elif line.strip():
                failed |= not conversation.answer(line)
        return 1 if failed and not interactive else 0


class Conversation:
    """The messages so far. With `complete` each question is a text of its own, which the model continues."""

    def __init__(self, client: Client, options: GenerateOptions, *, system: str = "", complete: bool = False) -> None:
        self._client = client
        self._complete = complete
        self._options = options
        self._beginning = [{"role": "system", "content": _as_utf8(system)}] if system else []
        self._messages = list(self._beginning)

    def command(self, command: str) -> str:
        """Carry out a command that begins with a slash. Returns the text to print."""
        match command:
            case "/help":
                return _HELP_TEXT
            case "/reset":
                self._messages = list(self._beginning)
                return "(forgotten)"
            case "/history":
                return (
                    "\n".join(f"{message['role']}: {message['content']}" for message in self._messages)
                    or "(nothing yet)"
                )
            case _:
                return f"{command} is not a command; /help lists them"

    def answer(self, text: str) -> bool:
        """Print the answer as it comes. Returns False after a failure, which leaves the conversation as it was."""
        text = _as_utf8(text)
        question = {"role": "user", "content": text}
        options = self._options.copy()
        if self._complete:
            options["prompt"] = text
        else:
            options["messages"] = [*self._messages, question]
        written: list[str] = []
        try:
            with contextlib.suppress(KeyboardInterrupt), self._client.stream(**options) as stream:
                for delta in stream:
                    print(delta.text, end="", flush=True)
                    written.append(delta.text)
        except TandemError as error:
            print_error(f"\n({error.message})" if written else f"({error.message})")
            return False
        print_line()
        if not self._complete:
            self._messages += [question, {"role": "assistant", "content": "".join(written)}]
        return True


def _as_utf8(text: str) -> str:
    """Bytes that the locale's encoding lacks reach Python as halves of surrogate pairs. They count as UTF-8, whatever
    the locale says, and as U+FFFD where they are not."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        while line := sys.stdin.readline(_MAX_LINE_CHARS + 1):
            if len(line) > _MAX_LINE_CHARS:
                raise ConfigError(f"a line of the input is longer than {_MAX_LINE_CHARS:,} characters")
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives `input` its line editing and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print_line()
            return
        except KeyboardInterrupt:
            print_line("\n(Ctrl-D or /quit to leave)")
