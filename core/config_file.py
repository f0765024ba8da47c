"""Reads and writes YAML files of settings: serve files, SLO files, plans, calibrations.

An error message lists every mistake of a file, each in one sentence with file, line, setting and what to do:

    serve.yaml line 7: decode.engine.thread is not a setting; did you mean threads?
"""

import itertools
import os
import stat
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tandem.core.anchored_path import relative_to
from tandem.core.config_mistakes import describe, location, mistakes_of
from tandem.core.errors import ConfigError
from tandem.core.input_file import open_input
from tandem.core.printable import printable
from tandem.core.settings_yaml import SettingsDumper, SettingsLoader, UnreasonableYamlError

T = TypeVar("T", bound=BaseModel)
_Loc = tuple[int | str, ...]

_MAX_FILE_BYTES = 256 << 10  # PyYAML reads some 100 KiB in a second
_MAX_MISTAKES = 20
_MAX_INDEX_DIGITS = 9
_MAX_MISTAKE_CHARS = 800


def load_config(path: Path, model: type[T]) -> T:
    """The configuration in the YAML file `path`; missing settings have their defaults.

    In a field of a type of `core.anchored_path`, a relative path (`model: models/x`) starts at the file's folder, and
    `~` is the home folder. Raises ConfigError with every mistake, one a line.
    """
    return parse_config(read_text(path), str(path), path.parent, model)


def parse_config(text: str, name: str, folder: Path, model: type[T]) -> T:
    """As `load_config`. `name` stands for the file in messages; relative paths start at `folder`."""
    try:
        loader = SettingsLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{name} is empty; it must name at least: {', '.join(_required(model))}")
        duplicates = [
            f"line {line}: {key} is set twice" for line, key in itertools.islice(_duplicate_keys(root), _MAX_MISTAKES)
        ]
        data = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_sentence(name, error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name} line {line}: holds a character that YAML does not allow") from error
    except RecursionError as error:
        raise ConfigError(f"{name} is nested too deeply") from error
    except ValueError as error:  # a scalar like an invalid date: 2026-13-99
        raise ConfigError(f"{name}: {error}; put text in quotes") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{name} must hold settings of the form 'name: value', one on each line")
    mistakes = duplicates
    try:
        config = model.model_validate(data, context=relative_to(folder))
    except ValidationError as error:
        details = mistakes_of(error, data)
        mistakes += [f"line {_line_of(root, location(d))}: {describe(d, model)}" for d in details[:_MAX_MISTAKES]]
        mistakes += [f": {len(details) - _MAX_MISTAKES} more mistakes"] if len(details) > _MAX_MISTAKES else []
    if mistakes:
        raise ConfigError("\n".join(f"{name} {_one_line(mistake)}" for mistake in mistakes))
    return config


def read_text(path: Path) -> str:
    """The text of a configuration file. Raises ConfigError."""
    try:
        with open_input(path) as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
            is_pipe = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; give the path of a configuration file") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    if is_pipe and not raw:
        raise ConfigError(f"{path} is a pipe that is empty now; save it as a file, because some files are read twice")
    if len(raw) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_FILE_BYTES >> 10} KiB; a configuration file is smaller")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} line {line}: is not UTF-8 text; save the file as UTF-8") from error


def top_level_settings(path: Path) -> frozenset[str]:
    """Names of the settings in the YAML file `path`: they show the kind of file. Empty if the file cannot be read;
    `load_config` reports the reason."""
    try:
        data = yaml.load(read_text(path), SettingsLoader)
    except (ConfigError, yaml.YAMLError, ValueError, RecursionError):
        return frozenset()
    return frozenset(map(str, data)) if isinstance(data, dict) else frozenset()


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """A copy of `config` with replaced settings. An override is `path.to.setting=value`, with a YAML value; relative
    paths start at the current folder.

    Raises ConfigError with every mistake, one a line.
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
            value = yaml.load(text, SettingsLoader)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        if (mistake := _put(data, keys, value)) is not None:
            mistakes.append(f"--set {override}: {mistake}")
            continue
        origin[tuple(int(part) if _is_index(part) else part for part in keys)] = override
    try:
        changed = type(config).model_validate(data, context=relative_to(Path.cwd()))
    except ValidationError as error:
        mistakes += [
            f"--set {_origin_of(origin, d['loc'])}: {describe(d, type(config))}" for d in mistakes_of(error, data)
        ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return changed


def dump_config(config: BaseModel, *, only_set: bool = False) -> str:
    """All settings as YAML, or only those that were given when `config` was made. `load_config` reads them back to an
    equal value."""
    data = config.model_dump(mode="json", exclude_unset=only_set)
    return yaml.dump(data, Dumper=SettingsDumper, sort_keys=False, allow_unicode=True)


def _one_line(mistake: str) -> str:
    """Without characters that would move the cursor, and not longer than a few lines of a terminal."""
    text = mistake if len(mistake) <= _MAX_MISTAKE_CHARS else mistake[:_MAX_MISTAKE_CHARS] + "..."
    return printable(text)


def _syntax_sentence(name: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{name} line {mark.line + 1}" if mark else name
    problem = error.problem or "is not valid YAML"
    if "'\\t'" in problem:
        return f"{where}: begins with a tab; YAML is indented with spaces"
    if "single document" in (error.context or ""):
        return f"{where}: begins a second document ('---'); keep one document"
    if isinstance(error, UnreasonableYamlError):
        return f"{where}: {problem}"
    return f"{where}: is not valid YAML ({problem})"


def _required(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.is_required()]


def _duplicate_keys(root: yaml.Node) -> Iterator[tuple[int, str]]:
    """(line, path) of every repeated key of a mapping. Each node is visited once, so cyclic aliases end."""
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
    """Line of the setting at `loc`; of its innermost existing section if the file lacks the setting."""
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
            if not _is_index(key) or int(key) >= len(section):
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


def _is_index(key: str) -> bool:
    return key.isdecimal() and len(key) <= _MAX_INDEX_DIGITS


def _origin_of(origin: dict[_Loc, str], loc: _Loc) -> str:
    """The override that set `loc`: the one with the longest common path."""
    matches = [keys for keys in origin if keys == loc[: len(keys)] or loc == keys[: len(loc)]]
    return origin[max(matches, key=len)] if matches else ".".join(map(str, loc))
