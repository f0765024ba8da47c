"""Which instances a request goes to: the router's knowledge of load, put before the policy of `scheduling.routing`."""

from collections.abc import Iterable

from core.errors import UnavailableError
from core.request import GenerationRequest
from placement.simulator.attempt import Attempt
from placement.simulator.decode import DecodeInstance
from placement.simulator.prefill import PrefillInstance
from scheduling.routing import DecodeView, PrefillView, choose_decode, choose_prefill

_FINGERPRINT = "simulated"  # all instances of a deployment can exchange KV
_SLACK_TOKENS = 4096  # as the live router's


class Load:
    """What the router has sent to one instance and not yet seen finished."""

    __slots__ = ("held_tokens", "instance", "is_ready", "open", "waiting_tokens")

    def __init__(self, instance: PrefillInstance | DecodeInstance) -> None:
        self.instance = instance
        self.is_ready = True
        self.open: dict[Attempt, None] = {}
        self.waiting_tokens = 0
        self.held_tokens = 0


class Fleet:
    """Loads by instance."""

    def __init__(self, prefill: Iterable[PrefillInstance], decode: Iterable[DecodeInstance]) -> None:
        self._prefill = {instance.spec.instance_id: Load(instance) for instance in prefill}
        self._decode = {instance.spec.instance_id: Load(instance) for instance in decode}
        self._rotation = 0

    def choose_prefill(self, request: GenerationRequest, avoid: frozenset[str]) -> PrefillInstance:
        """Prefers others than `avoid`. Raises UnavailableError or ContextLengthError."""
        self._rotation += 1
        num_tokens = len(request.token_ids)
        views = [
            PrefillView(
                instance_id,
                _FINGERPRINT,
                load.is_ready,
                load.instance.max_model_len,
                load.waiting_tokens,
                len(load.open),
            )
            for instance_id, load in self._prefill.items()
        ]
        fits = any(load.is_ready and num_tokens < load.instance.max_model_len for load in self._decode.values())
        for candidates in ([view for view in views if view.instance_id not in avoid], views):
            choice = choose_prefill(
                candidates,
                num_tokens=num_tokens,
                decode_fingerprints=(_FINGERPRINT,) if fits else (),
                rotation=self._rotation,
                slack_tokens=_SLACK_TOKENS,
            )
            if choice.instance_id is not None:
                break
        instance = self._prefill[choice.require()].instance
        assert isinstance(instance, PrefillInstance)
        return instance

    def choose_decode(self, request: GenerationRequest, avoid: frozenset[str], node: int | None) -> DecodeInstance:
        """As `choose_prefill`; on `node` only, if one is given."""
        self._rotation += 1
        views = []
        for instance_id, load in self._decode.items():
            spec = load.instance.spec
            if node is None or spec.node == node:
                used_blocks = -(-load.held_tokens // spec.block_size)
                views.append(
                    DecodeView(
                        instance_id,
                        _FINGERPRINT,
                        load.is_ready,
                        load.instance.max_model_len,
                        spec.block_size,
                        spec.num_blocks,
                        spec.num_blocks - used_blocks,
                        len(load.open),
                    )
                )
        for candidates in ([view for view in views if view.instance_id not in avoid], views):
            choice = choose_decode(
                candidates,
                num_tokens=len(request.token_ids),
                growth_tokens=request.sampling.max_tokens - request.num_output_tokens,
                fingerprint=_FINGERPRINT,
                rotation=self._rotation,
            )
            if choice.instance_id is not None:
                break
        if choice.instance_id is None and not choice.candidates:
            raise UnavailableError("no decode instance stands on that node")
        instance = self._decode[choice.require()].instance
        assert isinstance(instance, DecodeInstance)
        return instance

    def found(self, instance_id: str) -> None:
        """The instance is back."""
        self._load(instance_id).is_ready = True

    def lose(self, instance_id: str) -> list[Attempt]:
        """The instance is gone. Returns the attempts that were open there."""
        load = self._load(instance_id)
        load.is_ready = False
        return list(load.open)

    def opened_prefill(self, instance_id: str, attempt: Attempt) -> None:
        load = self._prefill[instance_id]
        load.open[attempt] = None
        attempt.waiting_tokens = len(attempt.request.token_ids)
        load.waiting_tokens += attempt.waiting_tokens

    def computed(self, instance_id: str, attempt: Attempt, num_tokens: int) -> None:
        """So many of its tokens need not be waited for any more."""
        num_tokens = min(num_tokens, attempt.waiting_tokens)
        attempt.waiting_tokens -= num_tokens
        self._prefill[instance_id].waiting_tokens -= num_tokens

    def closed_prefill(self, instance_id: str, attempt: Attempt) -> bool:
        """False when it was closed before."""
        load = self._prefill[instance_id]
        if attempt not in load.open:
            return False
        del load.open[attempt]
        load.waiting_tokens -= attempt.waiting_tokens
        return True

    def opened_decode(self, instance_id: str, attempt: Attempt) -> None:
        load = self._decode[instance_id]
        load.open[attempt] = None
        load.held_tokens += attempt.request.max_total_tokens

    def closed_decode(self, instance_id: str, attempt: Attempt) -> bool:
        """False when it was closed before."""
        load = self._decode[instance_id]
        if attempt not in load.open:
            return False
        del load.open[attempt]
        load.held_tokens -= attempt.request.max_total_tokens
        return True

    def _load(self, instance_id: str) -> Load:
        return self._prefill[instance_id] if instance_id in self._prefill else self._decode[instance_id]
