"""The routing machine on the virtual clock: events of simulated instances go in, decisions and timestamps come out."""

import math
from collections.abc import Mapping
from functools import partial

from tandem.core.errors import StaleEpochError, TandemError
from tandem.core.request import SamplingParams
from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.session import BlockCounts, InstanceState, InstanceStatus, Role
from tandem.placement.simulator import record as stages
from tandem.placement.simulator.attempt import SimulatedAttempt
from tandem.placement.simulator.counted import counted_request
from tandem.placement.simulator.deployment import RouterSpec
from tandem.placement.simulator.event_queue import EventQueue
from tandem.placement.simulator.instance import SimulatedInstance
from tandem.placement.simulator.network import Network
from tandem.placement.simulator.prefixes import BlockNames
from tandem.placement.simulator.record import Record
from tandem.placement.simulator.run_tracker import RunTracker
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing import Selection
from tandem.scheduling.routing_machine import RoutingMachine


class SimulatedRouter:
    """A `RoutingDriver`, and the instances' `Listener`. A request's key is its row in the stream.

    `wake_s` is when to call `wake`.
    """

    def __init__(
        self,
        spec: RouterSpec,
        requests: RequestStream,
        events: EventQueue,
        network: Network,
        record: Record,
    ) -> None:
        """`connect` it to its instances before the first request."""
        self.machine = RoutingMachine(
            self, spec.routing, explain=False, selector_type=spec.selector_type, tracker_type=RunTracker
        )
        self.wake_s = math.inf
        self._spec = spec
        self._events = events
        self._network = network
        self._record = record
        self._stamps = record.stamps
        self._arrival_s = requests.arrival_s.tolist()
        self._prompt_tokens = requests.prompt_tokens.tolist()
        self._output_tokens = requests.output_tokens.tolist()
        self._slo_class = requests.slo_class.tolist()
        self._sampling: dict[int, SamplingParams] = {}
        self._attempts: dict[int, SimulatedAttempt] = {}  # the last one of each open request, by row
        self._names: BlockNames | None = None
        self._instances: Mapping[str, SimulatedInstance] = {}

    def connect(self, instances: Mapping[str, SimulatedInstance], names: BlockNames | None = None) -> None:
        """`names`, if prompts share prefixes that instances cache."""
        self._names = names
        self._instances = instances
        for instance_id in instances:
            self._join(instance_id)

    def arrive(self, row: int, received_s: float | None = None) -> None:
        """The request has passed admission and looks for an instance. `received_s`: None is its time in the stream."""
        now_s, names = self._events.now_s, self._names
        arrival_s = self._arrival_s[row] if received_s is None else received_s
        self._stamps[row, stages.RECEIVED] = arrival_s
        self._stamps[row, stages.ADMITTED] = now_s
        request = RoutedRequest(
            row,
            num_prompt_tokens=self._prompt_tokens[row],
            max_tokens=self._output_tokens[row],
            received_s=arrival_s,
            deadline_s=arrival_s + self._spec.request_timeout_s,
            name_blocks=None if names is None else partial(names.shared_of_size, row),
            slo=self._slo_of(row),
        )
        try:
            self.machine.submit(request, now_s)
        except TandemError:
            self._record.refuse(row, now_s)

    def _slo_of(self, row: int) -> RequestSlo:
        classes, index = self._spec.slo, self._slo_class[row]
        return classes[index] if index < len(classes) else NO_SLO

    def wake(self) -> None:
        self.wake_s = math.inf
        self.machine.advance(self._events.now_s)

    def instance_lost(self, instance_id: str) -> None:
        if instance_id in self.machine.instances:
            self._fail(instance_id)
            self.machine.instance_removed(instance_id, self._events.now_s)

    def instance_found(self, instance_id: str) -> None:
        self._instances[instance_id].restart()
        self._join(instance_id)

    def _fail(self, instance_id: str) -> None:
        """What it had comes to nothing, but for the tokens that it has sent."""
        instance, machine = self._instances[instance_id], self.machine
        instance.fail()
        for routed in machine.instances[instance_id].attempts():
            attempt = self._attempts[_row(routed.request)]
            instance.release(attempt)
            if routed.has_first_token:
                num_tokens = attempt.num_handed_on - routed.request.num_output_tokens
                machine.tokens_generated(routed, num_tokens, self._events.now_s)

    def _join(self, instance_id: str) -> None:
        """A report of an idle instance. Instances with equal fingerprints can exchange KV."""
        instance = self._instances[instance_id]
        spec, now_s = instance.spec, self._events.now_s
        is_bound = self._spec.same_node_only and spec.role != "colocated"
        status = InstanceStatus(
            instance_id=instance_id,
            role=Role(spec.role),
            state=InstanceState.READY,
            address="",
            model="",
            fingerprint=str(spec.node) if is_bound else "",
            max_model_len=instance.max_model_len,
            block_size=spec.block_size,
            blocks=BlockCounts(spec.num_blocks, spec.num_blocks, running=0, cached=0, leased=0),
            waiting_requests=0,
            running_requests=0,
            uncomputed_tokens=0,
            unreserved_tokens=0,
            lease_s=spec.lease_s,
            step_cost=spec.step_cost,
            step_prompt_tokens=instance.step_prompt_tokens,
        )
        self.machine.instance_reported(status, now_s)
        self.machine.instance_connected(instance_id, now_s)

    # --- decisions ---------------------------------------------------------------------------------------------------

    def submit(self, attempt: Attempt, instance_id: str, source_id: str | None, selection: Selection | None) -> None:
        instance, routed = self._instances[instance_id], attempt.request
        row = _row(routed)
        if source_id is not None:
            own = self._attempts[row]
            self._abandon_transfer(own)  # to an instance that is lost
            own.decode, own.is_reserved = instance, False
            instance.submit(own, is_remote=True)
            return
        max_tokens = routed.max_tokens
        sampling = self._sampling.get(max_tokens)
        if sampling is None:
            sampling = self._sampling[max_tokens] = SamplingParams(max_tokens=max_tokens)
        request = counted_request(row, attempt.num_tokens, routed.num_output_tokens, sampling, routed.effective_slo)
        self._attempts[row] = own = SimulatedAttempt(row, attempt, request, instance)
        self._record.begin_attempt(row, self._events.now_s)
        instance.submit(own, hand_over=attempt.hand_over)

    def cancel(self, attempt: Attempt, instance_id: str) -> None:
        own = self._attempts[_row(attempt.request)]
        self._abandon_transfer(own)
        self._instances[instance_id].release(own)

    def renew_lease(self, attempt: Attempt, instance_id: str) -> None:
        self._instances[instance_id].renew_lease(self._attempts[_row(attempt.request)])

    def end(self, request: RoutedRequest, error: TandemError | None) -> None:
        self._attempts.pop(_row(request), None)
        if error is None:
            self._record.num_finished += 1
        else:
            self._record.refuse(_row(request), self._events.now_s)

    def wake_at(self, time_s: float) -> None:
        self.wake_s = time_s

    # --- what the instances tell -------------------------------------------------------------------------------------

    def prefill_started(self, attempt: SimulatedAttempt, num_cached_tokens: int) -> None:
        if attempt.routed.prefill is not None:
            self._record.num_cached_tokens[attempt.row] = num_cached_tokens
            self.machine.prefill_started(attempt.routed, num_cached_tokens, self._events.now_s)

    def prefill_finished(self, attempt: SimulatedAttempt, started_s: float) -> None:
        routed, row, begun_on = attempt.routed, attempt.row, attempt.begun_on
        if routed.prefill is None:
            return
        now_s = self._events.now_s
        token_s = now_s + self._spec.first_token_s
        attempt.is_computed = True
        attempt.num_handed_on += 1
        if attempt.is_first or not self._record.has(row, stages.FIRST_TOKEN):
            self._stamps[row, stages.PREFILL_STARTED] = started_s
            self._stamps[row, stages.FIRST_TOKEN] = token_s
        is_last = routed.growth_tokens == 1 or routed.num_tokens + 1 >= begun_on.spec.max_model_len
        if is_last:
            self._stamps[row, stages.FINISHED] = token_s
            if routed.hand_over:
                begun_on.release(attempt)  # others drop it by themselves
        self.machine.prefill_finished(routed, now_s, is_last=is_last)
        if attempt.is_reserved and routed.decode is not None:
            self._send(attempt)

    def decode_reserved(self, attempt: SimulatedAttempt) -> None:
        if attempt.routed.decode is None:
            return
        if attempt.is_taken:
            assert attempt.decode is not None
            attempt.decode.release(attempt)
            self.failed(attempt, attempt.decode.spec.instance_id, StaleEpochError("the KV was fetched already"))
            return
        attempt.is_reserved = True
        if attempt.is_first or not self._record.has(attempt.row, stages.SECOND_TOKEN):
            self._stamps[attempt.row, stages.DECODE_RESERVED] = self._events.now_s
        if attempt.is_computed:
            self._send(attempt)

    def transfer_committed(self, attempt: SimulatedAttempt) -> None:
        now_s = self._events.now_s
        if not self.machine.transfer_committed(attempt.routed, now_s):
            return
        if attempt.is_first or not self._record.has(attempt.row, stages.SECOND_TOKEN):
            self._stamps[attempt.row, stages.TRANSFER_STARTED] = now_s - attempt.transfer_s
            self._stamps[attempt.row, stages.TRANSFER_COMMITTED] = now_s

    def second_token(self, attempt: SimulatedAttempt, admitted_s: float, token_s: float) -> None:
        if attempt.routed.generating is None:
            return
        if attempt.is_first or not self._record.has(attempt.row, stages.SECOND_TOKEN):
            self._stamps[attempt.row, stages.DECODE_ADMITTED] = admitted_s
            self._stamps[attempt.row, stages.SECOND_TOKEN] = token_s + self._spec.token_s

    def decode_finished(self, attempt: SimulatedAttempt) -> None:
        if attempt.routed.generating is None:
            return
        now_s = self._events.now_s
        self._stamps[attempt.row, stages.FINISHED] = now_s + self._spec.token_s
        self.machine.tokens_generated(attempt.routed, attempt.routed.request.growth_tokens, now_s)
        self.machine.attempt_finished(attempt.routed, now_s)

    def lease_ended(self, attempt: SimulatedAttempt) -> None:
        self._abandon_transfer(attempt)
        reader, error = attempt.decode or attempt.begun_on, StaleEpochError("the lease on the KV has ended")
        self.machine.attempt_failed(attempt.routed, reader.spec.instance_id, error, self._events.now_s)

    def failed(self, attempt: SimulatedAttempt, instance_id: str, error: TandemError) -> None:
        self.machine.attempt_failed(attempt.routed, instance_id, error, self._events.now_s)

    # --- transfers ---------------------------------------------------------------------------------------------------

    def _send(self, attempt: SimulatedAttempt) -> None:
        assert attempt.decode is not None
        attempt.transfer = self._network.send(
            attempt.begun_on.spec, attempt.decode.spec, attempt.routed.num_tokens, self._acknowledge, attempt
        )

    def _acknowledge(self, attempt: SimulatedAttempt) -> None:
        """The KV is whole and the decode instance's: prefill's blocks are free at once, decode takes it up next."""
        assert attempt.transfer is not None
        assert attempt.decode is not None
        attempt.transfer_s = self._events.now_s - attempt.transfer.started_s
        attempt.transfer = None
        attempt.is_taken = True
        attempt.begun_on.release(attempt)
        attempt.decode.arrived(attempt)

    def _abandon_transfer(self, attempt: SimulatedAttempt) -> None:
        if attempt.transfer is not None:
            self._network.abandon(attempt.transfer)
            attempt.transfer = None


def _row(request: RoutedRequest) -> int:
    assert isinstance(request.key, int)
    return request.key
