"""What running workers add to the engine's own steps, and the request path, as `tandem profile` measures them."""

from pydantic import BaseModel, ConfigDict, Field

from tandem.placement.simulator.deployment import NetworkSpec, RouterSpec


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServedStep(_Frozen):
    """A step in a running worker takes `constant_s` and `factor` times what it takes the engine by itself, but for
    reading KV, which takes as long.

    Every step of prefill reads all weights, through caches that others have filled meanwhile: the constant. What is
    computed is slowed by whoever shares the machine: the factor. (Without a factor for reading KV, live steps of decode
    that take the engine 6 to 20 ms are predicted within 3 %; with one, the longest 7 % too slow.)
    """

    constant_s: float = Field(default=0.0, ge=0)
    factor: float = Field(default=1.0, ge=0)

    def toward(self, other: "ServedStep", share: float) -> "ServedStep":
        """This if `share` is 0, `other` if it is 1, between them otherwise."""
        return ServedStep(
            constant_s=_between(self.constant_s, other.constant_s, share),
            factor=_between(self.factor, other.factor, share),
        )

    def seconds(self, engine_s: float) -> float:
        return self.constant_s + self.factor * engine_s


class ServingCosts(_Frozen):
    """Steps while the other role's worker is idle (`alone`), and while it computes on the same machine (`beside`), with
    whom memory, caches and cores are shared."""

    prefill_alone: ServedStep = ServedStep()
    prefill_beside: ServedStep = ServedStep()
    prefill_wake: float = Field(
        default=0.0, ge=0, description="How much longer, relatively, the first step after a pause takes, beside decode"
    )
    decode_alone: ServedStep = ServedStep()
    decode_beside: ServedStep = ServedStep()
    decode_open_s: float = Field(
        default=0.0, ge=0, description="More for each request that is opened meanwhile, its KV's coming included"
    )

    def prefill(self, neighbour_busy: float) -> ServedStep:
        """`neighbour_busy`: share of the time in which the machine's other workers compute."""
        return self.prefill_alone.toward(self.prefill_beside, neighbour_busy)

    def decode(self, neighbour_busy: float) -> ServedStep:
        return self.decode_alone.toward(self.decode_beside, neighbour_busy)


class PathCosts(_Frozen):
    """Around the steps, measured on a cluster of one worker of each role on this machine."""

    admission_s: float = Field(ge=0, description="Received until the prefill worker has it")
    first_token_s: float = Field(ge=0, description="From the prefill worker to the client")
    token_s: float = Field(ge=0, description="From the decode worker to the client")
    transfer_alone_s: float = Field(
        ge=0,
        description="First token until decode has a short prompt's KV, beside its turn, if neither computes",
    )
    transfer_beside_s: float = Field(
        ge=0, description="The same if both do; without the rest of decode's step, which it has to wait for"
    )
    transfer_turn_s: float = Field(ge=0, description="More for each transfer at the same time, and for itself")
    transfer_bytes_per_s: float = Field(gt=0, description="How much longer a long prompt's KV takes")

    def router_spec(self) -> RouterSpec:
        return RouterSpec(self.admission_s, self.first_token_s, self.token_s)

    def network_spec(self, kv_bytes_per_token: float, neighbour_busy: float) -> NetworkSpec:
        """All instances on this machine."""
        rate = self.transfer_bytes_per_s
        latency_s = _between(self.transfer_alone_s, self.transfer_beside_s, neighbour_busy)
        return NetworkSpec(kv_bytes_per_token, rate, rate, latency_s, self.transfer_turn_s)


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low)
