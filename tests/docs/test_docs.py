"""The documentation: the site builds without a warning, links lead somewhere, code in it is right, and every line that
Tandem writes to a log is explained."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from markdown.extensions.toc import slugify
from pydantic import BaseModel, ValidationError

from tandem.cli import main as cli
from tandem.core.api_keys import ApiKeyFile
from tandem.core.config import RouterConfig, ServeConfig, WorkerConfig
from tandem.core.slo_file import SloFile

ROOT = Path(__file__).parents[2]
PAGES = [
    path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/*/README.md")] if path.is_file()
]
HISTORY = ("log", "decisions")  # of docs: what was right then
CURRENT = [path for path in PAGES if path.name != "CHANGELOG.md" and not {path.stem, path.parent.name} & {*HISTORY}]
MODELS: tuple[type[BaseModel], ...] = (ServeConfig, RouterConfig, WorkerConfig, SloFile, ApiKeyFile)
PRODUCT = [path for path in (ROOT / "tandem").iterdir() if path.is_symlink()]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.unmeasured
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    settings = (tmp_path / "reference" / "settings.html").read_text()
    for setting in ("max_outstanding_tokens", "kv_memory", "heartbeat_s", "objective", "sha256"):
        assert f"<code>{setting}</code>" in settings
    assert "https://" not in (tmp_path / "index.html").read_text().replace("https://www.mkdocs.org", ""), (
        "loads nothing"
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)", without_code(page.read_text())):
        path = page.parent / target if target else page
        if target.startswith("reference/") or target.endswith("decisions/index.md"):
            continue  # made by mkdocs, which checks these links
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor[1:] in anchors_of(path), f"{target}{anchor}"


def anchors_of(path: Path) -> set[str]:
    return {slugify(title, "-") for title in re.findall(r"^#+ (.*)", without_code(path.read_text()), re.MULTILINE)}


def without_code(text: str) -> str:
    """Without fenced blocks, and without the marks of code in a line."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).replace("`", "")


def fences(page: Path) -> list[tuple[str, str]]:
    """Language and text."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_each_decision_has_a_number_of_its_own_and_titles_and_code_name_it() -> None:
    files = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    numbers = [path.name[:4] for path in files]
    assert len(set(numbers)) == len(numbers), "two decisions have one number"
    assert [path.name for path in files if path.name[:4] not in path.read_text().splitlines()[0]] == []
    named = {
        number
        for folder in PRODUCT
        for path in folder.rglob("*.py")
        for number in re.findall(r"decision (\d{4})", path.read_text())
    }
    assert named <= set(numbers)


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_code_in_it_is_right(page: Path) -> None:
    for language, text in fences(page):
        if language == "python":
            compile(text, name_of(page), "exec")
        elif language == "json":
            json.loads(text)
        elif language == "yaml":
            check_settings(text)
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^(?:    )?((?:[A-Z_]+=\S+ )*(?:tandem|make) [a-z].*)", text, re.MULTILINE):
        check_command(line)


def check_settings(text: str) -> None:
    """Some file may have them."""
    values, errors = yaml.safe_load(text), []
    for model in MODELS:
        try:
            model.model_validate(values)
        except ValidationError as error:
            errors.append(str(error))
        else:
            return
    raise AssertionError(f"{text}\n" + "\n".join(errors))


def check_command(line: str) -> None:
    words = shlex.split(line.partition("   ")[0], comments=True)
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        return
    assert words[1] in cli._COMMANDS, line
    command = cli._load(words[1])
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words[2:]:
        if re.match(r"--?[a-z]", word):
            assert word.partition("=")[0] in known | {"--help"}, line


def log_lines() -> Iterator[tuple[str, str]]:
    """Level and format of each line that the product may write, but for those of debugging."""
    levels = {"info": "INFO", "warning": "WARNING", "error": "ERROR", "exception": "ERROR", "critical": "CRITICAL"}
    for path in [file for package in PRODUCT for file in package.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in levels):
                continue
            of, first = node.func.value, node.args[0] if node.args else None
            if isinstance(of, ast.Name) and of.id.lower().strip("_") in ("log", "logger"):
                assert isinstance(first, ast.Constant), f"{path}: a line's format is a text of its own"
                assert isinstance(first.value, str)
                yield levels[node.func.attr], first.value


def test_every_log_line_is_explained() -> None:
    page = (ROOT / "docs" / "log-lines.md").read_text()
    explained = {(level, line) for line, level in re.findall(r"^\| `([^`]*)` \| (\w+) \|", page, re.MULTILINE)}
    written = {(level, re.sub(r"%[-+#0-9.]*[a-z]", "…", text)) for level, text in log_lines()}
    assert len(written) > 40
    assert written - {("INFO", "…"), ("WARNING", "…"), ("CRITICAL", "…")} <= explained, "docs/log-lines.md"
    assert explained <= written, "docs/log-lines.md has lines that are never written"
