"""Log lines in JSON: one object a line, whatever is logged."""

import json
import logging
import subprocess
import sys
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.log_lines import JsonFormatter, LogFields, TextFormatter, about


def line_of(message: str, *arguments: Any, error: Exception | None = None, **extra: Any) -> dict[str, Any]:
    exc_info = None if error is None else (type(error), error, None)
    record = logging.getLogger("tandem.test").makeRecord(
        "tandem.test", logging.INFO, __file__, 1, message, arguments, exc_info, extra=extra
    )
    text = JsonFormatter("decode-0").format(record)
    assert "\n" not in text
    line: dict[str, Any] = json.loads(text)
    assert (line["level"], line["logger"], line["process"]) == ("info", "tandem.test", "decode-0")
    return line


@given(st.text(), st.text())
def test_any_text_is_one_line(message: str, request_id: str) -> None:
    line = line_of("it is %s", message, **about(request_id))
    assert (line["message"], line["request_id"]) == (f"it is {message}", request_id)


@given(st.text())
def test_a_client_can_forge_no_line_of_text(message: str) -> None:
    record = logging.LogRecord("tandem.test", logging.INFO, "", 1, "it is %s", (f"\n\x1b[2J{message}",), None)
    line = TextFormatter().format(record)
    assert line.isprintable()
    assert "tandem.test: it is \\n\\x1b[2J" in line


def test_fields_are_beside_the_message_and_json_in_text() -> None:
    fields = LogFields({"request_id": "r", "parts": {"prefill_s": 0.5}})
    line = line_of("request %s", fields)
    assert (line["message"], line["request_id"], line["parts"]) == ("request", "r", {"prefill_s": 0.5})
    record = logging.LogRecord("x", logging.INFO, "", 1, "request %s", (fields,), None)
    assert json.loads(record.getMessage().removeprefix("request ")) == fields


def test_times_are_utc_with_milliseconds_and_errors_have_their_traceback() -> None:
    line = line_of("failed", error=ValueError("two\nlines"))
    assert line["time"].endswith("Z")
    assert len(line["time"]) == len("2026-11-28T18:30:00.125Z")
    assert "ValueError: two\nlines" in line["error"]


def test_warnings_announcements_and_the_last_error_are_lines_too() -> None:
    program = (
        "import logging, warnings\n"
        "from tandem.core.log_lines import announce, configure_logging, configured_format\n"
        "configure_logging('text', 'p')\n"
        "announce(logging.getLogger('p'), 'ready')\n"
        "assert configured_format() == 'text'\n"
        "configure_logging('json', 'p')\n"
        "assert configured_format() == 'json'\n"
        "announce(logging.getLogger('p'), 'ready')\n"
        "warnings.warn('old')\n"
        "raise ValueError('the end')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ready\n"
    ready, warning, end = map(json.loads, done.stderr.splitlines())
    assert (ready["message"], warning["logger"]) == ("ready", "py.warnings")
    assert (end["level"], end["error"].splitlines()[-1]) == ("critical", "ValueError: the end")
