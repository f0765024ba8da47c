"""The OpenAPI document is true: schemathesis calls a router with real sockets by it, and finds no undeclared answer."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import requests
import schemathesis
from hypothesis import given
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tandem.core.config import RouterConfig
from tandem.core.router_section import RouterSection
from tandem.router.app import RouterApp
from tandem.router.openai.bodies import ChatBody, CompletionBody
from tandem.router.openai.openapi import openapi_document
from tandem.router.openai.validation import IGNORED, UNSUPPORTED
from tests.fuzz.volume import tries, volumes
from tests.router.front import write_checkpoint
from tests.router.grpc_workers import serve_pair

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)
INSIDES = ("Traceback", "<class", "object at 0x", ".py")


@dataclass
class Served:
    url: str
    app: RouterApp
    loop: asyncio.AbstractEventLoop


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A router with two workers that answer at once, on a thread of its own."""
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    started: list[Served] = []
    is_up, over = threading.Event(), asyncio.Event()

    async def serve(folder: Path) -> None:
        address = "127.0.0.1:0"
        section = RouterSection(http=address, grpc=address, control=address, max_body=1 << 20)
        app = RouterApp(RouterConfig(model=folder, model_name="tiny", router=section, cluster_token="s"))
        async with AsyncExitStack() as stack:
            await app.start()
            stack.push_async_callback(app.drain_and_stop, 0.0)
            await stack.enter_async_context(serve_pair(app.control_address, "tiny", "s"))
            started.append(Served(f"http://{app.address}", app, asyncio.get_running_loop()))
            is_up.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve(folder)))
    thread.start()
    assert is_up.wait(20)
    with httpx.Client(base_url=started[0].url, verify=False) as client:
        while client.get("/health").status_code != 200:
            pass
    yield started[0]
    started[0].loop.call_soon_threadsafe(over.set)
    thread.join(20)


def test_the_document_names_the_fields_that_the_parser_takes() -> None:
    schemas = openapi_document()["components"]["schemas"]
    for name, body in (("ChatRequest", ChatBody), ("CompletionRequest", CompletionBody)):
        assert set(schemas[name]["properties"]) == set(body.model_fields) | IGNORED | set(UNSUPPORTED)
        required = {field for field, info in body.model_fields.items() if info.is_required()}
        assert set(schemas[name]["required"]) == required


@volumes(sample=10, many=2_000)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_declared(mode: GenerationMode, count: int, served: Served) -> None:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{served.url}/openapi.json", verify=False).json())
    session = requests.Session()
    statuses: Counter[int] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        is_completion = operation.method == "post"
        if mode is GenerationMode.NEGATIVE and not is_completion:
            continue  # there is nothing that could be wrong

        @tries(count if is_completion else max(1, count // 20))
        @given(operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and case.body.get("max_tokens") is None:
                case.body["max_tokens"] = 3
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny"
            response = case.call(base_url=served.url, session=session, timeout=30)
            case.validate_response(response, checks=list(CHECKS))
            assert not any(inside in response.text for inside in INSIDES), response.text[:300]
            statuses[response.status_code] += 1

        check()
    if mode is GenerationMode.POSITIVE:
        assert statuses[200] > count // 10
    else:
        assert statuses[400] > count // 2
    session.close()
