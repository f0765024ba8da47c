from dataclasses import replace

import pytest

from tandem.core.kv_codec import KvCodec
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.resharding import Resharding
from tandem.placement.simulator.deployment import InstanceSpec, KvCoding, NetworkSpec
from tandem.placement.simulator.event_queue import EventQueue
from tandem.placement.simulator.network import Network
from tests.placement.simulator.deployments import LinearCost


def _instance(name: str, node: int) -> InstanceSpec:
    return InstanceSpec(name, "prefill", LinearCost(), 10, node=node)


class Wire:
    """100 bytes/s between nodes, 1000 inside one; a token is one byte. `arrived` says when."""

    def __init__(self, latency_s: float = 0.0, per_concurrent_transfer_s: float = 0.0) -> None:
        self.events = EventQueue()
        self.network = Network(NetworkSpec(1.0, 1000.0, 100.0, latency_s, per_concurrent_transfer_s), self.events)
        self.arrived: dict[str, float] = {}

    def send_at(self, time_s: float, name: str, source: InstanceSpec, destination: InstanceSpec, size: int) -> None:
        self.events.at(time_s, lambda _: self.network.send(source, destination, size, self._arrive, name), None)

    def _arrive(self, name: str) -> None:
        self.arrived[name] = self.events.now_s

    def run(self) -> dict[str, float]:
        while self.events.next_s() < float("inf"):
            self.events.run_next()
        return self.arrived


_A, _B, _C, _D = _instance("a", 0), _instance("b", 1), _instance("c", 2), _instance("d", 0)


def test_two_on_one_link_get_half_each_while_both_are_there() -> None:
    wire = Wire()
    wire.send_at(0.0, "long", _A, _B, 300)
    wire.send_at(1.0, "short", _A, _C, 50)  # out of node 0 as well
    # 100 bytes alone, then 50 + 50 in a second, then the last 150 alone.
    assert wire.run() == pytest.approx({"short": 2.0, "long": 3.5})


def test_turns_are_shared_as_bytes_are_and_latency_is_not() -> None:
    wire = Wire(latency_s=0.5, per_concurrent_transfer_s=0.2)
    wire.send_at(0.0, "one", _A, _B, 10)
    wire.send_at(0.0, "two", _A, _C, 10)
    wire.send_at(9.0, "alone", _A, _C, 10)
    assert wire.run() == pytest.approx({"one": 1.1, "two": 1.1, "alone": 9.8})


def test_the_narrower_of_two_shares_counts() -> None:
    wire = Wire(latency_s=0.5)
    wire.send_at(0.0, "one", _A, _B, 100)
    wire.send_at(0.0, "two", _A, _C, 100)
    wire.send_at(0.0, "three", _B, _C, 50)  # meets "two" on the way into node 2
    assert wire.run() == pytest.approx({"three": 1.5, "one": 2.5, "two": 2.5})


def test_inside_a_node_each_instance_has_its_own_port() -> None:
    wire = Wire()
    wire.send_at(0.0, "inside", _A, _D, 1000)
    wire.send_at(0.0, "other way", _D, _A, 1000)
    wire.send_at(0.0, "out", _A, _B, 100)
    assert wire.run() == pytest.approx({"inside": 1.0, "other way": 1.0, "out": 1.0})


def test_what_is_abandoned_frees_its_link() -> None:
    wire = Wire()
    wire.send_at(0.0, "kept", _A, _B, 200)
    transfer = wire.network.send(_A, _B, 1000, lambda _: pytest.fail("it was abandoned"), None)
    wire.events.at(2.0, lambda _: wire.network.abandon(transfer), None)
    assert wire.run() == pytest.approx({"kept": 3.0})


def test_between_two_shapes_a_transfer_takes_as_much_longer_as_was_measured() -> None:
    two, plain = replace(_A, shape=ParallelShape(2)), _D
    resharding = {(ParallelShape(2), ParallelShape()): Resharding(extra_s=0.25, factor=1.5)}
    wire = Wire(latency_s=0.5, per_concurrent_transfer_s=0.2)
    wire.network = Network(NetworkSpec(1.0, 1000.0, 100.0, 0.5, 0.2, resharding), wire.events)
    wire.send_at(0.0, "other shape", two, plain, 1000)
    wire.send_at(9.0, "equal shapes", two, two, 1000)
    wire.send_at(20.0, "not measured", plain, two, 1000)
    assert wire.run() == pytest.approx({"other shape": 2.45, "equal shapes": 10.7, "not measured": 21.7})


def test_kv_is_coded_between_nodes_only() -> None:
    """Of 128 tokens, int4 sends the last 64 as they are."""
    coding = KvCoding(KvCodec.INT4, block_size=16, head_dim=128, element_bytes=2.0)
    wire = Wire()
    wire.network = Network(replace(NetworkSpec(1.0, 1000.0, 100.0), coding=coding), wire.events)
    wire.send_at(0.0, "out", _A, _B, 128)
    wire.send_at(0.0, "inside", _A, _D, 1000)
    coded_share = (16 * 128 + 2 * 2 * (128 + 16)) / (16 * 2 * 128 * 2)  # codes of 4 bits, lows and steps of two bytes
    assert wire.run() == pytest.approx({"out": (64 + 64 * coded_share) / 100, "inside": 1.0})
