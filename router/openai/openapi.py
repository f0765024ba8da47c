"""The OpenAPI document of the HTTP API: what the parser of requests takes, and every status that is answered."""

from collections.abc import Mapping
from typing import Any

from tandem.core.sampling_ranges import INT32_MAX, MAX_LOGPROBS, RANGES
from tandem.core.slo import MAX_TARGET_S
from tandem.router.limits import (
    MAX_CHOICES_PER_PROMPT,
    MAX_ID_CHARS,
    MAX_MESSAGES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
)
from tandem.router.openai.validation import IGNORED, UNSUPPORTED
from tandem.router.request_headers import SLO, TENANT, TPOT_MS, TTFT_MS

_Schema = dict[str, Any]

_ERRORS = {
    400: "A field, the JSON or the chat template is wrong, or the prompt does not fit the model's context.",
    401: "The server needs an API key, and the request has none, or one that is not valid.",
    403: "The Host header names another server than this one, or the API key belongs to another tenant.",
    404: "There is no such model.",
    405: "The path does not take this method; the header allow has those that it takes.",
    408: "The body did not arrive in time.",
    409: "A request with this id is running.",
    413: "The body is too large.",
    415: "The body is compressed, or not of the content type application/json.",
    431: "The headers are too large.",
    429: "Queues are full; try again later.",
    500: "An internal error; the router's log has the reason.",
    503: "No instance is ready, or an instance of the request is lost; try again later.",
    504: "The request's deadline has passed.",
}


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _optional(kind: str, **limits: Any) -> _Schema:
    """Null counts as not given, in every field."""
    return {"type": [kind, "null"], **limits}


def _ranged(kind: str, name: str, default: float) -> _Schema:
    low, high, above_low = RANGES[name]
    return _optional(kind, **{"exclusiveMinimum" if above_low else "minimum": low, "maximum": high, "default": default})


def _of_checkpoint(kind: str, otherwise: float, description: str = "", **limits: Any) -> _Schema:
    """A field whose default the checkpoint may say: the document is of all checkpoints."""
    text = f"Without it: as generation_config.json says, else {otherwise:g}"
    return _optional(kind, **limits, description=f"{description}. {text}" if description else text)


def _ranged_of_checkpoint(name: str, otherwise: float) -> _Schema:
    low, high, above_low = RANGES[name]
    return _of_checkpoint(
        "number", otherwise, "", **{"exclusiveMinimum" if above_low else "minimum": low, "maximum": high}
    )


def _object(properties: Mapping[str, _Schema], *required: str, is_closed: bool = False) -> _Schema:
    schema: _Schema = {"type": "object", "properties": dict(properties), "required": list(required)}
    return schema | {"additionalProperties": False} if is_closed else schema


def _array(items: _Schema, **limits: Any) -> _Schema:
    return {"type": "array", "items": items, **limits}


_TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": INT32_MAX}
_TOKEN_IDS = _array(_TOKEN_ID, minItems=1)
_STRING = {"type": "string"}
_BOOLEAN = _optional("boolean", default=False)

