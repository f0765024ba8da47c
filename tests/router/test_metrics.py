"""What `/metrics` shows of requests and of the fleet."""

import asyncio
import sys
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tandem.core.errors import OverloadedError, TandemError
from tandem.core.instance_id import make_instance_id
from tandem.core.replanning import DriftState, Proposal, ReplanStatus, WorkloadChange
from tandem.core.request import FinishReason
from tandem.core.session import BLOCK_OWNERS, BlockCounts, LinkStats, Role
from tandem.core.timeline import PARTS, Stage, Timeline
from tandem.core.transfer import Transport
from tandem.router import fleet_metrics, metrics, slo_metrics
from tandem.router.metric_descriptions import Description
from tandem.router.metrics import OUTCOMES, Metrics
from tandem.router.records import AttemptRecord, RequestRecord
from tandem.scheduling.routing import Selection
from tests.instance_status import ROLES
from tests.router.fakes import Cluster, make_request, make_status, running_cluster

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(page: Metrics) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(page.render().decode()):
        for sample in family.samples:
            samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def make_record(outcome: str = "length") -> RequestRecord:
    stamps = {stage: i * 0.01 for i, stage in enumerate(Stage)}
    timeline = Timeline(stamps, num_prompt_tokens=20, num_cached_tokens=16, num_output_tokens=5, num_attempts=2)
    attempts = tuple(AttemptRecord(epoch=i, prefill_id="p1", prefill_selection=Selection("p1", ())) for i in range(2))
    return RequestRecord("r", outcome, None, timeline, attempts)


def watched(cluster: Cluster) -> Metrics:
    page = Metrics()
    page.watch(cluster.dispatcher)
    return page


def test_finished_request_is_counted_with_its_parts() -> None:
    page = Metrics()
    page.requests.finished(make_record())
    samples = read(page)
    assert samples["tandem_requests_total", (("outcome", "length"),)] == 1
    assert samples["tandem_ttft_seconds_count", ()] == 1
    assert samples["tandem_tpot_seconds_count", ()] == 1
    parts_s = sum(samples["tandem_request_part_seconds_sum", (("part", name),)] for _, name in PARTS)
    assert abs(parts_s - make_record().timeline.total_s) < 1e-9
    assert samples["tandem_attempts_total", ()] == 2
    assert samples["tandem_retries_total", ()] == 1
    assert samples["tandem_prompt_tokens_total", ()] == 20
    assert samples["tandem_cached_prompt_tokens_total", ()] == 16
    assert samples["tandem_output_tokens_total", ()] == 5


def test_a_request_that_waited_in_vain_is_counted() -> None:
    page = Metrics()
    page.requests.finished(replace(make_record("deadline_exceeded"), attempts=()))
    samples = read(page)
    assert samples["tandem_requests_total", (("outcome", "deadline_exceeded"),)] == 1
    assert samples["tandem_attempts_total", ()] == samples["tandem_retries_total", ()] == 0


def test_parts_are_those_of_complete_requests() -> None:
    page = Metrics()
    page.requests.finished(make_record("deadline_exceeded"))
    samples = read(page)
    assert samples["tandem_requests_total", (("outcome", "deadline_exceeded"),)] == 1
    assert samples["tandem_ttft_seconds_count", ()] == 1
    assert samples["tandem_request_part_seconds_count", (("part", "decode_s"),)] == 0


def test_outcomes_are_a_fixed_list() -> None:
    class StrangeError(TandemError):
        code = "made up by a client"

    page = Metrics()
    before = len(read(page))
    page.requests.refused(OverloadedError("full"))
    page.requests.refused(StrangeError("?"))
    samples = read(page)
    assert len(samples) == before
    assert samples["tandem_requests_total", (("outcome", "overloaded"),)] == 1
    assert samples["tandem_requests_total", (("outcome", "internal"),)] == 1
    assert {reason.value for reason in FinishReason} <= set(OUTCOMES)


def test_all_names_have_the_prefix_and_are_described_once() -> None:
    modules = (metrics, fleet_metrics, slo_metrics)
    names = [what.name for module in modules for what in vars(module).values() if isinstance(what, Description)]
    assert len(names) == len(set(names)) > 20
    assert all(name.startswith("tandem_") for name in names)


