"""What a checkpoint recommends for requests that do not say how to sample: some values of generation_config.json.

They are those that vLLM takes (`--generation-config auto`). As there, `do_sample` does not count: a request is greedy
where its temperature is 0. Which tokens end a generation is in `router/tokenizer_files.py`.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tandem.core.completion import SamplingDefaults
from tandem.core.errors import CheckpointError, InvalidRequestError
from tandem.core.request import SamplingParams
from tandem.core.sampling_ranges import INT32_MAX, check_range, check_sampling
from tandem.router.limits import clipped
from tandem.router.tokenizer_files import read_json

_LOG = logging.getLogger(__name__)

_FILE = "generation_config.json"
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
}


def load_sampling_defaults(folder: Path, source: Literal["auto", "none"]) -> SamplingDefaults:
    """Of a checkpoint; with `none`, nothing of it. Raises CheckpointError for a value that no request may have."""
    if source == "none":
        return SamplingDefaults()
    config = read_json(folder / _FILE)
    values = {name: value for name, kinds in _FIELDS.items() if (value := _value(config, name, kinds)) is not None}
    if values.get("top_k") == -1:  # as in requests: no limit
        values["top_k"] = 0
    max_tokens = _value(config, "max_new_tokens", (int,))
    try:
        sampling = SamplingParams(**values)
        check_sampling(sampling)
        if max_tokens is not None:
            check_range("max_new_tokens", max_tokens, 1, INT32_MAX)
    except InvalidRequestError as error:
        raise _wrong(error.message) from error
    usual = asdict(SamplingParams())
    found = {name: value for name, value in values.items() if value != usual[name]}
    found |= {} if max_tokens is None else {"max_new_tokens": max_tokens}
    if found:
        listed = ", ".join(f"{name} {value:g}" for name, value in found.items())
        _LOG.info("requests that do not say otherwise get %s, as generation_config.json says", listed)
    return SamplingDefaults(sampling, max_tokens)


def _value(config: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> Any:
    value = config.get(name)
    if value is not None and type(value) not in kinds:
        raise _wrong(f"'{name}' is {clipped(repr(value))}.")
    return value


def _wrong(what: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's {_FILE} has a value that no request may have: {what} Mend it, or set "
        "router.generation_config: none."
    )
