"""A server without a model that answers completions at once: the limit of what the load generator can measure.

`python -m bench.goodput.scripted_server` prints its URL and runs until its standard input ends. A response has one
event for each token, the usage, and the end of the stream, all in one write. It computes nothing, so what a run against
it shows is the cost of the client and of the loopback connection.
"""

import asyncio
import sys
from contextlib import suppress

import orjson

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"
_TOKEN = b'data: {"choices":[{"index":0,"text":" w300","finish_reason":null}]}\n\n'
_DONE = b"data: [DONE]\n\n"
MODEL = "scripted"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            request = orjson.loads(await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0])))
            usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": request["max_tokens"]}
            body = _TOKEN * request["max_tokens"]
            body += b"data: " + orjson.dumps({"choices": [], "usage": usage}) + b"\n\n" + _DONE
            writer.write(_HEAD % len(body) + body)
            await writer.drain()
    writer.close()


async def _serve() -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve())