_COMMON_FIELDS: Mapping[str, _Schema] = {
    "model": _STRING | {"description": "The served model's name, as in /v1/models"},
    "temperature": _ranged_of_checkpoint("temperature", 1.0),
    "top_p": _of_checkpoint("number", 1.0, "0 leaves one token", minimum=0.0, maximum=1.0),
    "presence_penalty": _ranged("number", "presence_penalty", 0.0),
    "frequency_penalty": _ranged("number", "frequency_penalty", 0.0),
    "seed": _optional("integer", minimum=-(1 << 63), maximum=(1 << 63) - 1),
    "n": _optional("integer", minimum=1, maximum=MAX_CHOICES_PER_PROMPT, default=1),
    "stop": {
        "anyOf": [
            _optional("string", maxLength=MAX_STOP_CHARS),
            _array(_STRING | {"maxLength": MAX_STOP_CHARS}, maxItems=MAX_STOP_STRINGS),
        ]
    },
    "max_tokens": _optional("integer", minimum=1, maximum=INT32_MAX),
    "max_completion_tokens": _optional("integer", minimum=1, maximum=INT32_MAX),
    "stream": _BOOLEAN,
    "stream_options": _optional(
        "object",
        properties={
            "include_usage": _BOOLEAN,
            "continuous_usage_stats": _BOOLEAN,
            "include_obfuscation": _BOOLEAN,
        },
        additionalProperties=False,
    ),
    "top_k": _of_checkpoint("integer", 0, "0 and -1: no limit", minimum=-1, maximum=INT32_MAX),
    "min_p": _ranged_of_checkpoint("min_p", 0.0),
    "repetition_penalty": _ranged_of_checkpoint("repetition_penalty", 1.0),
    "ignore_eos": _BOOLEAN,
    "stop_token_ids": {"type": ["array", "null"], "items": _TOKEN_ID, "maxItems": MAX_STOP_TOKENS},
    "cache_salt": _optional("string", maxLength=MAX_ID_CHARS),
    "tandem": _optional(
        "object",
        properties={
            "timeline": _BOOLEAN,
            "slo": _STRING | {"description": "An SLO class of the router, as the header x-tandem-slo"},
            "ttft_s": _optional("number", exclusiveMinimum=0, maximum=MAX_TARGET_S, description="A target of its own"),
            "tpot_s": _optional("number", exclusiveMinimum=0, maximum=MAX_TARGET_S, description="Another one"),
        },
        additionalProperties=False,
    ),
    **{name: {"description": "Without effect"} for name in sorted(IGNORED)},
    **{
        name: {"enum": [None, *UNSUPPORTED[name]], "description": "Not supported: only values that ask for nothing"}
        for name in sorted(UNSUPPORTED)
    },
}

_MESSAGE = _object(
    {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {
            "anyOf": [
                _STRING,
                _array(_object({"type": {"const": "text"}, "text": _STRING}, "type", "text")),
            ]
        },
    },
    "role",
    "content",
)
_CHAT_FIELDS = {
    **_COMMON_FIELDS,
    "messages": _array(_MESSAGE, minItems=1, maxItems=MAX_MESSAGES),
    "logprobs": _BOOLEAN,
    "top_logprobs": _optional("integer", minimum=0, maximum=MAX_LOGPROBS),
}
_COMPLETION_FIELDS = {
    **_COMMON_FIELDS,
    "prompt": {
        "anyOf": [
            _STRING,
            _array(_STRING, minItems=1),
            _TOKEN_IDS,
            _array(_TOKEN_IDS, minItems=1),
        ]
    },
    "max_tokens": _optional("integer", minimum=0, maximum=INT32_MAX, default=16, description="0 only with echo"),
    "echo": _BOOLEAN,
    "logprobs": _optional("integer", minimum=0, maximum=MAX_LOGPROBS),
}

_COUNT = {"type": "integer", "minimum": 0}
_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}, "cached_tokens"),
        "tandem": {"type": "object", "description": "Timelines, where the request asks for them"},
    },
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "prompt_tokens_details",
)
_FINISH_REASON = {"enum": ["stop", "length"]}
_NULLABLE_OBJECT = {"type": ["object", "null"]}


def _response(kind: str, choice: Mapping[str, _Schema]) -> _Schema:
    whole: dict[str, _Schema] = {
        "index": _COUNT,
        "logprobs": _NULLABLE_OBJECT,
        "finish_reason": _FINISH_REASON,
        **choice,
    }
    return _object(
        {
            "id": _STRING,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _STRING,
            "choices": _array(_object(whole, *whole), minItems=1),
            "usage": _USAGE,
        },
        *("id", "object", "created", "model", "choices", "usage"),
    )


_SCHEMAS: Mapping[str, _Schema] = {
    "ChatRequest": _object(_CHAT_FIELDS, "model", "messages", is_closed=True),
    "CompletionRequest": _object(_COMPLETION_FIELDS, "model", "prompt", is_closed=True),
    "ChatResponse": _response(
        "chat.completion",
        {"message": _object({"role": {"const": "assistant"}, "content": _STRING}, "role", "content")},
    ),
    "CompletionResponse": _response("text_completion", {"text": _STRING}),
    "Model": _object(
        {
            "id": _STRING,
            "object": {"const": "model"},
            "created": _COUNT,
            "owned_by": _STRING,
            "max_model_len": {"type": ["integer", "null"], "description": "null while no instance is ready"},
        },
        *("id", "object", "created", "owned_by", "max_model_len"),
    ),
    "Health": _object({"status": {"enum": ["ok", "no workers"]}}, "status"),
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _STRING,
                    "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
                *("message", "type", "param", "code"),
            )
        },
        "error",
    ),
}

