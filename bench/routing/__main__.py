"""How long does the router's selection of an instance take, among few and among thousands of instances?"""

import argparse
import random
import time
from collections import defaultdict
from dataclasses import replace
from statistics import mean, median

from tandem.scheduling.decode_index import DecodeIndex, DecodeQuery
from tandem.scheduling.prefill_index import PrefillIndex, PrefillQuery
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.routing import DecodeView, PrefillView, choose_decode, choose_prefill

_NUM_INSTANCES = (2, 10, 100, 1000, 4000)
_BLOCK_SIZE = 16
_TRACKED_BLOCKS = 4096  # of each instance
_SLACK_TOKENS = 4096
_PROMPT_TOKENS = 2048
_SYSTEM_BLOCKS = 32  # every prompt begins with them: soon they are cached nearly everywhere
_CONVERSATION_BLOCKS = 96  # cached where the conversation's earlier turns ran
_OPEN_CONVERSATIONS = 200
_DECODE_TOKENS = 2400

Names = tuple[tuple[int, int], ...]


class CallTimer:
    """Seconds of each call, by the kind of call."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._begun_s = 0.0

    def begin(self) -> None:
        self._begun_s = time.perf_counter()

    def end(self, what: str) -> None:
        self.seconds[what].append(time.perf_counter() - self._begun_s)


def run_prefill(num_instances: int, rounds: int, full_rounds: int, rng: random.Random, timer: CallTimer) -> None:
    """Queues that fill by choices and empty at random; of two prompts one continues a conversation."""
    index, tracker = PrefillIndex(_SLACK_TOKENS), PrefixTracker(_BLOCK_SIZE, _TRACKED_BLOCKS)
    ids = [f"prefill-{number}" for number in range(num_instances)]
    for instance_id in ids:
        index.put(PrefillView(instance_id, "f", True, 1 << 20, 256 * rng.randrange(32)))
    conversations = 1
    for turn in range(rounds):
        conversations += rng.random() < 0.5
        names = _names(max(0, conversations - rng.randrange(_OPEN_CONVERSATIONS)))
        if turn < full_rounds:
            views = [
                replace(view, cached_prefix_tokens=tracker.matched_tokens(view.instance_id, names))
                for view in index.views.values()
            ]
            timer.begin()
            expected = choose_prefill(
                views,
                num_tokens=_PROMPT_TOKENS,
                needed_tokens=_PROMPT_TOKENS + 1,
                decode_fingerprints={"f"},
                slack_tokens=_SLACK_TOKENS,
                failures={},
                last_chosen=index.last_chosen,
            ).instance_id
            timer.end("prefill, compare all")
        timer.begin()
        query = PrefillQuery(_PROMPT_TOKENS, _PROMPT_TOKENS + 1, {"f"}, list(tracker.holders(names)))
        if turn % 2:
            best = index.best(query)
            timer.end("prefill, best")
            chosen = None if best is None else best.rank[3]
        else:
            chosen = index.select(query).instance_id
            timer.end("prefill, explained")
        assert chosen is not None
        assert turn >= full_rounds or chosen == expected
        tracker.record(chosen, names, _TRACKED_BLOCKS)
        for instance_id, change_tokens in ((chosen, _PROMPT_TOKENS), (rng.choice(ids), -_PROMPT_TOKENS)):
            view = index.views[instance_id]
            view = replace(view, queued_tokens=max(0, view.queued_tokens + change_tokens))
            timer.begin()
            (index.take if instance_id == chosen else index.put)(view)
            timer.end("prefill, load changed")


def run_decode(num_instances: int, rounds: int, full_rounds: int, rng: random.Random, timer: CallTimer) -> None:
    """Memory that fills by choices and empties at random; about one instance in three has no room."""
    index = DecodeIndex()
    ids = [f"decode-{number}" for number in range(num_instances)]
    tokens = -(-_DECODE_TOKENS // _BLOCK_SIZE) * _BLOCK_SIZE
    for instance_id in ids:
        running = rng.randrange(25)
        index.put(DecodeView(instance_id, "f", True, 1 << 20, 16 * tokens, running * tokens, running))
    for turn in range(rounds):
        if turn < full_rounds:
            timer.begin()
            expected = choose_decode(
                index.views.values(),
                num_tokens=_PROMPT_TOKENS,
                growth_tokens=_DECODE_TOKENS - _PROMPT_TOKENS,
                needed_tokens=_DECODE_TOKENS,
                fingerprint="f",
                failures={},
                last_chosen=index.last_chosen,
            ).instance_id
            timer.end("decode, compare all")
        query = DecodeQuery(_PROMPT_TOKENS, _DECODE_TOKENS - _PROMPT_TOKENS, _DECODE_TOKENS, "f")
        timer.begin()
        if turn % 2:
            best = index.best(query)
            timer.end("decode, best")
            chosen = None if best is None else best.rank[3]
        else:
            chosen = index.select(query).instance_id
            timer.end("decode, explained")
        assert chosen is not None
        assert turn >= full_rounds or chosen == expected
        for instance_id, change in ((chosen, 1), (rng.choice(ids), -1)):
            view = index.views[instance_id]
            running = max(0, view.sequences + change)
            view = replace(view, sequences=running, claimed_tokens=running * tokens)
            timer.begin()
            (index.take if instance_id == chosen else index.put)(view)
            timer.end("decode, load changed")


def _names(conversation: int) -> Names:
    system = tuple((-1, block) for block in range(_SYSTEM_BLOCKS))
    return system + tuple((conversation, block) for block in range(_CONVERSATION_BLOCKS))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.routing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4000, help="choices per role and size (default %(default)s)")
    parser.add_argument("--full-rounds", type=int, default=100, help="of these also compared in full, and checked")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    columns = {}
    for num_instances in _NUM_INSTANCES:
        timer = CallTimer()
        rng = random.Random(args.seed)
        run_prefill(num_instances, args.rounds, args.full_rounds, rng, timer)
        run_decode(num_instances, args.rounds, args.full_rounds, rng, timer)
        columns[num_instances] = timer.seconds
    print("microseconds per call: mean (median), by the number of instances")
    print(f"{'':24}" + "".join(f"{num_instances:>19}" for num_instances in _NUM_INSTANCES))
    for call in columns[_NUM_INSTANCES[0]]:
        cells = (f"{1e6 * mean(times[call]):.1f} ({1e6 * median(times[call]):.1f})" for times in columns.values())
        print(f"{call:24}" + "".join(f"{cell:>19}" for cell in cells))


if __name__ == "__main__":
    main()
