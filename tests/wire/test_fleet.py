"""FleetService over a real channel: what `tandem serve` asks for and reports, and `tandem status` gets."""

from collections.abc import AsyncIterator
from dataclasses import fields

import grpc
import pytest

from tandem.core.errors import InvalidRequestError, NotFoundError
from tandem.core.replanning import DriftState, Proposal, ReplanStatus, WorkloadChange
from tandem.core.session import BlockCounts, InstanceState, InstanceStatus, LinkStats, Role
from tandem.core.step_coefficients import StepCoefficients
from tandem.core.workload_profile import ProfileSnapshot
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire.channels import open_channel
from tandem.wire.fleet import (
    FleetDescription,
    FleetServicer,
    describe_fleet,
    explain_request,
    report_plan,
    report_replan,
    send_heartbeat,
)
from tandem.wire.replanning import replan_from_pb
from tandem.wire.server import bind, build_server

PROFILE = ProfileSnapshot(3, 61.5, 200, 2.5, 190, (0.25, 1.5), (100, 7), (12, 1), (64, 0), (0, 1))
PROPOSED = ReplanStatus(
    DriftState.PROPOSED,
    (WorkloadChange("rate", 4.0, 6.5, 1.2), WorkloadChange("prompt_tokens", 755.5, 1155.0, 0.0)),
    "planned again",
    Proposal("Disaggregate.", ("2 more prefill", "1 less decode"), 0.25, "/logs/replan-1"),
)


class FakeRegistry:
    def __init__(self) -> None:
        self.closed_window: ProfileSnapshot | None = None
        self.replan: ReplanStatus | None = None
        self.instances: tuple[InstanceStatus, ...] = ()
        self.plan_json: str | None = None

    def heartbeat(self, status: InstanceStatus) -> None:
        self.instances = (status,)

    def describe(self) -> FleetDescription:
        return FleetDescription("tiny", 2.0, self.instances, 3, 1, replan=self.replan)

    def profile(self) -> ProfileSnapshot | None:
        return self.closed_window

    def explain(self, request_id: str) -> str:
        if request_id == "unknown":
            raise NotFoundError("not remembered")
        return f"all of '{request_id}'"

    def replan_reported(self, status: ReplanStatus) -> None:
        self.replan = status

    def plan_reported(self, plan_json: str) -> None:
        self.plan_json = plan_json


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
async def channel(registry: FakeRegistry) -> AsyncIterator[grpc.aio.Channel]:
    server, _ = build_server("secret")
    worker_pb2_grpc.add_FleetServiceServicer_to_server(FleetServicer(registry), server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    channel = open_channel(address, "secret")
    yield channel
    await channel.close()
    await server.stop(None)


@pytest.mark.parametrize("state", InstanceState)
@pytest.mark.parametrize("role", Role)
async def test_a_report_arrives_as_it_was_sent(state: InstanceState, role: Role, channel: grpc.aio.Channel) -> None:
    status = InstanceStatus(
        instance_id="decode-0-1234",
        role=role,
        state=state,
        address="127.0.0.1:4",
        model="tiny",
        fingerprint="f",
        max_model_len=5,
        block_size=6,
        blocks=BlockCounts(total=7, free=8, running=9, cached=10, leased=11, leaked=12),
        waiting_requests=13,
        running_requests=14,
        uncomputed_tokens=15,
        unreserved_tokens=16,
        steps=17,
        step_s=18.5,
        computed_tokens=19,
        cached_tokens=20,
        preemptions=21,
        lease_s=22.5,
        links=(LinkStats("prefill-0-5678", "gloo", 23, 24, 25.5, 26, 27),),
        step_age_s=27.5,
        allocated_blocks=28,
        step_prompt_tokens=36,
        step_cost=StepCoefficients(29.5, 30.5, 31.5, 32.5, 33.5, 34.5),
        weights_hash="0a",
        certificate_not_after_s=37.5,
        unreachable_peers=("prefill-1", "prefill-2"),
    )
    assert 0 not in (getattr(status, field.name) for field in fields(status)), "a field that is left out would pass"
    await send_heartbeat(channel, status, 5.0)
    assert (await describe_fleet(channel, 5.0)).instances == (status,)


async def test_the_profile_comes_where_asked_for(registry: FakeRegistry, channel: grpc.aio.Channel) -> None:
    assert (await describe_fleet(channel, 5.0, with_profile=True)).profile is None
    registry.closed_window = PROFILE
    assert (await describe_fleet(channel, 5.0, with_profile=True)).profile == PROFILE
    assert (await describe_fleet(channel, 5.0)).profile is None


@pytest.mark.parametrize("status", [PROPOSED, ReplanStatus(DriftState.STABLE)])
async def test_what_is_reported_is_described(
    status: ReplanStatus, registry: FakeRegistry, channel: grpc.aio.Channel
) -> None:
    assert (await describe_fleet(channel, 5.0)).replan is None
    await report_replan(channel, status, 5.0)
    assert (await describe_fleet(channel, 5.0)).replan == status


async def test_the_plan_is_reported(registry: FakeRegistry, channel: grpc.aio.Channel) -> None:
    for plan_json in ("{}", ""):
        await report_plan(channel, plan_json, 5.0)
        assert registry.plan_json == plan_json


def test_an_unknown_state_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'panic'"):
        replan_from_pb(worker_pb2.ReplanStatus(state="panic"))


def test_drift_is_the_strongest_change() -> None:
    assert PROPOSED.drift == 1.2
    assert ReplanStatus(DriftState.STABLE).drift == 0.0


async def test_a_request_is_explained(channel: grpc.aio.Channel) -> None:
    assert await explain_request(channel, "r", 5.0) == "all of 'r'"
    with pytest.raises(NotFoundError, match="not remembered"):
        await explain_request(channel, "unknown", 5.0)
