"""SLO classes, targets and tenants in HTTP requests."""

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.router_section import RouterSection
from tandem.core.slo import SloClass
from tandem.router.tokenizer import TextTokenizer
from tests.router.front import MODEL, Front, serve_front

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = SloClass(name="chat", ttft_s=0.5, tpot_s=0.05, if_unmet="refuse")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front_with_classes(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> AsyncIterator[Front]:
    async with serve_front(tokenizer, raw_tokenizer, RouterSection(slo=(CHAT,))) as front:
        yield front


@pytest.fixture
def front(front_with_classes: Front) -> Front:
    front_with_classes.reset()
    return front_with_classes


async def post(front: Front, headers: dict[str, str] | list[tuple[str, str]], **tandem: object) -> tuple[int, object]:
    """The status, and the error or the SLO that reached the generator."""
    body = {"model": MODEL, "prompt": "a b", "max_tokens": 2, "tandem": tandem}
    async with front.client() as client:
        response = await client.post("/v1/completions", json=body, headers=headers)
    if response.status_code != 200:
        return response.status_code, response.json()["error"]
    return 200, front.generator.requests[-1].slo


@pytest.mark.parametrize(
    ("headers", "tandem", "slo"),
    [
        ({}, {}, NO_SLO),
        ({"x-tandem-slo": "chat"}, {}, CHAT.request_slo),
        ({"X-Tandem-SLO": "chat"}, {}, CHAT.request_slo),
        ({}, {"slo": "chat"}, CHAT.request_slo),
        ({"x-llm-d-slo-ttft-ms": "250"}, {}, RequestSlo("custom", ttft_s=0.25)),
        ({"x-llm-d-slo-ttft-ms": "250.5", "x-llm-d-slo-tpot-ms": "20"}, {}, RequestSlo("custom", 0.2505, 0.02)),
        ({}, {"tpot_s": 1}, RequestSlo("custom", tpot_s=1.0)),
        ({"x-tandem-slo": ""}, {"slo": "", "ttft_s": None}, NO_SLO),
    ],
)
async def test_the_slo_reaches_the_generator(
    front: Front, headers: dict[str, str], tandem: dict[str, object], slo: RequestSlo
) -> None:
    assert await post(front, headers, **tandem) == (200, slo)


@pytest.mark.parametrize(
    "value", ["-1", "0", "nan", "inf", "1e3", "1_0", "0x10", "9" * 400, "9" * 20, "1 2", "٣", "+1"]
)
@pytest.mark.parametrize("name", ["x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"])
async def test_wrong_targets_in_headers_are_named(front: Front, name: str, value: str) -> None:
    async with front.client() as client:
        response = await client.post(
            "/v1/completions",
            content=json.dumps({"model": MODEL, "prompt": "a"}),
            headers=[(b"content-type", b"application/json"), (name.encode(), value.encode())],
        )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == name
    assert not front.generator.requests


@pytest.mark.parametrize(
    ("headers", "tandem", "param"),
    [
        ({"x-tandem-slo": "batch"}, {}, "slo"),
        ({}, {"slo": "batch"}, "slo"),
        ({}, {"slo": 7}, "tandem.slo"),
        ({"x-tandem-slo": "chat", "x-llm-d-slo-ttft-ms": "1"}, {}, "slo"),
        ({}, {"slo": "chat", "tpot_s": 1.0}, "slo"),
        ({"x-tandem-slo": "chat"}, {"slo": "chat"}, "tandem"),
        ({}, {"ttft_s": -1}, "ttft_s"),
        ({}, {"ttft_s": 0}, "ttft_s"),
        ({}, {"tpot_s": 1e9}, "tpot_s"),
        ({}, {"tpot_s": "1"}, "tandem.tpot_s"),
        ([("x-tandem-slo", "chat"), ("x-tandem-slo", "chat")], {}, "x-tandem-slo"),
        ({"x-tandem-tenant": "t" * 300}, {}, "tenant"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    front: Front, headers: dict[str, str], tandem: dict[str, object], param: str
) -> None:
    status, error = await post(front, headers, **tandem)
    assert isinstance(error, dict)
    assert (status, error["param"]) == (400, param), error
    assert front.refusals.errors, "it is counted"


async def test_waiting_is_fair_between_tenants_or_else_addresses(front: Front) -> None:
    await post(front, {"x-tandem-tenant": "team a"})
    await post(front, {})
    assert front.generator.clients == ["team a", "127.0.0.1"]