async def test_fleet_as_the_heartbeats_tell_it() -> None:
    async with running_cluster("p1", "d1") as cluster:
        page = watched(cluster)
        link = LinkStats("p1", "shared_memory", transfers=3, transfer_bytes=4096, transfer_s=0.5, failures=1)
        blocks = BlockCounts(total=64, free=40, running=20, cached=0, leased=3, leaked=1)
        cluster.report(
            make_status(
                "d1",
                Role.DECODE,
                blocks=blocks,
                links=(link,),
                preemptions=2,
                steps=9,
                waiting_requests=4,
                step_age_s=0.5,
                allocated_blocks=123_456,
                certificate_not_after_s=2e9,
            )
        )
        samples = read(page)
        decode = (("role", "decode"), ("tandem_instance", "d1"))
        assert samples["tandem_instance_up", decode] == 1
        assert samples["tandem_instance_waiting_requests", decode] == 4
        assert samples["tandem_preemptions_total", decode] == 2
        assert samples["tandem_instance_steps_total", decode] == 9
        assert samples["tandem_instance_step_age_seconds", decode] == 0.5
        assert samples["tandem_instance_python_blocks", decode] == 123_456
        assert samples["tandem_instance_certificate_not_after_timestamp_seconds", decode] == 2e9
        assert samples["tandem_router_python_blocks", ()] == pytest.approx(sys.getallocatedblocks(), rel=0.5)
        owners = {
            owner: samples["tandem_kv_blocks", (("owner", owner), ("role", "decode"), ("tandem_instance", "d1"))]
            for owner in BLOCK_OWNERS
        }
        assert owners == {"total": 64, "free": 40, "running": 20, "cached": 0, "leased": 3, "leaked": 1}
        by_transport = (*decode, ("transport", "shared_memory"))
        assert samples["tandem_transfers_total", by_transport] == 3
        assert samples["tandem_transfer_bytes_total", by_transport] == 4096
        assert samples["tandem_transfer_seconds_total", by_transport] == 0.5
        assert samples["tandem_transfer_failures_total", by_transport] == 1
        assert samples["tandem_links", decode] == 1


async def test_gone_instances_take_their_series_with_them() -> None:
    async with running_cluster("p1", "d1") as cluster:
        page = watched(cluster)
        address = cluster.instance("p1").status.address
        assert any(("tandem_instance", "p1") in labels for _, labels in read(page))
        cluster.report(make_status("p2", Role.PREFILL, address=address))
        samples = read(page)
        assert not any(("tandem_instance", "p1") in labels for _, labels in samples)
        assert samples["tandem_instance_up", (("role", "prefill"), ("tandem_instance", "p2"))] == 0


async def test_restarts_and_new_pairs_add_no_series() -> None:
    """Ten generations of two prefill and two decode instances, each of which has links to all that ever were."""
    async with running_cluster() as cluster:
        page, ever, peers, per_generation = watched(cluster), set[object](), [], []
        for generation in range(10):
            ids = [make_instance_id(name, 1000 * generation + i) for i, name in enumerate(("p0", "p0", "d0", "d1"))]
            peers += ids[:2]
            transports = (*Transport, "made up by an instance")
            links = tuple(LinkStats(peer, transports[i % 4], 1, 2, 0.5, 0) for i, peer in enumerate(peers * 4))
            for port, instance_id in enumerate(ids):  # at the address of its predecessor, whose place it takes
                cluster.report(make_status(instance_id, ROLES[instance_id[0]], address=f"h:{port}", links=links))
            samples = read(page)
            transfers = sum(value for (name, _), value in samples.items() if name == "tandem_transfers_total")
            assert transfers == len(ids) * len(links), "nothing is lost in the sums"
            ever |= set(samples)
            per_generation.append(len(ever))
        assert per_generation[0] == per_generation[-1]
        assert {dict(labels)["tandem_instance"] for _, labels in ever if "tandem_instance" in dict(labels)} == {
            "p0",
            "p0#2",
            "d0",
            "d1",
        }


async def test_requests_that_run_now() -> None:
    async with running_cluster("p1", "d1") as cluster:
        page = watched(cluster)
        running = [cluster.start(make_request(f"r{i}")) for i in range(3)]
        samples = read(page)
        assert samples["tandem_queued_requests", ()] == 3
        assert samples["tandem_running_requests", ()] == 0
        assert samples["tandem_instance_open_requests", (("role", "prefill"), ("tandem_instance", "p1"))] == 3
        await asyncio.gather(*(each.aclose() for each in running))
        assert read(page)["tandem_queued_requests", ()] == 0


def test_a_watched_plan_shows_its_drift_and_what_another_would_gain() -> None:
    page = Metrics()
    status: ReplanStatus | None = None
    page.watch_replanning(lambda: status)
    assert not any("replan" in name or "drift" in name for name, _ in read(page)), "no plan, no series"
    status = ReplanStatus(
        DriftState.SUSPECT, (WorkloadChange("rate", 1.0, 2.0, 1.5), WorkloadChange("prompt_tokens", 9.0, 9.0, 0.2))
    )
    samples = read(page)
    assert samples["tandem_workload_drift", ()] == 1.5
    assert samples["tandem_replan_state", (("state", "suspect"),)] == 1
    assert sum(value for (name, _), value in samples.items() if name == "tandem_replan_state") == 1
    assert samples["tandem_replan_proposed_gain", ()] == 0
    status = ReplanStatus(DriftState.PROPOSED, proposal=Proposal("", (), 0.25, ""))
    assert read(page)["tandem_replan_proposed_gain", ()] == 0.25