_HEADERS = {
    "x-request-id": {
        "required": True,
        "schema": _STRING,
        "description": "The request's own, or an id that the router made",
    }
}
_ANSWER_HEADERS = _HEADERS | {
    "x-tandem-explanation": {
        "schema": _STRING,
        "description": "With x-tandem-explain: 1, which instances were compared and why one was chosen, as JSON",
    }
}


_REQUEST_HEADERS = [
    {"name": name, "in": "header", "schema": {"type": "string"}, "description": description}
    for name, description in (
        (SLO, "An SLO class of the router"),
        (TTFT_MS, "A target of the request's own: time to first token, milliseconds"),
        (TPOT_MS, "A target of the request's own: time per output token after the first, milliseconds"),
        ("x-tandem-explain", "1: the response says which instances were compared"),
        (TENANT, "Waiting is fair between tenants; without it, between client addresses"),
    )
]


def _answer(description: str, media_type: str, schema: _Schema) -> _Schema:
    return {"description": description, "headers": _HEADERS, "content": {media_type: {"schema": schema}}}


_REFUSED_HEADERS = {
    "retry-after": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds"},
    "x-tandem-refused-because": {"schema": _STRING, "description": "Such as ttft-target, max-wait or queue-full"},
}


def _errors(*statuses: int) -> dict[str, _Schema]:
    answers = {str(status): _answer(_ERRORS[status], "application/json", _ref("Error")) for status in statuses}
    if "429" in answers:
        answers["429"]["headers"] = _HEADERS | _REFUSED_HEADERS
    return answers


def _completions(summary: str, request: str, response: str) -> _Schema:
    answer = _answer("The whole response, or, with stream, its chunks", "application/json", _ref(response))
    answer["headers"] = _ANSWER_HEADERS
    answer["content"]["text/event-stream"] = {}  # OpenAPI 3.1 has no words for a stream of events
    return {
        "summary": summary,
        "parameters": _REQUEST_HEADERS,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": {"200": answer, **_errors(*_ERRORS)},
    }


def _get(summary: str, answer: _Schema, **more: Any) -> _Schema:
    return {"summary": summary, "responses": {"200": answer, **_errors(400, 401, 403, 405, 431, 500), **more}}


def openapi_document() -> dict[str, Any]:
    """The document, as JSON values."""
    models = _object({"object": {"const": "list"}, "data": _array(_ref("Model"))}, "object", "data")
    name = {"name": "model", "in": "path", "required": True, "schema": _STRING}
    not_ready = {"503": _answer("Requests cannot be served", "application/json", _ref("Health"))}
    readiness = _get("Readiness", _answer("Ready", "application/json", _ref("Health")), **not_ready)
    one_model = _get("One model", _answer("The model", "application/json", _ref("Model")), **_errors(404))
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": "1", "description": "OpenAI's API for completions, with extensions"},
        "paths": {
            "/v1/chat/completions": {"post": _completions("Continue a conversation", "ChatRequest", "ChatResponse")},
            "/v1/completions": {"post": _completions("Continue a text", "CompletionRequest", "CompletionResponse")},
            "/v1/models": {"get": _get("The served model", _answer("A list of one", "application/json", models))},
            "/v1/models/{model}": {"get": one_model | {"parameters": [name]}},
            "/health": {"get": readiness},
            "/readyz": {"get": readiness},
            "/livez": {"get": _get("Liveness", _answer("The router runs", "application/json", _ref("Health")))},
            "/metrics": {"get": _get("Metrics", _answer("Prometheus' text format", "text/plain", _STRING))},
            "/openapi.json": {
                "get": _get("This document", _answer("OpenAPI 3.1", "application/json", {"type": "object"}))
            },
        },
        "components": {
            "schemas": dict(_SCHEMAS),
            "securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer", "description": "Of router.api_keys"}},
        },
        "security": [{}, {"apiKey": []}],  # whether a key is needed is the operator's choice
    }
