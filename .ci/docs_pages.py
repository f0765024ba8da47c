"""Pages of the documentation that mkdocs makes from the code: settings, commands, metrics, and the list of decisions.

Links of hand-written pages to files outside `docs` become names of files, since the site does not have these files.
"""

import importlib
import inspect
import pkgutil
import posixpath
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

import tandem.cli.main
import tandem.router
from tandem.core.api_keys import ApiKeyFile
from tandem.core.byte_size import parse_bytes
from tandem.core.config import RouterConfig, ServeConfig, WorkerConfig
from tandem.core.slo_file import SloFile
from tandem.deploy.kubernetes.values import ChartValues
from tandem.router.metric_descriptions import Description

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}
_LIMITS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))

_FILES: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("Serve file", "`tandem serve FILE`: a whole deployment. `examples/serve.yaml` has all settings too.", ServeConfig),
    ("Router file", "`tandem router FILE`: one router as a process.", RouterConfig),
    ("Worker file", "`tandem worker FILE`: one instance as a process.", WorkerConfig),
    ("SLO file", "`tandem plan FILE`: what to serve, on what, how fast, for which requests.", SloFile),
    ("File of API keys", "`router.api_keys` names it; `tandem key` makes an entry.", ApiKeyFile),
    ("Values of the Helm chart", "`helm install -f FILE`, for `deploy/kubernetes/chart`.", ChartValues),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    decisions = sorted((Path(config.docs_dir) / "decisions").glob("[0-9]*.md"))
    pages = {
        "reference/settings.md": settings_page(),
        "reference/commands.md": commands_page(),
        "reference/metrics.md": metrics_page(),
        "decisions/index.md": decisions_page(decisions),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def without_source(link: "re.Match[str]") -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[2]))
        return f"{link[1]} (`{path.removeprefix('../')}`)" if path.startswith("../") else link[0]

    return _LINK.sub(without_source, markdown)


# --- settings --------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Of all files. A section that is part of several files is described once."""
    lines = [
        "# Settings",
        "",
        "Files are YAML. Each setting has a default unless the table says *required*; an unknown setting is an error, "
        "which names the line. `--set SETTING=VALUE` of a command replaces one, such as `--set decode.instances=2`. "
        "`tandem schema serve` prints the same for editors.",
    ]
    described: set[type[BaseModel]] = set()
    for title, text, model in _FILES:
        lines += ["", f"## {title}", "", text]
        for section, paths in _sections(model).items():
            if section in described:
                continue
            described.add(section)
            if section is not model:
                lines += ["", f"### {', '.join(paths)} {{ #{section.__name__} }}", "", _first_paragraph(section)]
            lines += ["", *_table(("Setting", "Value", "Default", "Meaning"), _rows(section))]
    return "\n".join(lines) + "\n"


def _sections(model: type[BaseModel], path: str = "") -> dict[type[BaseModel], list[str]]:
    """The model and the models inside it, with all paths to each."""
    found = {model: [path]}
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            for section, paths in _sections(inner, f"{path}.{name}".removeprefix(".")).items():
                found.setdefault(section, []).extend(paths)
    return found


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _rows(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    return [
        (f"`{name}`", _value(field), _default(field), field.description or "")
        for name, field in model.model_fields.items()
    ]


def _value(field: FieldInfo) -> str:
    if _is_bytes(field):
        return "bytes, such as 512MiB"
    limits = [
        f"{words} {getattr(rule, name):g}"
        for rule in _rules(field)
        for name, words in _LIMITS
        if isinstance(getattr(rule, name, None), int | float)
    ]
    return ", ".join([_kind(field.annotation), *limits])


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(each) for each in get_args(annotation)))
    if get_origin(annotation) is dict:
        return "object"
    if get_origin(annotation) in (tuple, list):
        return f"list of {_kind(get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[section](#{annotation.__name__})"
    return _KINDS.get(annotation, "list of numbers")


def _rules(field: FieldInfo) -> Iterator[Any]:
    yield from field.metadata
    for each in (field.annotation, *get_args(field.annotation)):
        yield from getattr(each, "__metadata__", ())


def _is_bytes(field: FieldInfo) -> bool:
    return any(isinstance(rule, BeforeValidator) and rule.func is parse_bytes for rule in _rules(field))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "null"
    if _is_bytes(field):
        return f"{value >> 20} MiB" if value >= 1 << 20 else f"{value >> 10} KiB"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(each) for each in value)}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# --- commands --------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    lines = ["# Commands", "", "`tandem COMMAND --help` says the same."]
    for name, (summary, extras) in tandem.cli.main._COMMANDS.items():
        command = tandem.cli.main._load(name)
        arguments = [_argument(p) for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([f"tandem {name}", *arguments, "[OPTIONS]"])
        lines += ["", f"## tandem {name}", "", f"{summary[0].upper()}{summary[1:]}. "]
        lines += [f"Needs `pip install 'tandem-serve[{','.join(extras)}]'`.", "", f"    {usage}", "", command.help, ""]
        rows = [(_names(p), (p.help or "").strip()) for p in command.params if p.name != "debug"]
        lines += _table(("Argument or option", "Meaning"), rows)
        lines += ["", *(f"    {line}" for line in inspect.cleandoc(command.epilog).splitlines())]
    return "\n".join(lines) + "\n"


def _argument(parameter: Any) -> str:
    name: str = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_argument(parameter)}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


# --- metrics and decisions -------------------------------------------------------------------------------------------


def metrics_page() -> str:
    names = [each.name for each in pkgutil.iter_modules(tandem.router.__path__) if "metrics" in each.name]
    modules = [importlib.import_module(f"tandem.router.{name}") for name in names]
    values = [value for module in modules for value in vars(module).values()]
    found = {value.name: value for value in values if isinstance(value, Description)}
    rows = [
        (f"`{name}`", ", ".join(f"`{label}`" for label in each.labels) or "none", each.help)
        for name, each in sorted(found.items())
    ]
    text = "All that a router serves at `/metrics`. Names of counters end in `_total`; a histogram has the series "
    text += "`_bucket`, `_sum` and `_count`. [Observability](../observability.md) says what the labels are."
    return "\n".join(["# Metrics", "", text, "", *_table(("Metric", "Labels", "Meaning"), rows)]) + "\n"


def decisions_page(decisions: list[Path]) -> str:
    lines = ["# Decisions", "", "Why the design is as it is, in the order in which it was decided.", ""]
    for path in decisions:
        title = path.read_text().partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"


# --- text ------------------------------------------------------------------------------------------------------------


def _table(head: tuple[str, ...], rows: list[Any]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(_cell(each) for each in line)} |" for line in lines] if rows else []


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join(inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].split())
