"""Reads the YAML files of the house into the frozen values of `core/config.py`, and writes them back.

Every mistake in a file is told at once, each in one sentence with file, line, the path of the setting and what to do:

    serve.yaml line 7: decode.engine.thread is not a setting; did you mean threads?
"""

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tandem.core.config import relative_to
from tandem.core.config_mistakes import describe, location, mistakes_of
from tandem.core.errors import ConfigError

T = TypeVar("T", bound=BaseModel)
_Loc = tuple[int | str, ...]

_MAX_FILE_BYTES = 1 << 20


def load_config(path: Path, model: type[T]) -> T:
    """The configuration in the YAML file `path`; settings it leaves out take their defaults.

    A relative path in the file (`model: models/x`) counts from the file's folder, and `~` is the home folder, wherever
    a field is a `core.config.AnchoredPath` or a `ModelName`.
    Raises ConfigError with every mistake found, one on each line.
    """
    text = _read_text(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{path} is empty; it must name at least: {', '.join(_required(model))}")
        duplicates = [f"{path} line {line}: {key} is set twice" for line, key in _duplicate_keys(root)]
        data = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_sentence(path, error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path} line {line}: holds a character that YAML does not allow") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply") from error
    except ValueError as error:  # a scalar that looks like a date and is none: 2026-13-99
        raise ConfigError(f"{path}: {error}; put text in quotes") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold settings of the form 'name: value', one on each line")
    mistakes = duplicates
    try:
        config = model.model_validate(data, context=relative_to(path.parent))
    except ValidationError as error:
        mistakes = mistakes + [
            f"{path} line {_line_of(root, location(detail))}: {describe(detail, model)}"
            for detail in mistakes_of(error, data)
        ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return config


def top_level_settings(path: Path) -> frozenset[str]:
    """Names of the settings in the YAML file `path`, to tell what kind of file it is. Empty where it cannot be read as
    one: `load_config` says why."""
    try:
        data = yaml.safe_load(_read_text(path))
    except (ConfigError, yaml.YAMLError, ValueError, RecursionError):
        return frozenset()
    return frozenset(map(str, data)) if isinstance(data, dict) else frozenset()


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """A copy of `config` with settings replaced, each given as `path.to.setting=value`; values are read as YAML.

    Raises ConfigError with every mistake found, one on each line.
    """
    data = config.model_dump(exclude_unset=True)
    origin: dict[_Loc, str] = {}
    mistakes: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = tuple(key.strip().split("."))
        if not equals or not all(keys):
            mistakes.append(f"--set {override}: must have the form setting=value, e.g. router.http=127.0.0.1:9000")
            continue
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        if (mistake := _put(data, keys, value)) is not None:
            mistakes.append(f"--set {override}: {mistake}")
            continue
        origin[tuple(int(part) if part.isdecimal() else part for part in keys)] = override
    try:
        changed = type(config).model_validate(data)
    except ValidationError as error:
        mistakes += [
            f"--set {_origin_of(origin, d['loc'])}: {describe(d, type(config))}" for d in mistakes_of(error, data)
        ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return changed


def dump_config(config: BaseModel) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; give the configuration file in it") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    if len(raw) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than 1 MiB, so it is no configuration file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} line {line}: is not UTF-8 text; save the file as UTF-8") from error


def _syntax_sentence(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{path} line {mark.line + 1}" if mark else str(path)
    problem = error.problem or "is not valid YAML"
    if "'\\t'" in problem:
        return f"{where}: begins with a tab; YAML is indented with spaces"
    if "single document" in (error.context or ""):
        return f"{where}: begins a second document ('---'); keep one"
    if "could not determine a constructor" in problem:
        return f"{where}: YAML tags ('!...') are not allowed"
    return f"{where}: is not valid YAML ({problem})"


def _required(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.is_required()]


def _duplicate_keys(root: yaml.Node) -> Iterator[tuple[int, str]]:
    """(line, path) of every key that its mapping already has. Each node is visited once, so loops of aliases end."""
    seen_nodes: set[int] = set()
    pending: list[tuple[yaml.Node, str]] = [(root, "")]
    while pending:
        node, prefix = pending.pop()
        if id(node) in seen_nodes:
            continue
        seen_nodes.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending.extend((item, f"{prefix}{index}.") for index, item in enumerate(node.value))
        if not isinstance(node, yaml.MappingNode):
            continue
        seen_keys: set[Hashable] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen_keys:
                    yield key.start_mark.line + 1, f"{prefix}{key.value}"
                seen_keys.add(key.value)
                pending.append((value, f"{prefix}{key.value}."))


def _line_of(root: yaml.Node, loc: _Loc) -> int:
    """Line of the setting at `loc`, or of the nearest section around it when the file does not have it."""
    line, node = root.start_mark.line + 1, root
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _put(data: dict[str, Any], keys: Sequence[str], value: object) -> str | None:
    """Set `value` at `keys`, where a number names an item of a list. Returns what is wrong with the keys, if
    anything."""
    section: Any = data
    for depth, key in enumerate(keys):
        path, is_last = ".".join(keys[:depth]), depth == len(keys) - 1
        if isinstance(section, list):
            if not key.isdecimal() or int(key) >= len(section):
                return f"{path} is a list; name one of its {len(section)} items, e.g. {path}.0"
            place: Any = int(key)
        else:
            place = key
            if not is_last and not isinstance(section.get(key), (dict, list, tuple)):
                section[key] = {}
        if is_last:
            section[place] = value
            break
        if isinstance(section[place], tuple):
            section[place] = list(section[place])
        section = section[place]
    return None


def _origin_of(origin: dict[_Loc, str], loc: _Loc) -> str:
    """The override that put what stands at `loc`: the longest that begins like it."""
    matches = [keys for keys in origin if keys == loc[: len(keys)] or loc == keys[: len(loc)]]
    return origin[max(matches, key=len)] if matches else ".".join(map(str, loc))
