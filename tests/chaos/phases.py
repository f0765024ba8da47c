"""Brings requests into a phase for certain, and proves that they are in it."""

from dataclasses import dataclass

from tandem import Client
from tests.chaos.answers import Answer, Ask, answer, asks, tokens_of
from tests.chaos.faults import ChaosCluster, until

PHASES = ("queued", "prefill", "transfer", "decode")
PROMPT_TOKENS = 1024  # in chunks of CHUNK_TOKENS
CHUNK_TOKENS = 128
STEP_S = 0.1

SECTIONS = {  # of the clusters whose requests are brought into phases
    "prefill": {"max_batch_tokens": CHUNK_TOKENS},
    "decode": {"stream_kv_from": "128KiB"},  # long prompts: their KV moves while they are prefilled
    "router": {"max_outstanding_tokens": PROMPT_TOKENS, "replacement_wait_s": 20.0},
}


def asks_for(phase: str, count: int) -> list[Ask]:
    """Long prompts where the prompt is to last, long answers where the answer is."""
    if phase in ("queued", "prefill"):
        return asks(count, prompt_tokens=PROMPT_TOKENS, max_tokens=12)
    return asks(count, max_tokens=60)


@dataclass
class InPhase:
    """Requests that are all in `phase`; of "queued" the last one, while those before it are being prefilled.
    `undisturbed` are the tokens that they must get."""

    phase: str
    answers: list[Answer]
    undisturbed: list[tuple[int, ...]]

    def check_tokens(self) -> None:
        assert [each.wait() for each in self.answers] == self.undisturbed


def bring_into(phase: str, cluster: ChaosCluster, client: Client) -> InPhase:
    """As many requests as there are prefill instances, one more for "queued"; every instance has some."""
    prefill = [name for name in cluster.processes if name.startswith("prefill")]
    decode = [name for name in cluster.processes if name.startswith("decode")]
    wanted = asks_for(phase, len(prefill) + (phase == "queued"))
    undisturbed = tokens_of(client, wanted)
    cluster.wait_idle(5.0)
    match phase:
        case "queued" | "prefill":
            for name in prefill:
                cluster.steps(name, f"sleep {STEP_S}")
        case "transfer":
            for name in prefill:
                cluster.steps(name, f"sleep {STEP_S}")  # a prompt is one step: the next request goes elsewhere
            cluster.hold_kv(*prefill)
        case "decode":
            for name in decode:
                cluster.steps(name, f"sleep {STEP_S / 2}")
    answers = answer(client, wanted)
    match phase:
        case "queued" | "prefill":
            until(lambda: all(_computes(cluster, name) for name in prefill), 5.0, "every prefill instance computes")
            until(lambda: all(_is_chosen(cluster, name) for name in decode), 2.0, "every decode instance will decode")
            assert not any(each.tokens for each in answers), "the prompts are too short for this test"
            if phase == "queued":
                assert cluster.metric("tandem_queued_requests") == len(prefill) + 1
                assert cluster.metric("tandem_instance_open_requests", role="prefill") == len(prefill)
        case "transfer":
            until(lambda: all(each.tokens for each in answers), 5.0, "every request has its first token")
            until(lambda: all(_holds(cluster, name) for name in prefill), 5.0, "every prefill instance holds KV")
            until(lambda: all(_receives(cluster, name) for name in decode), 5.0, "every decode instance waits for KV")
            assert all(len(each.tokens) == 1 for each in answers), "the KV has arrived"
        case "decode":
            until(lambda: all(len(each.tokens) >= 4 for each in answers), 10.0, "every request decodes")
            assert not any(each.is_done for each in answers), "the answers are too short for this test"
            until(lambda: all(_receives(cluster, name) for name in decode), 5.0, "every decode instance decodes")
    return InPhase(phase, answers, undisturbed)


def _computes(cluster: ChaosCluster, name: str) -> bool:
    status = cluster.find(name)
    return status is not None and status.running_requests > 0 and 0 < status.uncomputed_tokens < PROMPT_TOKENS


def _holds(cluster: ChaosCluster, name: str) -> bool:
    status = cluster.find(name)
    return status is not None and status.blocks.leased > 0


def _receives(cluster: ChaosCluster, name: str) -> bool:
    status = cluster.find(name)
    return status is not None and status.running_requests > 0 and status.blocks.running > 0


def _is_chosen(cluster: ChaosCluster, name: str) -> bool:
    return cluster.metric("tandem_instance_open_requests", tandem_instance=name) > 0
