"""Log lines of routers, instances and the controller: text for people, or one JSON object a line for machines.

A JSON line has `time` (UTC), `level`, `logger`, `process` (the name of the router or instance) and `message`; a line
about a request has its `request_id`; a line with an exception has its traceback in `error`. What is logged as
`LogFields` has each of them beside the message.

    {"time": "2026-11-28T18:30:00.125Z", "level": "info", "logger": "tandem.router.records", "process": "router",
     "message": "request", "request_id": "b1f0...", "outcome": "length", ...}
"""

import json
import logging
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from tandem.core.printable import printable

LogFormat = Literal["text", "json"]

log = logging.getLogger(__name__)

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LogFields(dict[str, Any]):
    """The only argument of a log call with the message "WORDS %s". As text, it is JSON after the words."""

    def __str__(self) -> str:
        return json.dumps(self)


def about(request_id: str) -> dict[str, str]:
    """The argument `extra` of a log call about a request."""
    return {"request_id": request_id}


class TextFormatter(logging.Formatter):
    """A message is one line of printable text, so that text from a client's request can neither forge lines nor move
    the cursor of a terminal. A traceback follows in lines of its own."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, as the module describes."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
        }
        if isinstance(record.args, LogFields):
            line |= {"message": record.msg.removesuffix(" %s")} | record.args
        else:
            line["message"] = record.getMessage()
        if (request_id := getattr(record, "request_id", None)) is not None:
            line["request_id"] = request_id
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(log_format: LogFormat, process: str, level: int = logging.INFO) -> None:
    """Configure the log of this process, on stderr. As JSON, also warnings of libraries and errors that end the process
    are lines. `process` is the name of the process in these lines."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(JsonFormatter(process))
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
    else:
        handler.setFormatter(TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # the router says its addresses itself


def configured_format() -> LogFormat:
    """The format of this process, for its child processes."""
    is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
    return "json" if is_json else "text"


def announce(logger: logging.Logger, text: str) -> None:
    """Tell the user who has started this process: a line on stdout, or with JSON a log line."""
    if configured_format() == "json":
        logger.info("%s", text.strip())
    else:
        print(text, flush=True)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("the process ends with an error", exc_info=(kind, error, trace))
