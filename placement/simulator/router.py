"""One request's life on the virtual clock: what `router.attempt` and `router.running` do, without messages.

arrive -> prefill queued -> started -> first token ---------------+
                               | decode chosen (late binding)     |
                               +-> reserved ----------------------+-> transfer -> committed -> tokens -> finished
"""

from collections.abc import Mapping

from tandem.core.errors import (
    IncompatiblePeerError,
    OverloadedError,
    TandemError,
    TransferError,
    UnavailableError,
)
from tandem.core.request import SamplingParams
from tandem.placement.simulator import record as stages
from tandem.placement.simulator.agenda import Agenda
from tandem.placement.simulator.attempt import Attempt
from tandem.placement.simulator.counted import counted_request
from tandem.placement.simulator.deployment import RouterSpec
from tandem.placement.simulator.fleet import Fleet
from tandem.placement.simulator.instance import SimulatedInstance
from tandem.placement.simulator.network import Network
from tandem.placement.simulator.record import Record
from tandem.placement.workload.requests import RequestStream

# As `router.running.RetryPolicy`.
_MAX_ATTEMPTS = 3
_PATIENCE_S = 1.0
_PAUSE_S = 0.05
_RETRIED = (UnavailableError, TransferError, OverloadedError, IncompatiblePeerError)


