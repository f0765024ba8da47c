"""How reports and the ledger become the views that `scheduling.routing` compares."""

from functools import partial

import pytest

from tandem.core.errors import ContextLengthError
from tandem.core.session import BlockCounts, InstanceState, Role
from tandem.scheduling.instance_selector import InstanceSelector, Place
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.prefix_index import block_hashes
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing_settings import RoutingSettings
from tests.scheduling.routing_fakes import DrivenRouter, make_status


class Selector(InstanceSelector):
    """Each choice counts, without a machine that would dispatch."""

    def __init__(self, *instance_ids: str) -> None:
        super().__init__(RoutingSettings(local_prefill=False))
        self.join(*instance_ids)

    def join(self, *instance_ids: str, **changes: object) -> None:
        for instance_id in instance_ids:
            self.report(instance_id, **changes)
            self.instances[instance_id].is_connected = True
            self.put(self.instances[instance_id])
        self.length.changed()

    def report(self, instance_id: str, **changes: object) -> None:
        status = make_status(instance_id, **changes)
        instance = self.instances.get(instance_id)
        if instance is None:
            instance = KnownInstance(status)
        else:
            if instance.role is not status.role:
                self.leave_role(instance)
            instance.report(status)
        self.update(instance)
        self.length.changed()

    def prefill(
        self, prompt: tuple[int, ...] = (1, 2, 3), avoid: frozenset[str] = frozenset(), salt: str = ""
    ) -> Place:
        request = make_request(prompt, salt)
        request.avoid = avoid
        place = self.choose_first(request, 0.0)
        assert place is not None
        self.put(place.instance, is_chosen=True)
        self.prefixes.record(request, place.instance)
        return place

    def decode(self, prefill_id: str, avoid: frozenset[str] = frozenset()) -> Place:
        request = make_request((1, 2, 3))
        request.avoid = avoid
        prefill = self.instances[prefill_id]
        place = self.choose_decode(Attempt(1, request, prefill, True, 0.0), prefill, 0.0)
        assert place is not None
        self.put(place.instance, is_chosen=True)
        return place


def make_request(prompt: tuple[int, ...], salt: str = "") -> RoutedRequest:
    name_blocks = partial(block_hashes, prompt, salt=salt)
    return RoutedRequest("r", num_prompt_tokens=len(prompt), max_tokens=5, received_s=0.0, name_blocks=name_blocks)


def terms(place: Place, which: int = 0) -> dict[str, float]:
    assert place.selection is not None
    return dict(place.selection.candidates[which].terms)


def test_own_queue_counts_before_the_next_heartbeat() -> None:
    router = DrivenRouter()
    router.join("p1", "p2", "d1")
    long = router.ask("long", prompt=200)
    busy = router.take().instance_id
    for number in range(3):
        router.ask(number, prompt=2)
        assert router.take().instance_id != busy
    router.machine.cancel(long, 0.0)
    assert router.loads()[busy][1] == 0


def test_other_routers_queue_counts() -> None:
    selector = Selector("p1", "p2", "d1")
    selector.report("p1", uncomputed_tokens=300)
    for i in range(3):
        assert selector.prefill((i, 1)).instance.instance_id == "p2"


def test_avoided_instances_are_a_last_resort() -> None:
    selector = Selector("p1", "p2", "d1", "d2")
    for _ in range(4):
        assert selector.prefill(avoid=frozenset({"p1"})).instance.instance_id == "p2"
        assert selector.decode("p2", avoid=frozenset({"d2"})).instance.instance_id == "d1"
    assert selector.prefill(avoid=frozenset({"p1", "p2"})).instance.instance_id in ("p1", "p2")


def test_decode_goes_where_memory_is() -> None:
    selector = Selector("p1", "d1", "d2")
    selector.report("d1", blocks=BlockCounts(total=64, free=4, running=60, cached=0, leased=0))
    for _ in range(3):
        place = selector.decode("p1")
        assert place.instance.instance_id == "d2"
        assert place.selection is not None
        assert "worse by" in place.selection.explain()


