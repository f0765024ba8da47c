"""Serve, router, worker, SLO and plan files, and traces, with every field damaged in every way we could think of."""

import copy
import csv
import gzip
import io
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.config import RouterConfig, ServeConfig, WorkerConfig
from tandem.core.config_file import load_config, top_level_settings
from tandem.core.errors import ConfigError
from tandem.core.frozen_model import FrozenModel
from tandem.core.plan import Plan
from tandem.core.slo import SloClass
from tandem.core.slo_file import SloFile
from tandem.placement.workload.traces import read_trace
from tests.fuzz.volume import tries, volumes

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS: dict[str, type[FrozenModel]] = {
    "serve.yaml": ServeConfig,
    "laptop-2p2d.yaml": ServeConfig,
    "router.yaml": RouterConfig,
    "prefill_worker.yaml": WorkerConfig,
    "decode_worker.yaml": WorkerConfig,
    **{path.name: SloFile for path in sorted(EXAMPLES.glob("slo-*.yaml"))},
    **{path.name: Plan for path in sorted(EXAMPLES.glob("plan-*.yaml"))},
}
GOOD = {name: yaml.safe_load((EXAMPLES / name).read_text()) for name in KINDS}

_INSIDES = re.compile(r"Traceback|<class|object at 0x|\w+Error\b|\.py\b|pydantic|set_int_max_str_digits|sys\.")
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)

SCALARS: list[Any] = [
    None, True, False, 0, -1, 1, 2, -0.0, 0.5, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan, 1 << 31, 1 << 63,
    1 << 64, -(1 << 63), 10**400, "", " ", "\0", "x", "é𝄞\u202e", "x" * 3000, "1", "1.5", "nan", "true", "null",
    "512XiB", "1e999 GiB", "²:²", "localhost:99999", "[::1", ":", "~nobody-here/x", "/" * 4000, "../" * 2000, "~",
    "/dev/zero", "2026-13-99", "{{x}}", "%s", "!!python/object:os.system", "\ud83d\ude00",
]  # fmt: skip
LISTS: list[Any] = [[], [None], [[]], [[[[]]]], ["x"] * 200, [1, 2], {}, {"x": 1}, {"": None}, {"x": {"y": {"z": []}}}]


def _paths(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in items for path in ((*prefix, key), *_paths(value, (*prefix, key)))]


@st.composite
def damaged_data(draw: st.DrawFn) -> tuple[str, str]:
    """Name of an example, and its text with one or two values changed, removed or added."""
    name = draw(st.sampled_from(sorted(GOOD)))
    data = copy.deepcopy(GOOD[name])
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(_paths(data) or [("model",)]))
        place = data
        for key in parents:
            place = place[key]
        match draw(st.integers(0, 9)):
            case 0:
                del place[last]
            case 1:
                place = place if isinstance(place, dict) else data
                place[draw(st.sampled_from(["", "x", "modell", "engine", 1, True]))] = copy.deepcopy(
                    draw(st.sampled_from(SCALARS))
                )
            case 2:
                place[last] = copy.deepcopy(draw(st.sampled_from(LISTS)))
            case _:
                values = st.sampled_from(SCALARS) | st.text(max_size=8) | st.floats() | st.integers()
                place[last] = copy.deepcopy(draw(values))  # a list is changed by the next draw
    return name, yaml.dump(data, sort_keys=False, allow_unicode=draw(st.booleans()))


