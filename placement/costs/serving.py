"""What running workers add to the engine's own steps, and the request path, as `tandem profile` measures them."""

from pydantic import Field

from tandem.core.frozen_model import FrozenModel
from tandem.placement.simulator.deployment import NetworkSpec, RouterSpec


class ServedStep(FrozenModel):
    """A step of a running worker takes `constant_s` + `factor` times the engine's own time. Reading KV has no factor.

    The constant: each prefill step reads all weights, through caches that other processes have filled meanwhile. The
    factor: other processes share the machine. (Without a factor for reading KV, live decode steps that take the engine
    6 to 20 ms are predicted within 3 %; with one, the longest are predicted 7 % too slow.)
    """

    constant_s: float = Field(default=0.0, ge=0)
    factor: float = Field(default=1.0, ge=0)
    by_batch: tuple[tuple[int, float], ...] = Field(
        default=(), description="Decode: (sequences, factor) where it was measured, ascending; instead of `factor`"
    )

    def factor_of(self, sequences: float) -> float:
        """With so many decoding: between the measured batches on straight lines, beyond them as at the nearest."""
        if not self.by_batch:
            return self.factor
        below = above = self.by_batch[0]
        for knot in self.by_batch:
            below, above = above, knot
            if knot[0] >= sequences:
                break
        if not below[0] < sequences < above[0]:
            return (above if sequences >= above[0] else below)[1]
        return _between(below[1], above[1], (sequences - below[0]) / (above[0] - below[0]))

    def interpolate(self, other: "ServedStep", share: float) -> "ServedStep":
        """From this step at `share` 0 to `other`, of the same batches, at `share` 1, linearly."""
        return ServedStep(
            constant_s=_between(self.constant_s, other.constant_s, share),
            factor=_between(self.factor, other.factor, share),
            by_batch=tuple((batch, _between(factor, other.factor_of(batch), share)) for batch, factor in self.by_batch),
        )

    def seconds(self, engine_s: float) -> float:
        return self.constant_s + self.factor * engine_s

    def slowed_as(self, alone: "ServedStep", contended: "ServedStep") -> "ServedStep":
        """This step, measured on an idle machine, on a busy one, which makes `contended` of `alone`."""
        ratio = max(1.0, contended.factor / alone.factor if alone.factor else 1.0)
        return ServedStep(
            constant_s=self.constant_s + max(0.0, contended.constant_s - alone.constant_s),
            factor=self.factor * ratio,
            by_batch=tuple((batch, factor * ratio) for batch, factor in self.by_batch),
        )


class ServingCosts(FrozenModel):
    """Steps while the other role's worker is idle (`alone`), and while it computes on the same machine (`contended`):
    the workers share memory, caches and cores."""

    prefill_alone: ServedStep = ServedStep()
    prefill_contended: ServedStep = ServedStep()
    cold_step_factor: float = Field(
        default=0.0, ge=0, description="Extra time of the first contended step after a pause, as a share of the step"
    )
    decode_alone: ServedStep = ServedStep()
    decode_contended: ServedStep = ServedStep()
    request_admission_cost_s: float = Field(
        default=0.0,
        ge=0,
        description="Extra time of a step for each request admitted during it, receiving its KV included",
    )

    def prefill(self, contended: float) -> ServedStep:
        """`contended`: share of the time during which the machine's other workers compute."""
        return self.prefill_alone.interpolate(self.prefill_contended, contended)

    def decode(self, contended: float) -> ServedStep:
        return self.decode_alone.interpolate(self.decode_contended, contended)

    def with_steps_alone(self, prefill: ServedStep, decode: ServedStep) -> "ServingCosts":
        """Of other instances, whose steps take that while the rest of the machine is idle, and are slowed as these
        are by others that compute."""
        return self.model_copy(
            update={
                "prefill_alone": prefill,
                "prefill_contended": prefill.slowed_as(self.prefill_alone, self.prefill_contended),
                "decode_alone": decode,
                "decode_contended": decode.slowed_as(self.decode_alone, self.decode_contended),
            }
        )


class PathCosts(FrozenModel):
    """Around the steps, measured on a cluster of one worker of each role on this machine."""

    admission_s: float = Field(ge=0, description="Received until the prefill worker has it")
    first_token_s: float = Field(ge=0, description="From the prefill worker to the client")
    token_s: float = Field(ge=0, description="From the decode worker to the client")
    transfer_alone_s: float = Field(
        ge=0,
        description="From the first token until decode has a short prompt's KV, while neither worker computes; "
        "per_concurrent_transfer_s comes on top",
    )
    transfer_contended_s: float = Field(
        ge=0, description="The same while both compute, but for the wait for the end of decode's step"
    )
    per_concurrent_transfer_s: float = Field(ge=0, description="More for each transfer under way, this one included")
    transfer_bytes_per_s: float = Field(gt=0, description="How much longer a long prompt's KV takes")

    def router_spec(self) -> RouterSpec:
        return RouterSpec(self.admission_s, self.first_token_s, self.token_s)

    def network_spec(self, kv_bytes_per_token: float, contended: float) -> NetworkSpec:
        """All instances on this machine."""
        rate = self.transfer_bytes_per_s
        latency_s = _between(self.transfer_alone_s, self.transfer_contended_s, contended)
        return NetworkSpec(kv_bytes_per_token, rate, rate, latency_s, self.per_concurrent_transfer_s)


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low)
