"""How long does the router's selection of an instance take, among few and among thousands of instances?"""

import argparse
import random
import time
from collections import defaultdict
from dataclasses import replace
from statistics import mean, median

from tandem.scheduling.decode_index import DecodeIndex
from tandem.scheduling.instance_index import NO_FAILURES
from tandem.scheduling.prefill_index import PrefillIndex
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.routing import DecodeView, PrefillView, choose_decode, choose_prefill

_NUM_INSTANCES = (2, 10, 100, 1000, 4000)
_BLOCK_SIZE = 16
_SLACK_TOKENS = 4096
_PROMPT_TOKENS = 2048
_SYSTEM_BLOCKS = 32  # prefix of every prompt, soon cached on nearly every instance
_CONVERSATION_BLOCKS = 96  # cached where earlier turns of the conversation ran
_OPEN_CONVERSATIONS = 200
_DECODE_TOKENS = 2400

Names = tuple[tuple[int, int], ...]


class CallTimer:
    """Seconds of each call, by the kind of call."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._began_s = 0.0

    def begin(self) -> None:
        self._began_s = time.perf_counter()

    def end(self, call: str) -> None:
        self.seconds[call].append(time.perf_counter() - self._began_s)


def run_prefill(num_instances: int, rounds: int, full_rounds: int, rng: random.Random, timer: CallTimer) -> None:
    """Queues fill by selections and empty at random; every other prompt continues a conversation."""
    index, tracker = PrefillIndex(_SLACK_TOKENS), PrefixTracker(_BLOCK_SIZE, max_blocks_per_instance=4096)
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
                needed_tokens=_DECODE_TOKENS,
                decode_fingerprints={"f"},
                slack_tokens=_SLACK_TOKENS,
                failures=NO_FAILURES,
                last_chosen=index.last_chosen,
            ).instance_id
            timer.end("prefill, compare all")
        timer.begin()
        if turn % 2:
            best = index.best(
                num_tokens=_PROMPT_TOKENS,
                needed_tokens=_DECODE_TOKENS,
                decode_fingerprints={"f"},
                holders=tracker.holders(names),
            )
            timer.end("prefill, best")
            assert best is not None
            chosen = best.rank[3]
        else:
            chosen = index.select(
                num_tokens=_PROMPT_TOKENS,
                needed_tokens=_DECODE_TOKENS,
                decode_fingerprints={"f"},
                holders=tracker.holders(names),
            ).require()
            timer.end("prefill, explained")
        index.take(index.views[chosen])
        assert turn >= full_rounds or chosen == expected
        tracker.record(chosen, names)
        for instance_id, change_tokens in ((chosen, _PROMPT_TOKENS), (rng.choice(ids), -_PROMPT_TOKENS)):
            view = index.views[instance_id]
            view = replace(view, queued_tokens=max(0, view.queued_tokens + change_tokens))
            timer.begin()
            index.put(view)
            timer.end("prefill, load changed")


def run_decode(num_instances: int, rounds: int, full_rounds: int, rng: random.Random, timer: CallTimer) -> None:
    """Memory fills by selections and empties at random; about one instance in three is full."""
    index = DecodeIndex()
    ids = [f"decode-{number}" for number in range(num_instances)]
    block_tokens = -(-_DECODE_TOKENS // _BLOCK_SIZE) * _BLOCK_SIZE
    for instance_id in ids:
        running = rng.randrange(25)
        index.put(DecodeView(instance_id, "f", True, 1 << 20, 16 * block_tokens, running * block_tokens, running))
    for turn in range(rounds):
        if turn < full_rounds:
            timer.begin()
            expected = choose_decode(
                index.views.values(),
                num_tokens=_PROMPT_TOKENS,
                growth_tokens=_DECODE_TOKENS - _PROMPT_TOKENS,
                needed_tokens=_DECODE_TOKENS,
                fingerprint="f",
                failures=NO_FAILURES,
                last_chosen=index.last_chosen,
            ).instance_id
            timer.end("decode, compare all")
        growth_tokens = _DECODE_TOKENS - _PROMPT_TOKENS
        timer.begin()
        if turn % 2:
            best = index.best(
                num_tokens=_PROMPT_TOKENS,
                growth_tokens=growth_tokens,
                needed_tokens=_DECODE_TOKENS,
                fingerprint="f",
            )
            timer.end("decode, best")
            assert best is not None
            chosen = best.rank[3]
        else:
            chosen = index.select(
                num_tokens=_PROMPT_TOKENS,
                growth_tokens=growth_tokens,
                needed_tokens=_DECODE_TOKENS,
                fingerprint="f",
            ).require()
            timer.end("decode, explained")
        index.take(index.views[chosen])
        assert turn >= full_rounds or chosen == expected
        for instance_id, change in ((chosen, 1), (rng.choice(ids), -1)):
            view = index.views[instance_id]
            sequences = max(0, view.sequences + change)
            view = replace(view, sequences=sequences, claimed_tokens=sequences * block_tokens)
            timer.begin()
            index.put(view)
            timer.end("decode, load changed")


def _names(conversation: int) -> Names:
    system = tuple((-1, block) for block in range(_SYSTEM_BLOCKS))
    return system + tuple((conversation, block) for block in range(_CONVERSATION_BLOCKS))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.routing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4000, help="selections per role and size (default %(default)s)")
    parser.add_argument("--full-rounds", type=int, default=100, help="of these, how many also compare all instances")
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
