import subprocess
import sys
import textwrap

import pytest

OPENED = {
    "a channel": "tandem.wire.channels.open_channel('127.0.0.1:1')",
    "a client": "tandem.client.AsyncClient('127.0.0.1:1')",
    "a server": "tandem.wire.server.build_server()",
}


@pytest.mark.parametrize("opened", OPENED)
def test_grpc_does_not_end_its_poller_with_its_last_object(opened: str) -> None:
    """Which would be within the garbage collector, and can wait there for ever."""
    code = f"""
        import asyncio, gc, threading
        import tandem.client, tandem.wire.channels, tandem.wire.server

        async def main():
            {OPENED[opened]}

        def poller():
            return any('_poll_wrapper' in thread.name for thread in threading.enumerate())

        asyncio.run(main())
        gc.collect()
        assert poller(), "no thread polls"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
