"""Stream a completion over gRPC, then print how the time was spent.

python examples/client_stream.py [HOST:PORT]
"""

import sys

from tandem import Client


def main(address: str = "127.0.0.1:8001") -> None:
    with Client(address) as client:
        print(f"# {client.models()[0].id}")
        prompt = "def read_json(path):"
        print(prompt, end="")
        for delta in client.stream(prompt=prompt, max_tokens=64, temperature=0.0):
            print(delta.text, end="", flush=True)
        timeline = delta.timeline
        assert timeline is not None, "the last message has the timeline"
        print(f"\n\n# first token after {1000 * (timeline.ttft_s or 0.0):.1f} ms; the parts of the total time:")
        for part, seconds in timeline.parts().items():
            print(f"#   {part:16} {1000 * seconds:8.2f} ms")
        print(f"#   {'total':16} {1000 * timeline.total_s:8.2f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
