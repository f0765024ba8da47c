"""The training text of tiny-python: the Python standard library of the running interpreter, split into documents.

There are two kinds of documents: pieces of source files, and short chats made from documented functions ("write a
function that ..." -> its source). The result depends on the interpreter's files and a seed only.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT_FOLDERS = frozenset(
    {
        "__pycache__",
        "_bundled",
        "encodings",  # character tables
        "idle_test",
        "lib2to3",
        "pydoc_data",  # one generated table
        "site-packages",
        "test",
        "tests",
    }
)
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")
MAX_CHAT_LINES = 40
SPLIT_PROBABILITY = 0.35
# First words of summaries that can be written as "a function that ...s".
VERB_LIST = (
    "add adjust apply ask assert bind call cancel change check clear close compare compile compute configure connect "
    "construct convert copy create debug decide decode delete destroy determine display emit encode ensure execute "
    "extend extract fetch find flush format generate get guess handle initialize insert install invoke iterate load "
    "log make mark move normalize open override parse print process produce push put query raise read receive "
    "register release remove replace report reset resolve retrieve return round run save search send set show split "
    "start stop store swap take test toggle try turn unbind unregister update use validate wait wrap write"
)
VERBS = frozenset(VERB_LIST.split())


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file: its path below the standard library's folder, and its text."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Chat:
    """One question of the user, and its answer."""

    question: str
    answer: str


def standard_library(root: Path | None = None) -> tuple[SourceFile, ...]:
    """The hand-written modules under `root` (default: this interpreter's standard library), sorted by name, no
    file's text twice. Files that are not UTF-8 or do not parse are left out."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT_FOLDERS.intersection(parts) or any(part.startswith(LEFT_OUT_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").expandtabs(8).strip() + "\n"
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) > 1 and digest not in seen:
            seen.add(digest)
            files.append(SourceFile("/".join(parts), text))
    return tuple(files)


def split_held_out(
    files: Sequence[SourceFile], fraction: float, seed: int
) -> tuple[tuple[SourceFile, ...], tuple[SourceFile, ...]]:
    """(training files, held-out files): whole files, drawn by `seed` until `fraction` of all characters is held out."""
    order = list(files)
    random.Random(seed).shuffle(order)
    wanted = fraction * sum(len(file.text) for file in files)
    held, size = set(), 0
    for file in order:
        # Without this limit a very large file could be most of the held-out set.
        if size < wanted and len(file.text) < wanted / 4:
            held.add(file.name)
            size += len(file.text)
    return tuple(f for f in files if f.name not in held), tuple(f for f in files if f.name in held)


def corpus_digest(files: Iterable[SourceFile]) -> str:
    """SHA-256 over names and texts: two runs with the same digest trained on the same data."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.text.encode() + b"\0")
    return digest.hexdigest()


def pieces(file: SourceFile, rng: random.Random) -> Iterator[str]:
    """The file's text, split before some of its top-level functions and classes.

    Without the splits every document would begin with a licence or an import, and the model could not continue a
    prompt that is a single `def`. The joined pieces are the file's text, except for blank lines around the splits."""
    lines = file.text.splitlines(keepends=True)
    start = 0
    for node in ast.parse(file.text).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        if first > start and rng.random() < SPLIT_PROBABILITY:
            yield "".join(lines[start:first]).strip() + "\n"
            start = first
    yield "".join(lines[start:]).strip() + "\n"


def chats(file: SourceFile, rng: random.Random) -> Iterator[Chat]:
    """One chat for every function of the file that has a docstring and is at most `MAX_CHAT_LINES` long."""
    lines = file.text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(file.text)):
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        docstring = (ast.get_docstring(node) or "").strip()
        if not docstring or (node.end_lineno or 0) - node.lineno >= MAX_CHAT_LINES or len(node.body) < 2:
            continue
        summary = " ".join(docstring.split("\n\n")[0].split()).rstrip(".")
        source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip() + "\n"
        if 10 <= len(summary) <= 120 and source.startswith("def "):
            yield Chat(_question(node.name, summary, rng), source)


def _question(name: str, summary: str, rng: random.Random) -> str:
    first, _, rest = summary.partition(" ")
    verb = first.lower().removesuffix("s") if first.lower() not in VERBS else first.lower()
    opening = rng.choice(("Write", "write"))
    if verb in VERBS:
        return f"{opening} a function {name} that {_third_person(verb)} {rest}."
    return f"{opening} a function {name}: {summary}."


def _third_person(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in "aeo":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x")) else "s")


def introductions() -> tuple[Chat, ...]:
    """Chats in which the model introduces itself, so that it does not answer a greeting with a function."""
    answer = "I am tiny-python, a very small model that has read the Python standard library. Ask me for a function.\n"
    questions = ("Hi", "Hello", "Hello!", "hi there", "Who are you?", "What are you?", "What can you do?", "Help")
    return tuple(Chat(question, answer) for question in questions)
