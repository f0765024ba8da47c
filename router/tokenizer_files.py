"""Reads the text side of a checkpoint folder as `transformers` (its `TokenizersBackend`) does, or refuses it.

tokenizer.json decides how text becomes ids. tokenizer_config.json adds and marks tokens, names some, and may have the
chat template. special_tokens_map.json and added_tokens.json count if tokenizer_config.json has no
`added_tokens_decoder`. Templates of chat_template.jinja and of additional_chat_templates/ replace the others.
generation_config.json and config.json say which tokens end a generation.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from tandem.core.errors import CheckpointError, TandemError
from tandem.core.input_file import read_input
from tandem.router.limits import clipped

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_VOCAB_SIZE = 1 << 31
_MAX_TOKENIZER_BYTES, _MAX_JSON_BYTES, _MAX_TEMPLATE_BYTES = 512 << 20, 100 << 20, 4 << 20
_SUBWORD_PREFIX = re.compile(r'"continuing_subword_prefix"\s*:\s*"[^"]')
_WORDPIECE = re.compile(r'"type"\s*:\s*"WordPiece"')


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """`named_tokens` are for the chat template, such as `bos_token`. `eos_token_ids` end a generation.

    `vocab_size` is the model's, or the tokenizer's if config.json does not have it. `template_names` are those of the
    chat templates if there are several without a default; `chat_template` is then None.
    """

    tokenizer: Tokenizer
    named_tokens: Mapping[str, str]
    eos_token_ids: frozenset[int]
    vocab_size: int
    chat_template: str | None
    template_names: tuple[str, ...] = ()


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Raises CheckpointError for a file that is missing, damaged, or asks for what is not supported."""
    tokenizer = _read_tokenizer(folder)
    settings = read_json(folder / "tokenizer_config.json")
    config = read_json(folder / "config.json")
    generation_config = read_json(folder / "generation_config.json")
    _check_supported(settings, tokenizer)
    with library_errors("tokenizer_config.json"):
        named_tokens = _add_tokens(tokenizer, settings, folder)
    vocab_size = config.get("vocab_size")
    if vocab_size is None:
        vocab_size = tokenizer.get_vocab_size()
    elif type(vocab_size) is not int or not 1 <= vocab_size <= _MAX_VOCAB_SIZE:
        raise CheckpointError(f"The checkpoint's config.json has the vocab_size {vocab_size!r}, which is not a size.")
    templates = _chat_templates(folder, settings)
    return TokenizerFiles(
        tokenizer,
        named_tokens,
        _eos_token_ids(tokenizer, named_tokens, vocab_size, config, generation_config),
        vocab_size,
        templates.get("default"),
        () if "default" in templates else tuple(sorted(templates)),
    )


