"""Counters per peer: bounded, and their sum never goes down."""

from tandem.core.session import LinkStats
from tandem.core.transfer import Transport
from tandem.kv_transfer.link_totals import LinkTotals


def test_the_peers_linked_last_have_an_entry_and_the_rest_is_summed() -> None:
    totals = LinkTotals(max_peers=2)
    for peer_id in ("a", "b", "c"):
        totals.linked(peer_id, Transport.GLOO)
        totals.add(peer_id, transfers=1, nbytes=10, seconds=0.5)
    totals.linked("b", Transport.SHARED_MEMORY)  # the transport is the last link's
    totals.linked("d", Transport.GLOO)
    totals.add("a", failures=1)  # after its entry has gone
    assert totals.stats() == (
        LinkStats("b", "shared_memory", 1, 10, 0.5, 0),
        LinkStats("d", "gloo", 0, 0, 0.0, 0),
        LinkStats("other", "mixed", 2, 20, 1.0, 1),
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
    assert totals.stats() == (LinkStats("other", "mixed", 1, 10, 0.5, 0),)
