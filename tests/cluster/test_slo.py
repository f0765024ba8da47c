"""SLO classes of a real cluster, asked for over HTTP and gRPC."""

import httpx
import pytest

from tandem import Client
from tandem.core.errors import InvalidRequestError
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
    assert "there is no SLO class 'gold'; the classes of this server: easy" in response.json()["error"]["message"]
    assert complete(cluster, {"x-llm-d-slo-ttft-ms": "-1"}).status_code == 400
    with Client(cluster.grpc_address) as client:
        for options in ({"slo": "gold"}, {"ttft_s": float("nan")}, {"tpot_s": -1.0}, {"slo": "easy", "tpot_s": 1.0}):
            with pytest.raises(InvalidRequestError):
                client.generate(prompt=PROMPT, max_tokens=4, **options)  # type: ignore[arg-type]