@st.composite
def damaged_text(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name of an example, and its bytes after an accident."""
    name = draw(st.sampled_from(sorted(GOOD)))
    text = (EXAMPLES / name).read_text()
    lines = text.splitlines(keepends=True)
    at = draw(st.integers(0, len(lines) - 1))
    before, after = "".join(lines[:at]), "".join(lines[at:])
    digits = "9" * draw(st.sampled_from([400, 5000, 100_000]))
    damage = draw(
        st.sampled_from(
            [
                text.replace("\n", "\r\n").encode(),
                text.replace("\n", "\r").encode(),
                b"\xef\xbb\xbf" + text.encode(),
                text.encode("utf-16"),
                text.encode("utf-32"),
                text.encode("latin-1", "replace") + b"\xe9\xff",
                gzip.compress(text.encode()),
                b"",
                b"\0" * 100,
                b"#",
                b"- 1\n- 2\n",
                b"just text",
                f"{before}\t{after}".encode(),
                f"{before}---\n{after}".encode(),
                f"{before}{text}".encode(),  # every setting twice
                f"{before}{lines[at]}{after}".encode(),
                f"{before}{lines[at].rstrip()}: x\n{after}".encode(),
                f"{before}x: {'[' * 3000}\n{after}".encode(),
                f"{before}x: {'[' * 3000}{']' * 3000}\n{after}".encode(),
                f"{before}{'{x: ' * 900}1{'}' * 900}: 2\n{after}".encode(),
                f"{before}x: &x [*x]\n{after}".encode(),
                f"{before}x: *nowhere\n{after}".encode(),
                f"{before}<<: 1\n{after}".encode(),
                f"{before}? [1, 2]\n: 3\n{after}".encode(),
                f"{before}x: !!binary '=='\n{after}".encode(),
                f"{before}x: !!python/object/apply:os.system ['true']\n{after}".encode(),
                f"{before}x: 2026-13-99\n{after}".encode(),
                f"{before}x: {digits}\n{after}".encode(),
                f"{before}x: 0x{digits}\n{after}".encode(),
                f"{text}\nmodel_name: 0x{digits}\n".encode(),
                (_BOMB + text).encode(),
                f"{text}\n{_BOMB}".encode(),
                before.encode(),
                after.encode(),
            ]
        )
        | st.binary(max_size=100).map(lambda junk: before.encode() + junk + after.encode())
    )
    return name, damage


def _check_message(path: Path, message: str) -> None:
    for line in message.splitlines():
        assert re.match(rf"{re.escape(str(path))}( line \d+)?[: ]", line), line
        assert not _INSIDES.search(line.removeprefix(str(path))), line
        assert len(line) < 1000 + len(str(path)), line


def _check_file(path: Path, raw: bytes, kind: type[FrozenModel]) -> bool:
    """Whether the file was taken. It is read within seconds, or refused in sentences that name it."""
    path.write_bytes(raw)
    try:
        top_level_settings(path)
        load_config(path, kind)
    except ConfigError as error:
        _check_message(path, error.message)
        return False
    return True


@volumes(sample=100, many=10_000)
def test_values(count: int, tmp_path: Path) -> None:
    outcomes: Counter[bool] = Counter()

    @tries(count)
    @given(damaged_data())
    def check(given: tuple[str, str]) -> None:
        name, text = given
        raw = text.encode("utf-8", "surrogatepass")
        outcomes[_check_file(tmp_path / name, raw, KINDS[name])] += 1

    check()
    assert outcomes[False] > count // 4
    assert outcomes[True] > count // 50


@volumes(sample=60, many=4_000)
def test_text(count: int, tmp_path: Path) -> None:
    @tries(count)
    @given(damaged_text())
    def check(given: tuple[str, bytes]) -> None:
        name, raw = given
        _check_file(tmp_path / name, raw, KINDS[name])

    check()


def test_a_file_of_any_content_is_read_in_seconds(tmp_path: Path) -> None:
    """Not the time is asserted: without bounds, each of these takes minutes or all memory."""
    merges = "a: &a {x: 1, y: 2}\n" + "".join(
        f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n" for a, b in itertools.pairwise("abcdefgh")
    )
    copies = "x: &a [" + "x," * 9000 + "]\nverdict: mixed\ngroups:\n- {role: decode, devices: [" + "*a," * 9000 + "]}\n"
    for text, sentence in (
        ("x: " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
        (merges, "stand for too many values"),
        (copies, "stand for too many values"),
        ("model: m\nmodel_name: 0x" + "9" * 5000, "has a number with too many digits"),
        ("model: m\n" + "x:\n" * 3000, "x is set twice"),
        ("model: m\n" + "".join(f"k{i}: 1\n" for i in range(1020)), ": 1000 more mistakes"),
        ("model: ~nobody-at-all/x\n", "is not the path of a file or folder"),
        ('model: m\nrouter: {http: "\\x85\\e[2J"}\n', r"'\x85\x1b[2J' is not an address"),
    ):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(path, Plan if "verdict" in text else ServeConfig)
        assert sentence in caught.value.message
        assert len(caught.value.message) < 20_000


# --- traces ----------------------------------------------------------------------------------------------------------

CSV_ROWS = [
    {"arrival_s": "0", "prompt_tokens": "10", "output_tokens": "5", "slo_class": "fast"},
    {"arrival_s": "1.5", "prompt_tokens": "20", "output_tokens": "0", "slo_class": "fast"},
    {"arrival_s": "2", "prompt_tokens": "30", "output_tokens": "7", "slo_class": "slow"},
]
AZURE_ROWS = [
    {"TIMESTAMP": "2023-11-16 18:15:46.680590", "ContextTokens": "374", "GeneratedTokens": "44"},
    {"TIMESTAMP": "2023-11-16 18:15:50.951690", "ContextTokens": "396", "GeneratedTokens": "109"},
]
JSON_ROWS = [
    {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2]},
    {"timestamp": 20, "input_length": 1500, "output_length": 7, "hash_ids": [1, 2, 3]},
]
CLASSES = tuple(SloClass(name=name, ttft_s=1.0, tpot_s=0.1) for name in ("fast", "slow"))
_CELLS = ["", " ", "x", "-1", "1e400", "nan", "inf", "1.5", "²", "١", "9" * 5000, "\0", '"', "0x10", "1_000", "true"]
_DATES = [
    "2023-11-16",
    "0001-01-01",
    "9999-12-31T23:59:59+00:00",
    "2023-11-16 18:15:46-23:59",
    "0001-01-01T00:00+14:00",
]


@st.composite
def damaged_trace(draw: st.DrawFn) -> tuple[str, bytes]:
    rows: list[dict[Any, Any]] = copy.deepcopy(draw(st.sampled_from([CSV_ROWS, AZURE_ROWS, JSON_ROWS])))
    is_json = "timestamp" in rows[0]
    row = draw(st.sampled_from(rows))
    name = draw(st.sampled_from(sorted(row)))
    cells = st.sampled_from(SCALARS + LISTS) if is_json else st.sampled_from(_CELLS + _DATES) | st.text(max_size=9)
    match draw(st.integers(0, 7)):
        case 0:
            del row[name]
        case 1:
            pass  # sound rows, of which only the file may be damaged
        case _:
            row[name] = draw(cells)
    if is_json:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        raw = file.getvalue().encode("utf-8", "surrogatepass")
    at = draw(st.integers(0, len(raw)))
    compressed = draw(st.integers(0, 3)) == 0
    match draw(st.integers(0, 9)):
        case 0:
            raw = raw[:at] + draw(st.binary(max_size=9)) + raw[at:]
        case 1:
            raw = raw[:at]
        case 2:
            raw = draw(st.sampled_from([b"\xef\xbb\xbf" + raw, raw.replace(b"\n", b"\r"), b"", b"\0", b"[" * 9000]))
    suffix = ".jsonl" if is_json else ".csv"
    if not compressed:
        return f"trace{suffix}", raw
    packed = gzip.compress(raw, mtime=0)
    return f"trace{suffix}.gz", packed if draw(st.booleans()) else packed[: draw(st.integers(0, len(packed)))]


@volumes(sample=100, many=10_000)
def test_traces(count: int, tmp_path: Path) -> None:
    outcomes: Counter[bool] = Counter()

    @tries(count)
    @given(damaged_trace())
    def check(given: tuple[str, bytes]) -> None:
        path = tmp_path / given[0]
        path.write_bytes(given[1])
        try:
            requests = read_trace(path, CLASSES).requests
        except ConfigError as error:
            _check_message(path, error.message)
            outcomes[False] += 1
        else:
            assert (requests.prompt_tokens > 0).all()
            outcomes[True] += 1

    check()
    assert outcomes[False] > count // 4
    assert outcomes[True] > count // 50
