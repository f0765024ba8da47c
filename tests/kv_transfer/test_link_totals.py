"""Counters per peer: bounded, and their sum never goes down."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.session import LinkStats
from tandem.core.transfer import Transport
from tandem.kv_transfer.link_totals import LinkTotals


def test_the_peers_linked_last_have_an_entry_and_the_rest_is_summed() -> None:
    totals = LinkTotals(max_peers=2)
    for peer_id in ("a", "b", "c"):
        totals.linked(peer_id, Transport.GLOO)
        totals.add(peer_id, transfers=1, nbytes=10, seconds=0.5)
    totals.linked("b", Transport.SHARED_MEMORY)  # what went over gloo is no longer counted as its own
    totals.linked("d", Transport.GLOO)
    totals.add("a", failures=1)  # after its entry has gone
    assert totals.stats() == (
        LinkStats("b", "shared_memory", 0, 0, 0.0, 0),
        LinkStats("d", "gloo", 0, 0, 0.0, 0),
        LinkStats("other", "gloo", 3, 30, 1.5, 0),
        LinkStats("other", "other", 0, 0, 0.0, 1),
    )


def test_a_peer_that_is_gone_is_forgotten_but_not_its_counts() -> None:
    totals = LinkTotals(max_peers=2)
    totals.linked("a", Transport.GLOO)
    totals.forget("a")
    assert totals.stats() == ()
    totals.linked("a", Transport.GLOO)
    totals.add("a", transfers=1, nbytes=10, seconds=0.5)
    totals.forget("a")
    totals.forget("a")
    assert totals.stats() == (LinkStats("other", "gloo", 1, 10, 0.5, 0),)


_PEERS = st.sampled_from("abcd")


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("linked"), _PEERS, st.sampled_from(Transport)),
            st.tuples(st.just("add"), _PEERS, st.integers(1, 9)),
            st.tuples(st.just("forget"), _PEERS, st.none()),
        )
    )
)
def test_the_sum_of_a_transport_never_goes_down(calls: list[tuple[str, str, Transport | int | None]]) -> None:
    totals, before, expected = LinkTotals(max_peers=2), Counter[str](), 0
    for call, peer_id, argument in calls:
        match call, argument:
            case "linked", Transport():
                totals.linked(peer_id, argument)
            case "add", int():
                totals.add(peer_id, transfers=argument)
                expected += argument
            case _:
                totals.forget(peer_id)
        after = Counter[str]()
        for stats in totals.stats():
            after[stats.transport] += stats.transfers
        assert all(after[transport] >= count for transport, count in before.items())
        assert after.total() == expected
        assert len(totals.stats()) <= 2 + len(Transport) + 1
        before = after
