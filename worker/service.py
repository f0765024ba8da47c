"""The routers' sessions of an instance: passes commands to the loop, and the loop's events to routers and transfers."""

import logging
from collections.abc import Callable, Sequence

from tandem.core.address import split_address
from tandem.core.attempt_id import AttemptId
from tandem.core.errors import (
    ConfigError,
    DuplicateRequestError,
    InvalidRequestError,
    StaleEpochError,
    TandemError,
    error_from_code,
)
from tandem.core.instance_section import InstanceSection
from tandem.core.session import (
    Cancel,
    PrefillFinished,
    RenewLease,
    RequestFailed,
    Role,
    SessionCommand,
    Submit,
    TokenFrame,
)
from tandem.decode_worker.fetcher import Fetch, KvFetcher
from tandem.prefill_worker.held_kv import HeldKv, KvComputing, KvReady
from tandem.scheduling.budget import StepBudget, role_budget
from tandem.wire.sessions import Outbox, RoleChange
from tandem.worker.loop_messages import (
    CacheChanged,
    CancelFetch,
    LoopCommand,
    LoopEvent,
    Release,
    SendEvent,
    SubmitAttempt,
)

log = logging.getLogger(__name__)


def section_budget(role: Role, section: InstanceSection, change: RoleChange | None = None) -> StepBudget:
    """The budget of an instance with these settings in that role; `change` replaces some bounds. Raises ConfigError for
    a bound below 1."""
    max_batch, max_batch_tokens = section.max_batch, section.max_batch_tokens
    max_prefill_tokens = section.max_prefill_tokens
    if change is not None:
        max_batch = max_batch if change.max_batch is None else change.max_batch
        max_batch_tokens = max_batch_tokens if change.max_batch_tokens is None else change.max_batch_tokens
        max_prefill_tokens = max_prefill_tokens if change.max_prefill_tokens is None else change.max_prefill_tokens
    for name, value in (
        ("max_batch", max_batch),
        ("max_batch_tokens", max_batch_tokens),
        ("max_prefill_tokens", max_prefill_tokens),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    return role_budget(
        role,
        max_batch=max_batch,
        max_queue=section.max_queue,
        max_batch_tokens=max_batch_tokens,
        max_prefill_tokens=max_prefill_tokens,
        mixing=section.policy,
    )


class InstanceService:
    """Implements `wire.sessions.CommandHandler`. An attempt is known from Submit to its last event or Cancel."""

    def __init__(
        self,
        role: Role,
        section: InstanceSection,
        post: Callable[[LoopCommand], None],
        held: HeldKv,
        fetcher: KvFetcher,
        role_changed: Callable[[], None],
        cache_changed: Callable[[CacheChanged], None],
        routers_changed: Callable[[Sequence[str]], None],
    ) -> None:
        """`post` sends a command to the loop. Called back: `role_changed` after a change of the role, `cache_changed`
        with changes of the prefix cache, and `routers_changed` with the control addresses of the routers to report to.
        """
        self.role = role
        self._section = section
        self._post = post
        self._held = held
        self._fetcher = fetcher
        self._role_changed = role_changed
        self._cache_changed = cache_changed
        self._routers_changed = routers_changed
        self._outboxes: dict[int, Outbox] = {}
        self._attempts: dict[int, set[int]] = {}  # session -> handles
        self._next_session_id = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is no attempt, and all events are written."""
        return not any(self._attempts.values()) and all(outbox.is_empty for outbox in self._outboxes.values())

    # --- routers (CommandHandler) ------------------------------------------------------------------------------------

    def open_session(self, outbox: Outbox) -> int:
        session_id = self._next_session_id
        self._next_session_id += 1
        self._outboxes[session_id] = outbox
        self._attempts[session_id] = set()
        return session_id

    def handle(self, session_id: int, command: SessionCommand) -> None:
        attempt_id = AttemptId(session_id, command.handle)
        match command:
            case Submit():
                self._submit(attempt_id, command)
            case Cancel(handle):
                if handle in self._attempts[session_id]:
                    self._forget(attempt_id, StaleEpochError("the attempt was cancelled"))
                    self._post(Release(attempt_id))
            case RenewLease():
                self._held.renew(attempt_id)

    def close_session(self, session_id: int) -> None:
        """The router is gone: drop its attempts. A restarted router does not know its earlier requests."""
        del self._outboxes[session_id]
        for handle in self._attempts.pop(session_id):
            attempt_id = AttemptId(session_id, handle)
            self._held.close(attempt_id, StaleEpochError("the router of the attempt is gone"))
            self._post(Release(attempt_id))

    def end_sessions(self) -> None:
        """The instance stops. Each router gets the queued events, and then the end of its session."""
        for outbox in self._outboxes.values():
            outbox.close()

    def configure(self, change: RoleChange) -> None:
        budget = section_budget(change.role, self._section, change)
        if change.role is not self.role:
            log.info("role %s -> %s: %s", self.role.value, change.role.value, budget)
        self.role = change.role
        self._post(budget)
        self._role_changed()

    def set_routers(self, control_addresses: Sequence[str]) -> None:
        if not control_addresses:
            raise ConfigError("the list of routers is empty; an instance that reports to no router serves nobody")
        for address in control_addresses:
            split_address(address)
        self._routers_changed(control_addresses)

    def _submit(self, attempt_id: AttemptId, submit: Submit) -> None:
        """Raises InvalidRequestError for a handle that names a running attempt."""
        if attempt_id.handle in self._attempts[attempt_id.session_id]:
            raise InvalidRequestError(f"the handle {attempt_id.handle} is in use")
        if submit.hand_over:
            try:
                self._held.open(attempt_id, submit.request.request_id, submit.request.epoch)
            except DuplicateRequestError as error:
                failed = RequestFailed(attempt_id.handle, error.code, error.message)
                self._outboxes[attempt_id.session_id].put(failed)
                return
        self._attempts[attempt_id.session_id].add(attempt_id.handle)
        self._post(SubmitAttempt(attempt_id, submit))

    # --- held KV -----------------------------------------------------------------------------------------------------

    def release_held(self, attempt_id: AttemptId) -> None:
        """The lease on the attempt's KV has ended, acknowledged or not."""
        if (handles := self._attempts.get(attempt_id.session_id)) is not None:
            handles.discard(attempt_id.handle)
        self._post(Release(attempt_id))

    # --- the loop ----------------------------------------------------------------------------------------------------

    def deliver(self, events: list[LoopEvent]) -> None:
        """Handle events of the loop, in order."""
        for event in events:
            match event:
                case SendEvent(session_id):
                    self._send(session_id, event)
                case KvComputing():
                    self._held.computing(event)
                case KvReady():
                    self._held.hold(event)
                case Fetch():
                    self._fetcher.start(event)
                case CancelFetch(attempt_id):
                    self._fetcher.cancel(attempt_id)
                case CacheChanged():
                    self._cache_changed(event)

    def _send(self, session_id: int, send: SendEvent) -> None:
        outbox = self._outboxes.get(session_id)
        if outbox is None:
            return  # the router is gone
        match event := send.event:
            case TokenFrame(items):
                for item in items:
                    if item.finish_reason is not None:
                        self._attempts[session_id].discard(item.handle)
            case RequestFailed(handle, code, message):
                self._forget(AttemptId(session_id, handle), error_from_code(code, message))
            case PrefillFinished(handle=handle, finish_reason=reason) if reason is not None:
                self._forget(AttemptId(session_id, handle), StaleEpochError("the answer was complete without decoding"))
        outbox.put(event)

    def _forget(self, attempt_id: AttemptId, reason: TandemError) -> None:
        """The attempt has ended. A reader that asks for its KV later gets `reason`."""
        self._attempts[attempt_id.session_id].discard(attempt_id.handle)
        self._held.close(attempt_id, reason)
