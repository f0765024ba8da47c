"""Traces of a real cluster, by a real collector: also of a request whose instance dies."""

import threading
from pathlib import Path

import httpx
import pytest

from tests.cluster.harness import Cluster, running_cluster
from tests.otlp_receiver import receiving_traces, values


def _open_requests(cluster: Cluster, name: str) -> float:
    """As the router counts them, without a delay."""
    return cluster.metric("tandem_instance_open_requests", tandem_instance=name)


BODY = {"model": "tiny-python", "prompt": "import os", "temperature": 0, "ignore_eos": True}


@pytest.mark.slow
def test_a_request_that_loses_its_decode_instance_is_one_trace(built_in_model: Path, tmp_path: Path) -> None:
    with receiving_traces() as receiver:
        router = {"tracing": {"endpoint": receiver.endpoint}}
        with running_cluster(built_in_model, tmp_path, decode_transports=("auto", "auto"), router=router) as cluster:
            short = httpx.post(f"{cluster.url}/v1/completions", json=BODY | {"max_tokens": 8}, timeout=60)
            assert short.status_code == 200
            answers: list[httpx.Response] = []
            body = BODY | {"max_tokens": 400}
            thread = threading.Thread(
                target=lambda: answers.append(httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60))
            )
            thread.start()
            victims: list[str] = []
            while not victims or not cluster.metric("tandem_running_requests"):
                open_at = {name: _open_requests(cluster, name) for name in ("decode-0", "decode-1")}
                victims = [name for name, count in open_at.items() if count]
            cluster.kill(victims[0])
            thread.join()
            assert answers[0].json()["usage"]["completion_tokens"] == 400
        spans = receiver.spans
    generations = [span for span in spans if span.name == "text_completion tiny-python"]
    undisturbed, disturbed = sorted(generations, key=lambda span: span.start_time_unix_nano)
    parts = {span.name: span for span in spans if span.parent_span_id == undisturbed.span_id}
    transfer = values(list(parts["transfer"].attributes))
    assert transfer["tandem.transfer.transport"] == "shared_memory"
    assert transfer["tandem.transfer.bytes"] > 0
    assert sum(span.end_time_unix_nano - span.start_time_unix_nano for span in parts.values()) == (
        undisturbed.end_time_unix_nano - undisturbed.start_time_unix_nano
    )
    assert values(list(disturbed.attributes))["tandem.attempts"] == 2
    attempts = [event for event in disturbed.events if event.name == "attempt"]
    assert [values(list(event.attributes)).get("error.type") for event in attempts] == ["unavailable", None]
