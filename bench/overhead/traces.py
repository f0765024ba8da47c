"""What traces cost: routers with and without them, and a collector that takes traces and drops them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bench.overhead.router_cost import RouterVariant


def tracing_variants(endpoint: str) -> list[RouterVariant]:
    ratios = {"no traces": None, "1 % traced": 0.01, "all traced": 1.0}
    return [
        RouterVariant(
            name, settings={} if ratio is None else {"tracing": {"endpoint": endpoint, "sample_ratio": ratio}}
        )
        for name, ratio in ratios.items()
    ]


@contextmanager
def collecting_traces() -> Iterator[str]:
    """Gives the endpoint of a collector in a process of its own."""
    with subprocess.Popen([sys.executable, "-m", __name__], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1/traces", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