class Router:
    """Carries requests over their attempts. It is the instances' `Listener`."""

    def __init__(
        self, spec: RouterSpec, requests: RequestStream, agenda: Agenda, network: Network, record: Record
    ) -> None:
        """`connect` it to its instances before the first request."""
        self._spec = spec
        self._requests = requests
        self._agenda = agenda
        self._network = network
        self._record = record
        self._stamps = record.stamps
        self._class_of = requests.slo_class.tolist()
        self._sampling: dict[int, SamplingParams] = {}
        self.num_refused = 0

    def connect(self, fleet: Fleet, instances: Mapping[str, SimulatedInstance]) -> None:
        self._fleet = fleet
        self._instances = instances

    def arrive(self, row: int) -> None:
        """The request has passed admission and looks for a prefill instance."""
        now_s = self._agenda.now_s
        self._stamps[row, stages.RECEIVED] = self._requests.arrival_s[row]
        self._stamps[row, stages.ADMITTED] = now_s
        max_tokens = int(self._requests.output_tokens[row])
        sampling = self._sampling.get(max_tokens)
        if sampling is None:
            sampling = self._sampling[max_tokens] = SamplingParams(max_tokens=max_tokens)
        request = counted_request(row, int(self._requests.prompt_tokens[row]), 0, sampling)
        attempt = Attempt(row, 0, request, frozenset())
        try:
            instance = self._fleet.choose_first(attempt, self._class_of[attempt.row])
        except TandemError:
            self.num_refused += 1
        else:
            self._begin(attempt, instance)

    # --- what the workers tell ---------------------------------------------------------------------------------------

    def prefill_started(self, attempt: Attempt, num_cached_tokens: int) -> None:
        self._record.num_cached_tokens[attempt.row] = num_cached_tokens
        self._fleet.computed(attempt.begun_on.spec.instance_id, attempt, num_cached_tokens)
        if attempt.prefill is None:
            return  # colocated: nothing to choose
        if attempt.growth_tokens > 1:
            self._open_decode(attempt)

    def prefill_finished(self, attempt: Attempt, started_s: float) -> None:
        begun_on, row = attempt.begun_on, attempt.row
        attempt.is_computed = True
        attempt.num_handed_on += 1
        token_s = self._agenda.now_s + self._spec.first_token_s
        if attempt.number == 0 or not self._record.has(row, stages.FIRST_TOKEN):
            self._stamps[row, stages.PREFILL_STARTED] = started_s
            self._stamps[row, stages.FIRST_TOKEN] = token_s
        num_tokens = attempt.num_tokens
        self._fleet.computed(begun_on.spec.instance_id, attempt, num_tokens)
        if attempt.colocated is not None:
            return  # it goes on by itself
        if (
            attempt.num_handed_on >= attempt.request.sampling.max_tokens
            or num_tokens + 1 >= begun_on.spec.max_model_len
        ):
            self._cancel(attempt)
            self._finish(attempt, token_s)
        elif attempt.is_reserved:
            self._send(attempt)

    def decode_reserved(self, attempt: Attempt) -> None:
        attempt.is_reserved = True
        if attempt.number == 0 or not self._record.has(attempt.row, stages.SECOND_TOKEN):
            self._stamps[attempt.row, stages.DECODE_RESERVED] = self._agenda.now_s
        if attempt.is_computed:
            self._send(attempt)

    def transfer_committed(self, attempt: Attempt) -> None:
        if attempt.number == 0 or not self._record.has(attempt.row, stages.SECOND_TOKEN):
            now_s = self._agenda.now_s
            self._stamps[attempt.row, stages.TRANSFER_STARTED] = now_s - attempt.transfer_s
            self._stamps[attempt.row, stages.TRANSFER_COMMITTED] = now_s
        self._close_prefill(attempt)

    def second_token(self, attempt: Attempt, admitted_s: float, token_s: float) -> None:
        if attempt.number == 0 or not self._record.has(attempt.row, stages.SECOND_TOKEN):
            self._stamps[attempt.row, stages.DECODE_ADMITTED] = admitted_s
            self._stamps[attempt.row, stages.SECOND_TOKEN] = token_s + self._spec.token_s

    def decode_finished(self, attempt: Attempt) -> None:
        instance = attempt.decode or attempt.colocated
        assert instance is not None
        self._fleet.closed_decode(instance.spec.instance_id, attempt)
        is_first = self._requests.output_tokens[attempt.row] == 1
        self._finish(attempt, self._agenda.now_s + (self._spec.first_token_s if is_first else self._spec.token_s))

    def lease_ended(self, attempt: Attempt) -> None:
        blamed = frozenset(i.spec.instance_id for i in (attempt.prefill, attempt.decode) if i is not None)
        self._attempt_failed(attempt, TransferError("the lease on the KV has ended"), blamed)

    def failed(self, attempt: Attempt, instance_id: str, error: TandemError) -> None:
        self._attempt_failed(attempt, error, frozenset((instance_id,)))

    # --- failures ----------------------------------------------------------------------------------------------------

    def instance_lost(self, instance_id: str) -> None:
        self._instances[instance_id].fail()
        error = UnavailableError("the instance is gone")
        for attempt in self._fleet.lose(instance_id):
            self._attempt_failed(attempt, error, frozenset((instance_id,)))

    def instance_found(self, instance_id: str) -> None:
        self._instances[instance_id].restart()
        self._fleet.found(instance_id)

    def _attempt_failed(self, attempt: Attempt, error: TandemError, blamed: frozenset[str]) -> None:
        self._cancel(attempt)
        attempt.avoid |= blamed
        if not isinstance(error, _RETRIED) or attempt.number + 1 >= _MAX_ATTEMPTS:
            self.num_refused += 1
        else:
            self._recover(attempt, error, self._agenda.now_s + _PATIENCE_S, paused=False)

    def _recover(self, failed: Attempt, error: TandemError, give_up_s: float, *, paused: bool) -> None:
        """Begin another attempt: at once if a worker is there that has not failed it, else after a pause."""
        old = failed.request
        num_new = failed.num_handed_on - old.num_output_tokens
        request = counted_request(failed.row, len(old.token_ids) + num_new, failed.num_handed_on, old.sampling)
        attempt = Attempt(failed.row, failed.number + 1, request, failed.avoid)
        try:
            instance = self._fleet.choose_first(attempt, self._class_of[attempt.row])
        except UnavailableError:
            if self._agenda.now_s >= give_up_s:
                self.num_refused += 1
                return
        except TandemError:
            self.num_refused += 1
            return
        else:
            if paused or instance.spec.instance_id not in failed.avoid:
                self._begin(attempt, instance)
                return
            if isinstance(error, OverloadedError) and failed.num_handed_on == 0:
                self.num_refused += 1  # every worker's queue is full
                return
        self._agenda.at(self._agenda.now_s + _PAUSE_S, self._recover_after_pause, (failed, error, give_up_s))

    def _recover_after_pause(self, waiting: tuple[Attempt, TandemError, float]) -> None:
        self._recover(*waiting, paused=True)

    # --- an attempt's steps ------------------------------------------------------------------------------------------

    def _begin(self, attempt: Attempt, instance: SimulatedInstance) -> None:
        self._record.begin_attempt(attempt.row, self._agenda.now_s)
        if instance.spec.role == "colocated":
            attempt.colocated = instance
            self._fleet.opened_colocated(instance.spec.instance_id, attempt)
        else:
            attempt.prefill = instance
            self._fleet.opened_prefill(instance.spec.instance_id, attempt)
        instance.submit(attempt, hand_over=attempt.prefill is not None)

    def _open_decode(self, attempt: Attempt) -> None:
        assert attempt.prefill is not None
        try:
            decode = self._fleet.choose_decode(attempt)
        except TandemError as error:
            self._attempt_failed(attempt, error, frozenset())
            return
        attempt.decode = decode
        self._fleet.opened_decode(decode.spec.instance_id, attempt)
        decode.submit(attempt, is_remote=True)

    def _send(self, attempt: Attempt) -> None:
        assert attempt.prefill is not None
        assert attempt.decode is not None
        num_tokens = attempt.num_tokens
        attempt.transfer = self._network.send(
            attempt.prefill.spec, attempt.decode.spec, num_tokens, self._acknowledge, attempt
        )

    def _acknowledge(self, attempt: Attempt) -> None:
        """The KV is whole and the decode instance's: prefill's blocks are free at once, decode takes it up next."""
        assert attempt.prefill is not None
        assert attempt.decode is not None
        assert attempt.transfer is not None
        attempt.transfer_s = self._agenda.now_s - attempt.transfer.started_s
        attempt.transfer = None
        attempt.prefill.release(attempt)
        attempt.decode.arrived(attempt)

    def _close_prefill(self, attempt: Attempt) -> bool:
        assert attempt.prefill is not None
        return self._fleet.closed_prefill(attempt.prefill.spec.instance_id, attempt)

    def _cancel(self, attempt: Attempt) -> None:
        """Take it off both workers, in whatever phase."""
        if attempt.transfer is not None:
            self._network.abandon(attempt.transfer)
        if attempt.prefill is not None and self._close_prefill(attempt):
            attempt.prefill.release(attempt)
        instance = attempt.decode or attempt.colocated
        if instance is not None and self._fleet.closed_decode(instance.spec.instance_id, attempt):
            instance.release(attempt)

    def _finish(self, attempt: Attempt, token_s: float) -> None:
        self._stamps[attempt.row, stages.FINISHED] = token_s
        self._record.num_finished += 1
