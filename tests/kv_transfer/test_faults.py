"""A side that dies or stops in the middle of a transfer, each in a process of its own."""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import torch

from tandem.core.errors import TandemError, TransferError
from tandem.core.transfer import PeerGoneError, Transport
from tandem.kv_transfer import shared_memory_link
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.receiver import KvReceiver
from tandem.wire.channels import open_channel
from tandem.wire.transfer import KvTransferClient
from tests.kv_transfer.holder import serve_prefill, tokens
from tests.kv_transfer.side_process import BIG, ReadyHolder

CONFIG = LinkConfig(stall_s=2.0)
EVERYTHING = list(range(BIG.num_blocks))
ALL = f"0-{BIG.num_blocks}"


@asynccontextmanager
async def side(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.kv_transfer.side_process", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 60.0)).decode().strip()


@asynccontextmanager
async def prefill_at(
    instance_id: str,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Callable[[], KvTransferClient]]]:
    """The process, and what makes a client of it: one that has found it gone is of no more use."""
    async with side("prefill", instance_id) as process:
        channel = open_channel(await line_of(process))
        yield process, lambda: KvTransferClient(channel, instance_id)
        await channel.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20.0):
        while not condition():  # noqa: ASYNC110 - of other threads and processes
            await asyncio.sleep(0.001)


def resources() -> tuple[int, int, int]:
    """Threads of links, threads of gloo, mappings and descriptors of pools in this process."""
    gc.collect()  # the frames of calls that failed are cycles, and hold views of the pool
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")]
    comms = []
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has just ended
            comms.append(Path(f"/proc/self/task/{task}/comm").read_text())
    pools = Path("/proc/self/maps").read_text().count("tandem-kv")
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            pools += "tandem-kv" in os.readlink(f"/proc/self/fd/{fd}")
    return len(threads), sum("gloo" in comm for comm in comms), pools


async def fetch_all(receiver: KvReceiver, peer: KvTransferClient, epoch: int, timeout_s: float = 20.0) -> Transport:
    token_ids = tokens(BIG.num_blocks, BIG)
    return (await receiver.fetch(peer, ALL, epoch, token_ids, EVERYTHING, time.monotonic() + timeout_s)).transport


async def test_prefill_killed_or_stopped_while_bytes_move(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resources()
    pool = torch.zeros(BIG.pool_bytes, dtype=torch.uint8)
    receiver = KvReceiver(BIG, [pool], "decode-0", transport=Transport.GLOO, timeout_s=15.0, link_config=CONFIG)
    first_block, last_block = pool[: BIG.segment_bytes], pool[-BIG.segment_bytes :]

    async def in_mid_payload(process: asyncio.subprocess.Process, peer: KvTransferClient, fault: int) -> float:
        pool.zero_()
        fetching = asyncio.create_task(fetch_all(receiver, peer, 0))
        await until(first_block.any)
        process.send_signal(fault)
        assert not last_block.any()
        started_s = time.monotonic()
        with pytest.raises(TandemError) as caught:
            await fetching
        assert isinstance(caught.value, TransferError | PeerGoneError)
        took_s = time.monotonic() - started_s
        pool.fill_(3)  # the blocks are ours again, although the link's thread may still hang
        await asyncio.sleep(0.2)
        assert bool((pool == 3).all())
        return took_s

    async with prefill_at("prefill-0") as (process, new_peer):
        peer = new_peer()
        assert await fetch_all(receiver, peer, 9) is Transport.GLOO
        assert await in_mid_payload(process, peer, signal.SIGSTOP) < 8.0  # stall_s, and the machine's own delays
        process.send_signal(signal.SIGCONT)
        peer = new_peer()
        assert await fetch_all(receiver, peer, 1) is Transport.GLOO  # over a new process group
        assert await in_mid_payload(process, peer, signal.SIGKILL) < CONFIG.stall_s  # not by a timeout
    await receiver.close()

    receiver = KvReceiver(BIG, [pool], "decode-0", transport=Transport.SHARED_MEMORY, link_config=CONFIG)
    async with prefill_at("prefill-1") as (process, new_peer):
        peer = new_peer()
        copy = shared_memory_link.copy_blocks

        def copy_and_kill(*arguments: object) -> None:
            copy(*arguments)  # type: ignore[arg-type]
            process.kill()  # its memory stays readable to us, but nobody can say whether it was still the right one
            time.sleep(0.2)

        await fetch_all(receiver, peer, 0)
        monkeypatch.setattr(shared_memory_link, "copy_blocks", copy_and_kill)
        with pytest.raises(PeerGoneError):
            await fetch_all(receiver, peer, 1)
    await receiver.close()
    assert resources() == before


@pytest.mark.parametrize("transport", [Transport.SHARED_MEMORY, Transport.GLOO])
async def test_decode_killed_while_bytes_move(transport: Transport) -> None:
    before = resources()
    async with serve_prefill(BIG, holder=ReadyHolder(BIG), config=CONFIG) as prefill:
        async with side("decode", prefill.address, transport.value) as process:
            assert await line_of(process) == "0"
            assert len(prefill.sender._links) == 1
            await asyncio.sleep(0.02)
            process.kill()
        await until(lambda: not prefill.sender._links)
        await until(
            lambda: resources()[0] <= (transport is Transport.SHARED_MEMORY)
        )  # but for the descriptor server's thread
    assert resources() == before


@pytest.mark.parametrize("transport", [Transport.SHARED_MEMORY, Transport.GLOO])
async def test_nothing_is_left_of_an_idle_prefill_worker_that_was_killed(transport: Transport) -> None:
    before = resources()
    receiver = KvReceiver(BIG, [torch.zeros(BIG.pool_bytes, dtype=torch.uint8)], "decode-0", transport=transport)
    async with prefill_at("prefill-0") as (process, new_peer):
        peer = new_peer()
        await fetch_all(receiver, peer, 0)
        assert resources() != before
        process.kill()
        # Its pool is not mapped any more, and the link's threads have ended. The gloo device is the receiver's.
        await until(lambda: resources()[::2] == before[::2])
        assert receiver._links.by_peer == {}
        assert list(receiver._links.making) == []
        assert [stats.peer_id for stats in receiver.links()] == ["other"]
    await receiver.close()
    assert resources() == before
