"""Load of other routers, as far as an instance's reports show it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.session import BlockCounts
from tandem.scheduling.routing_settings import RoutingSettings
from tests.scheduling.routing_fakes import DrivenRouter, Sent, make_status


def test_a_router_that_is_alone_sees_no_foreign_load() -> None:
    """A report may be older than events that arrived before it."""
    router = DrivenRouter()
    router.join("p1", "d1")
    router.ask("a", prompt=100)
    sent = router.take()
    router.start(sent)
    router.first_token(sent)
    router.machine.transfer_committed(sent.attempt, router.now_s)
    router.finish(sent)
    late = make_status("p1", uncomputed_tokens=100, running_requests=1)
    router.machine.instance_reported(late, router.now_s)
    assert router.machine.instances["p1"].queued_tokens == 0
    blocks = BlockCounts(total=64, free=57, running=7, cached=0, leased=0)
    router.machine.instance_reported(make_status("d1", blocks=blocks, running_requests=1), router.now_s)
    view = router.machine.instances["d1"].decode_view()
    assert (view.claimed_tokens, view.sequences) == (0, 0)
    for _ in range(2):  # what is there still is others'
        router.machine.instance_reported(late, router.now_s)
    assert router.machine.instances["p1"].queued_tokens == 100


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["ask", "done", "seen", "describe", "report"]), st.integers(0, 3)), max_size=60)
)
def test_own_work_never_counts_as_foreign_load(script: list[tuple[str, int]]) -> None:
    """The instance computes before its event is seen, and a report is read some time after what it describes."""
    router = DrivenRouter(RoutingSettings(retry_pause_s=0.0))
    router.join("p1", "d1")
    there: list[Sent] = []  # not computed
    unseen: list[Sent] = []
    described = 0
    for number, (kind, which) in enumerate(script):
        if kind == "ask":
            router.ask(number, prompt=7 + which)
            there.append(router.take())
        elif kind == "done" and there:
            unseen.append(there.pop(which % len(there)))
        elif kind == "seen" and unseen:
            router.first_token(unseen.pop(which % len(unseen)), is_last=True)
        elif kind == "describe":  # between the last report and the next
            described = sum(sent.attempt.num_tokens for sent in there)
        else:
            router.machine.instance_reported(make_status("p1", uncomputed_tokens=described), router.now_s)
            described = sum(sent.attempt.num_tokens for sent in there)
        instance = router.machine.instances["p1"]
        assert instance.queued_tokens == instance.uncomputed_tokens