@contextmanager
def library_errors(name: str) -> Iterator[None]:
    """Raises CheckpointError, naming a file, for whatever the `tokenizers` library raises; panics of its Rust code too.

    The library raises plain Exception, and PanicException, which is not an Exception and has no public name.
    """
    try:
        yield
    except TandemError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"The checkpoint's {name} is damaged: {error}") from error


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        others = [
            name for name in ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt") if (folder / name).exists()
        ]
        found = f", only {others[0]}" if others else ""
        raise CheckpointError(
            f"The checkpoint {folder} has no tokenizer.json{found}; write one with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    try:
        content = read_input(path, _MAX_TOKENIZER_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"The checkpoint's tokenizer.json cannot be read: {error}") from error
    if _SUBWORD_PREFIX.search(content) and not _WORDPIECE.search(content):  # the library may end the process
        raise CheckpointError(
            "The checkpoint's tokenizer.json has a 'continuing_subword_prefix', which is not supported for BPE."
        )
    with library_errors("tokenizer.json"):
        tokenizer = Tokenizer.from_str(content)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if not tokenizer.get_vocab_size():
            raise CheckpointError("The checkpoint's tokenizer.json has an empty vocabulary.")
        return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file. Raises CheckpointError."""
    try:
        content = json.loads(read_input(path, _MAX_JSON_BYTES).decode())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"The checkpoint's {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"The checkpoint's {path.name} is not a JSON object.")
    return content


def _check_supported(settings: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Refuse settings that change the text or the ids, and that this server does not have."""
    cleans_bpe = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    if settings.get("split_special_tokens"):
        raise CheckpointError("'split_special_tokens' of the checkpoint's tokenizer_config.json is not supported.")
    if settings.get("clean_up_tokenization_spaces") and (
        settings.get(cleans_bpe) or not isinstance(tokenizer.model, models.BPE)
    ):
        raise CheckpointError(
            "'clean_up_tokenization_spaces' of the checkpoint's tokenizer_config.json is not supported; "
            "set it to false, and spaces before punctuation stay in the text."
        )


def _add_tokens(tokenizer: Tokenizer, settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """Add the tokens of the settings to the tokenizer, mark the special ones, and return the named ones."""
    listed = settings.get("added_tokens_decoder")
    if listed is not None:
        known = _listed_tokens(listed)
    else:
        settings = _with_special_tokens_map(settings, read_json(folder / "special_tokens_map.json"))
        known = _legacy_tokens(read_json(folder / "added_tokens.json"), settings)
        known |= tokenizer.get_added_tokens_decoder()
    named = _named_tokens(settings)
    to_add = [token for _, token in sorted(known.items())]
    contents = {token.content for token in (*to_add, *tokenizer.get_added_tokens_decoder().values())}
    for token in (*named.values(), *_extra_tokens(settings)):
        if token.content not in contents:
            contents.add(token.content)
            to_add.append(token)
    names = {token.content for token in named.values()}
    for token in to_add:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(to_add)
    for token_id, token in known.items():
        if tokenizer.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"The checkpoint's files disagree: the token '{token.content}' has the id {token_id} in one, and "
                f"{tokenizer.token_to_id(token.content)} in tokenizer.json."
            )
    return {name: token.content for name, token in named.items()}


def _token(value: Any, name: str) -> AddedToken:
    """A token as a string, which is special, or as an object. Raises CheckpointError."""
    if isinstance(value, str) and value:
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(content := value.get("content"), str) and content:
        flags = {flag: value[flag] for flag in _TOKEN_FLAGS if flag in value}
        if all(type(flag) is bool for flag in flags.values()):
            return AddedToken(content, **flags)
    raise CheckpointError(f"The checkpoint's {name} is not a token: {clipped(repr(value))}.")


def _listed_tokens(listed: Any) -> dict[int, AddedToken]:
    name = "'added_tokens_decoder' of tokenizer_config.json"
    if not isinstance(listed, dict):
        raise CheckpointError(f"The checkpoint's {name} is not a JSON object.")
    tokens = {}
    for token_id, value in listed.items():
        if not token_id.isdecimal() or not isinstance(value, dict):
            raise CheckpointError(f"The checkpoint's {name} has an entry that is not a token: {clipped(token_id)}.")
        tokens[int(token_id)] = _token(value, name)
    return tokens


def _with_special_tokens_map(settings: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in special_tokens_map.items():
        if isinstance(value, dict) and key != "extra_special_tokens":
            value = {**value, "special": True}
        merged[key] = value
    return merged


def _legacy_tokens(added_tokens: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    special = {token.content for token in (*_named_tokens(settings).values(), *_extra_tokens(settings))}
    tokens = {}
    for content, token_id in added_tokens.items():
        if type(token_id) is not int or not content:
            raise CheckpointError(
                f"The checkpoint's added_tokens.json has no id for the token {clipped(repr(content))}."
            )
        is_special = content in special
        tokens[token_id] = AddedToken(content, normalized=not is_special, special=is_special)
    return tokens


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The usual names, and every other that ends with `_token`, such as `image_token` of a multimodal model."""
    extra = settings.get("extra_special_tokens")
    values = {name: settings.get(name) for name in _NAMED_TOKENS}
    values |= {
        key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str | dict)
    }
    values |= extra if isinstance(extra, dict) else {}
    return {name: _token(value, f"'{name}'") for name, value in values.items() if value is not None}


def _extra_tokens(settings: Mapping[str, Any]) -> list[AddedToken]:
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        return []
    if not isinstance(extra, list):
        raise CheckpointError("The checkpoint's 'additional_special_tokens' are not a list.")
    return [_token(value, "'additional_special_tokens'") for value in extra]


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The source of each template by name. Files replace those of tokenizer_config.json."""
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (file := folder / "chat_template.jinja").exists():
        files["default"] = file
    try:
        templates: Any = {name: read_input(file, _MAX_TEMPLATE_BYTES).decode() for name, file in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"The checkpoint's chat template cannot be read: {error}") from error
    if not templates:
        templates = settings.get("chat_template")
        if templates is None:
            return {}
        if isinstance(templates, str):
            templates = {"default": templates}
        elif isinstance(templates, list) and all(isinstance(entry, dict) for entry in templates):
            templates = {entry.get("name"): entry.get("template") for entry in templates}
    if not isinstance(templates, dict) or not all(
        isinstance(name, str) and isinstance(source, str) for name, source in templates.items()
    ):
        raise CheckpointError("The checkpoint's chat template is not text.")
    return templates


def _eos_token_ids(
    tokenizer: Tokenizer,
    named_tokens: Mapping[str, str],
    vocab_size: int,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
) -> frozenset[int]:
    """End-of-sequence tokens of all files: a model may end an answer with any of them."""
    found: set[int] = set()
    for name, source in (("config.json", config), ("generation_config.json", generation_config)):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise CheckpointError(
                    f"The checkpoint's {name} has the eos_token_id {clipped(repr(token_id))}, which is not a token id "
                    f"of its vocabulary of {vocab_size}."
                )
            found.add(token_id)
    if (eos := named_tokens.get("eos_token")) is not None:
        token_id = tokenizer.token_to_id(eos)
        if token_id is not None and token_id < vocab_size:
            found.add(token_id)
    return frozenset(found)
