"""The requests of `tandem profile`'s probe, with a client that answers as it is told."""

import pytest

from tandem.profiling.completion_client import CompletionClient, TimedCompletion
from tandem.profiling.errors import MeasurementError
from tandem.profiling.serving_profile import ServingProbe

LOCAL = {"prefill_s": 0.1, "decode_queue_s": 0.0, "decode_s": 0.1}
WITH_TRANSFER = {**LOCAL, "transfer_s": 0.01}


class ToldClient(CompletionClient):
    """Answers with these parts of the timeline, in turn."""

    def __init__(self, *parts: dict[str, float]) -> None:
        super().__init__("http://127.0.0.1:1")
        self.parts = list(parts)

    async def complete(self, request: bytes, timeout_s: float) -> TimedCompletion:
        timeline = {"ttft_s": 0.1, "total_s": 0.3, "parts": self.parts.pop(0)}
        return TimedCompletion(1.0, 1.1, 1.3, {"tandem": {"timeline": timeline}})


async def test_a_request_without_a_transfer_is_sent_again() -> None:
    client = ToldClient(LOCAL, WITH_TRANSFER)
    (sample,) = await ServingProbe(client).prefill_alone(0.0)
    assert sample.kv_arrived_s == pytest.approx(1.11)
    assert not client.parts


async def test_a_cluster_that_never_transfers_is_not_measured() -> None:
    with pytest.raises(MeasurementError, match="too busy"):
        await ServingProbe(ToldClient(LOCAL, LOCAL, LOCAL)).prefill_alone(0.0)


async def test_a_colocated_instance_transfers_nothing() -> None:
    probe = ServingProbe(ToldClient(LOCAL), needed_parts=frozenset({"prefill_s"}))
    (sample,) = await probe.prefill_alone(0.0, max_pause_s=0.1)
    assert sample.kv_arrived_s == sample.prefill_ended_s
    assert sample.decode_span[0] == sample.prefill_ended_s
