"""`tandem chat`: talk to the model, in a terminal or through a pipe."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from tandem.cli.common import DEFAULT_GRPC, complain, say, state_folders
from tandem.client import Client
from tandem.completion import Delta, GenerateOptions
from tandem.core.errors import TandemError

HELP = "talk to the model"
DESCRIPTION = """\
Talk to the model of the running cluster. Answers stream as they are generated; Ctrl-C ends an answer, Ctrl-D the
conversation. Through a pipe each line of the input is one question and only the answers are printed."""
EPILOG = """\
examples:
  tandem chat
  tandem chat --temperature 0 --max-tokens 200
  tandem chat --complete                        no chat template: the model continues your text
  echo "def read_json(path):" | tandem chat --complete
  tandem chat --address 127.0.0.1:9001          a router elsewhere (its gRPC port)

in the conversation: /help, /reset (forget what was said), /history, /quit
"""
_HELP_TEXT = """\
/reset    forget the conversation
/history  show it
/quit     leave (so does Ctrl-D)
Ctrl-C    ends the answer being written"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="HOST:PORT", help="gRPC address of a router (default: the running one)")
    parser.add_argument("--model", help="which model, where a router serves several")
    parser.add_argument("--complete", action="store_true", help="continue the text instead of answering as a chat")
    parser.add_argument("--system", metavar="TEXT", help="instructions that the conversation begins with")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")


def run(args: argparse.Namespace) -> int:
    with Client(args.address or _default_address()) as client:
        conversation = Conversation(client, args)
        interactive = sys.stdin.isatty()
        if interactive:
            say(f"{client.models()[0].id}; /help for help, Ctrl-D to leave")
        failed = False
        for line in _lines(interactive):
            if interactive and line.startswith("/"):
                if line.strip() == "/quit":
                    break
                say(conversation.command(line.strip()))
            elif line.strip():
                failed |= not conversation.answer(line)
        return 1 if failed and not interactive else 0


class Conversation:
    """What has been said, and how to ask for more."""

    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        self._client = client
        self._complete: bool = args.complete
        self._options = GenerateOptions(max_tokens=args.max_tokens, temperature=args.temperature)
        if args.model is not None:
            self._options["model"] = args.model
        if args.seed is not None:
            self._options["seed"] = args.seed
        self._beginning = [{"role": "system", "content": args.system}] if args.system else []
        self._messages = list(self._beginning)

    def command(self, command: str) -> str:
        """Carry out what begins with a slash; what to print."""
        match command:
            case "/help":
                return _HELP_TEXT
            case "/reset":
                self._messages = list(self._beginning)
                return "(forgotten)"
            case "/history":
                return "\n".join(f"{m['role']}: {m['content']}" for m in self._messages) or "(nothing yet)"
            case _:
                return f"{command} is not a command; /help lists them"

    def answer(self, text: str) -> bool:
        """Print the answer as it comes. What fails is told, and leaves the conversation as it was."""
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
                    written.append(_show(delta))
        except TandemError as error:
            complain(f"\n({error.message})" if written else f"({error.message})")
            return False
        say()
        if not self._complete:
            self._messages += [question, {"role": "assistant", "content": "".join(written)}]
        return True


def _show(delta: Delta) -> str:
    print(delta.text, end="", flush=True)
    return delta.text


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives `input` its line editing and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            say()
            return
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /quit to leave)")


def _default_address() -> str:
    runs = state_folders().running()
    return runs[0].grpc if runs else DEFAULT_GRPC
