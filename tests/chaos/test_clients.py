"""Clients that go away, read slowly or not at all, or whose time is over."""

import json
import socket
import time

import pytest

from tandem import Client
from tandem.core.errors import CancelledError, DeadlineError
from tests.chaos.answers import answer, asks, tokens_of
from tests.chaos.faults import ChaosCluster, until
from tests.chaos.phases import PHASES, asks_for, bring_into

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

FREED_WITHIN_S = 1.0


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_goes_frees_everything(phase: str, cluster: ChaosCluster, client: Client) -> None:
    disturbed = bring_into(phase, cluster, client)
    cancelled = cluster.metric("tandem_requests_total", outcome="cancelled")
    for each in disturbed.answers:
        each.cancel()
    if phase == "transfer":
        time.sleep(0.2)
        for name in ("prefill-0", "prefill-1"):
            cluster.proxies[name].heal()  # a transfer ends before its blocks are free
    cluster.wait_idle(FREED_WITHIN_S)
    for each in disturbed.answers:
        with pytest.raises(CancelledError):
            each.wait(5.0)
    assert cluster.metric("tandem_requests_total", outcome="cancelled") - cancelled == len(disturbed.answers)


@pytest.mark.parametrize("phase", PHASES)
def test_nothing_waits_beyond_its_deadline(phase: str, cluster: ChaosCluster, client: Client) -> None:
    """All instances take their time; the deadline comes in the phase that was provoked."""
    for index in range(2):
        cluster.steps(f"prefill-{index}", "sleep 0.5" if phase in ("queued", "prefill") else "")
        cluster.steps(f"decode-{index}", "sleep 0.2" if phase == "decode" else "")
        if phase == "transfer":
            cluster.hold_kv(f"prefill-{index}")
    ended = [
        sum(cluster.metric("tandem_requests_total", outcome=outcome) for outcome in ("deadline_exceeded", "cancelled"))
    ]
    wanted = [
        type(ask)(ask.token_ids, ask.max_tokens, ask.seed, timeout_s=1.0)
        for ask in asks_for(phase, 3 if phase == "queued" else 2)
    ]
    began_s = time.monotonic()
    answers = answer(client, wanted)
    for each in answers:
        with pytest.raises(DeadlineError):
            each.wait(5.0)
    assert time.monotonic() - began_s < 3.0
    if phase in ("queued", "prefill"):
        assert not any(each.tokens for each in answers)
    else:
        assert all(each.tokens for each in answers)
    if phase == "transfer":
        assert all(len(each.tokens) == 1 for each in answers)
    for name in ("prefill-0", "prefill-1"):
        cluster.proxies[name].heal()
    cluster.wait_idle(2.0)  # a step of half a second may be under way
    ended.append(
        sum(cluster.metric("tandem_requests_total", outcome=outcome) for outcome in ("deadline_exceeded", "cancelled"))
    )
    assert ended[1] - ended[0] == len(wanted)


def test_a_slow_reader_gets_all_its_tokens_and_delays_nobody(cluster: ChaosCluster, client: Client) -> None:
    wanted = asks(1, max_tokens=2000)
    (undisturbed,) = tokens_of(client, wanted)
    others = asks(4, max_tokens=20)
    expected = tokens_of(client, others)
    tokens: list[int] = []
    with client.stream(
        token_ids=wanted[0].token_ids, max_tokens=2000, temperature=0.8, seed=0, ignore_eos=True
    ) as stream:
        for number, delta in enumerate(stream):
            tokens.extend(delta.token_ids)
            if number % 10 == 0 and number < 100:
                time.sleep(0.2)
                began_s = time.monotonic()
                if number == 50:
                    assert tokens_of(client, others) == expected
                    assert time.monotonic() - began_s < 5.0
    assert tuple(tokens) == undisturbed


def test_a_client_that_reads_nothing_delays_nobody_and_ends_alone(cluster: ChaosCluster, client: Client) -> None:
    others = asks(4, max_tokens=20)
    expected = tokens_of(client, others)
    body = json.dumps(
        {
            "model": "tiny-python",
            "prompt": [5, 6, 7],
            "max_tokens": 3500,
            "n": 4,
            "logprobs": 4,
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n"
    )
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", cluster.http_port))
        silent.sendall(head + body)
        until(lambda: cluster.metric("tandem_running_requests") >= 1, 10.0, "its answer has begun")
        began_s = time.monotonic()
        assert tokens_of(client, others) == expected
        assert time.monotonic() - began_s < 10.0
        until(lambda: cluster.metric("tandem_running_requests") == 0, 60.0, "its own requests end")
    cluster.wait_idle(2.0)
