"""SLO classes of a real cluster, asked for over HTTP and gRPC."""

import asyncio
import contextlib
import json
from collections.abc import Iterator

import grpc
import httpx
import pytest

from tandem import Client
from tandem.core.errors import InvalidRequestError, OverloadedError
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem.wire.channels import open_channel
from tandem.wire.fleet import explain_request
from tests.cluster.harness import Cluster

PROMPT = "def read_json(path):"


def complete(cluster: Cluster, headers: dict[str, str]) -> httpx.Response:
    body = {"model": "tiny-python", "prompt": PROMPT, "max_tokens": 4}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=60.0)


def test_requests_count_in_the_class_that_they_name(cluster: Cluster) -> None:
    def counts(slo_class: str) -> tuple[float, ...]:
        names = ("tandem_slo_requests_total", "tandem_slo_met_total", "tandem_slo_ttft_seconds_count")
        return tuple(cluster.metric(name, slo_class=slo_class) for name in names)

    before, customs = counts("easy"), counts("custom")
    assert complete(cluster, {"x-tandem-slo": "easy"}).status_code == 200
    with Client(cluster.grpc_address) as client:
        client.generate(prompt=PROMPT, max_tokens=4, slo="easy")
        client.generate(prompt=PROMPT, max_tokens=4, ttft_s=1e-6)
    assert complete(cluster, {"x-llm-d-slo-tpot-ms": "60000"}).status_code == 200
    assert counts("easy") == tuple(count + 2 for count in before)
    assert counts("custom") == (customs[0] + 2, customs[1] + 1, customs[2] + 2)
    assert cluster.metric("tandem_slo_violations_total", slo_class="custom", target="ttft") == 1
    assert cluster.metric("tandem_token_gap_seconds_count", slo_class="easy") >= 2


def test_what_makes_no_sense_is_refused_over_both_protocols(cluster: Cluster) -> None:
    response = complete(cluster, {"x-tandem-slo": "gold"})
    assert response.status_code == 400
    assert "there is no SLO class 'gold'; the classes of this server: easy, now" in response.json()["error"]["message"]
    assert complete(cluster, {"x-llm-d-slo-ttft-ms": "-1"}).status_code == 400
    with Client(cluster.grpc_address) as client:
        for options in ({"slo": "gold"}, {"ttft_s": float("nan")}, {"tpot_s": -1.0}, {"slo": "easy", "tpot_s": 1.0}):
            with pytest.raises(InvalidRequestError):
                client.generate(prompt=PROMPT, max_tokens=4, **options)  # type: ignore[arg-type]


def test_a_response_says_why_its_instances_were_chosen_if_it_is_asked(cluster: Cluster) -> None:
    assert "x-tandem-explanation" not in complete(cluster, {}).headers
    choices = json.loads(complete(cluster, {"x-tandem-explain": "1"}).headers["x-tandem-explanation"])
    assert [(choice["attempt"], choice["phase"]) for choice in choices] == [(1, "prefill"), (1, "decode")]
    for choice in choices:
        best = choice["candidates"][0]
        assert (best["instance"], best["reason"]) == (choice["instance"], "chosen")
    body = {"model": "tiny-python", "prompt": PROMPT, "max_tokens": 4, "stream": True}
    headers = {"x-tandem-explain": "1"}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=60.0) as stream:
        assert json.loads(stream.headers["x-tandem-explanation"])[0]["phase"] == "prefill"


@contextlib.contextmanager
def company(cluster: Cluster) -> Iterator[Client]:
    """A cluster that knows how long a first token takes, and has something to do: nobody who comes alone is refused."""
    with Client(cluster.grpc_address) as client:
        client.generate(prompt=PROMPT, max_tokens=2)
        with client.stream(prompt=PROMPT, max_tokens=900, ignore_eos=True) as stream:
            next(stream)
            yield client


def explain(cluster: Cluster, request_id: str) -> str:
    async def ask() -> str:
        async with open_channel(cluster.control_address, Cluster.TOKEN) as channel:
            return await explain_request(channel, request_id, 5.0)

    return asyncio.run(ask())


def test_what_cannot_be_in_time_is_refused_at_once_with_a_reason(cluster: Cluster) -> None:
    before = cluster.metric("tandem_slo_refused_total", slo_class="now-or-never")
    with company(cluster) as client:
        response = complete(cluster, {"x-tandem-slo": "now-or-never"})
        assert response.status_code == 429, response.text
        assert response.headers["x-tandem-refused-because"] == "ttft-target"
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "overloaded"
        with pytest.raises(OverloadedError, match="would miss its TTFT target") as caught:
            client.generate(prompt=PROMPT, max_tokens=2, slo="now-or-never", request_id="refused-one")
        assert caught.value.reason == "ttft-target"
        with grpc.insecure_channel(cluster.grpc_address) as channel:
            request = inference_pb2.GenerateRequest(text=PROMPT, slo="now-or-never")
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=30.0)
            assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(call.trailing_metadata())["x-tandem-refused-because"] == "ttft-target"
    assert "refused: ttft-target" in explain(cluster, "refused-one")
    assert "SLO class now-or-never: TTFT - of 0.1 ms, missed" in explain(cluster, "refused-one")
    assert cluster.metric("tandem_slo_refused_total", slo_class="now-or-never") == before + 3


def test_or_it_is_served_as_best_effort(cluster: Cluster) -> None:
    before = cluster.metric("tandem_slo_demoted_total", slo_class="soon")
    with company(cluster) as client:
        client.generate(prompt=PROMPT, max_tokens=2, slo="soon", request_id="demoted-one")
    text = explain(cluster, "demoted-one")
    assert "best effort: the first token is expected after" in text
    assert "predicted TTFT" in text
    assert ", actual " in text
    assert cluster.metric("tandem_slo_demoted_total", slo_class="soon") == before + 1
    assert cluster.metric("tandem_ttft_prediction_error_seconds_count", slo_class="soon") >= 1