def test_open_requests_count_on_decode_before_the_next_heartbeat() -> None:
    router = DrivenRouter()
    router.join("p1", "d1")
    router.ask("big", prompt=100, output=100)
    router.start(router.take())
    assert router.take().instance_id == "d1"
    assert router.loads()["d1"][2] == 208, "by whole blocks"
    router.join("d2")
    for number in range(2):
        router.ask(number)
        router.start(router.take())
        assert router.take().instance_id == "d2"


def test_prefix_of_an_instance_that_is_gone_is_forgotten() -> None:
    selector, prompt = Selector("p1", "d1"), tuple(range(64))
    selector.prefill(prompt)
    assert terms(selector.prefill(prompt))["cached"] == -63
    selector.remove("p1")
    selector.join("p1")
    assert terms(selector.prefill(prompt))["cached"] == 0


def test_prefix_is_of_one_salt() -> None:
    selector, prompt = Selector("p1", "d1"), tuple(range(64))
    selector.prefill(prompt, salt="a")
    assert terms(selector.prefill(prompt, salt="b"))["cached"] == 0


def test_a_prompts_blocks_are_named_once() -> None:
    """Not for each attempt: hashing a long prompt takes milliseconds."""
    sizes: list[int] = []

    def name_blocks(size: int) -> list[int]:
        sizes.append(size)
        return [1, 2]

    router = DrivenRouter()
    router.join("p1", "p2", "d1")
    request = RoutedRequest("r", num_prompt_tokens=40, max_tokens=5, received_s=0.0, name_blocks=name_blocks)
    router.machine.submit(request, 0.0)
    router.machine.instance_lost(router.take().instance_id, 0.0)
    assert len(router.sent) == 1
    assert sizes == [16]


def test_prompt_too_long_for_the_pair() -> None:
    with pytest.raises(ContextLengthError, match="at most 256"):
        Selector("p1", "d1").length.check(300)


def test_cached_part_of_a_prompt_is_no_queue() -> None:
    router = DrivenRouter()
    router.join("p1", "d1")
    request = router.ask("r", prompt=100)
    sent, instance = router.take(), router.machine.instances["p1"]
    assert instance.queued_tokens == 100
    router.start(sent, cached=64)
    assert instance.queued_tokens == 36
    router.first_token(sent)
    assert instance.queued_tokens == 0
    router.machine.cancel(request, 0.0)
    assert (sent.attempt.handle, "p1") in router.cancelled


def test_an_instance_in_another_role_is_chosen_for_that_only() -> None:
    selector = Selector("p1", "p2", "d1")
    assert {selector.prefill().instance.instance_id for _ in range(2)} == {"p1", "p2"}
    selector.report("p2", role=Role.DECODE)
    for i in range(4):
        assert selector.prefill((i,)).instance.instance_id == "p1"
    assert {selector.decode("p1").instance.instance_id for _ in range(2)} == {"d1", "p2"}


def test_draining_and_lost_instances_are_not_chosen() -> None:
    selector = Selector("p1", "p2", "d1", "d2")
    selector.report("p1", state=InstanceState.DRAINING)
    selector.instances["d1"].is_connected = False
    selector.put(selector.instances["d1"])
    for i in range(3):
        assert selector.prefill((i, 1)).instance.instance_id == "p2"
        assert selector.decode("p2").instance.instance_id == "d2"
    selector.report("p1")
    assert {selector.prefill().instance.instance_id for _ in range(2)} == {"p1", "p2"}


def test_instances_of_other_block_sizes_keep_their_own_cache() -> None:
    selector = Selector("p1", "d1")
    selector.prefill(tuple(range(64)))
    selector.join("p2", block_size=32)
    place = selector.prefill(tuple(range(50)))
    assert place.instance.instance_id == "p1"
    assert terms(place)["cached"] == -48
    assert terms(place, 1)["cached"] == 0
