"""The parts of `bench.overhead` that decide what its figures mean."""

import asyncio
from contextlib import suppress

import pytest

from bench.overhead.figures import OverheadSample, Quantity, figures_of, figures_table
from bench.overhead.request_path import cpu_without_engine_s
from bench.overhead.scripted_workers import ScriptedInstance
from tandem.core.request import FinishReason, GenerationRequest, SamplingParams
from tandem.core.session import Cancel, KvSource, Submit, TokenFrame
from tandem.wire.sessions import Outbox


def test_a_figure_is_the_median_of_its_rounds_with_its_aim() -> None:
    slow, fast = "slow request path", "fast request path"
    samples = [OverheadSample(fast, 32, Quantity.PER_TOKEN, "CPU", seconds) for seconds in (90e-6, 50e-6, 70e-6)]
    samples.append(OverheadSample(slow, 32, Quantity.PER_TOKEN, "CPU", 100e-6))
    samples.append(OverheadSample(slow, 8, Quantity.PER_TOKEN, "CPU", 900e-6))
    figures = figures_of(samples, clock_with_aims="CPU")
    assert (figures[0].median, figures[0].least, figures[0].most) == pytest.approx((70, 50, 90))
    rows = figures_table(figures).splitlines()[1:]
    assert "70.00 us" in rows[0]
    assert "met" in rows[0]
    assert "missed" in rows[1]
    assert "(<" not in rows[2], "there is an aim for 32 streams only"


def test_cpu_without_the_engine_leaves_out_each_workers_busiest_thread_but_its_first() -> None:
    before = [{10: 1.0}, {20: 1.0, 21: 1.0}, {30: 0.0, 31: 1.0}]
    after = [{10: 1.25}, {20: 1.5, 21: 6.0, 22: 0.125}, {30: 9.0, 31: 4.0}]
    assert cpu_without_engine_s(before, after) == pytest.approx(0.25 + 0.5 + 0.125 + 9.0)


async def test_scripted_decode_sends_one_token_of_every_open_request_in_a_frame() -> None:
    decode, outbox = ScriptedInstance(step_s=0.0), Outbox()
    session = decode.open_session(outbox)
    source = KvSource("prefill", "127.0.0.1:1")
    for handle, max_tokens in ((1, 3), (2, 2), (3, 100)):
        request = GenerationRequest(f"r{handle}", (5,), SamplingParams(max_tokens=max_tokens))
        decode.handle(session, Submit(handle, request, source))
    decode.handle(session, Cancel(3))
    running = asyncio.create_task(decode.run())
    frames = []
    async for event in outbox.drain():
        if isinstance(event, TokenFrame):
            frames.append([(item.handle, item.finish_reason) for item in event.items])
            if len(frames) == 2:
                break
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert frames == [[(1, None), (2, FinishReason.LENGTH)], [(1, FinishReason.LENGTH)]]
