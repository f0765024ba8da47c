"""Small deployments and streams for the simulator's tests."""

import numpy as np

from tandem.core.cost_model import StepCost, StepLoad
from tandem.core.instance_section import RoleName
from tandem.core.step_coefficients import StepCoefficients
from tandem.placement.simulator.deployment import Deployment, InstanceSpec, NetworkSpec, RouterSpec
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling.budget import Mixing


class LinearCost:
    """`fixed_s` per step, `token_s` per token computed, `kv_s` per token of KV read by decode, `pair_s` per pair of
    query and key of a prompt. `stages` > 1: a prefill step leaves the first stage after that part of its time."""

    def __init__(
        self,
        fixed_s: float = 0.01,
        token_s: float = 1e-4,
        kv_s: float = 1e-6,
        prompt_s: float = 0.0,
        stages: int = 1,
        pair_s: float = 0.0,
    ) -> None:
        self._fixed_s = fixed_s
        self._token_s = token_s
        self._kv_s = kv_s
        self._prompt_s = prompt_s
        self._pair_s = pair_s
        self._stages = stages

    def step(self, load: StepLoad) -> StepCost:
        linear_s = self._token_s * load.tokens + self._prompt_s * load.prefill_sequences
        attention_s = self._pair_s * load.prefill_pairs
        kv_read_s = self._kv_s * load.decode_kv_tokens
        total_s = linear_s + attention_s + kv_read_s + self._fixed_s
        interval_s = total_s / self._stages if load.decode_sequences == 0 else total_s
        return StepCost(
            linear_s=linear_s,
            attention_s=attention_s,
            kv_read_s=kv_read_s,
            overhead_s=self._fixed_s,
            interval_s=interval_s,
        )

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        return self._fixed_s + self._token_s * sequences, self._kv_s


def poisson(
    count: int, rate: float, *, prompt: int = 100, output: int = 20, seed: int = 0, fixed: bool = False
) -> RequestStream:
    """Exponential gaps; lengths uniform up to twice the means, or `fixed` at them."""
    random = np.random.default_rng(seed)
    arrival_s = np.cumsum(random.exponential(1 / rate, count))
    if fixed:
        return RequestStream.make(arrival_s, np.full(count, prompt), np.full(count, output))
    return RequestStream.make(arrival_s, random.integers(1, 2 * prompt, count), random.integers(1, 2 * output, count))


def deployment(
    prefill: int = 1,
    decode: int = 1,
    *,
    colocated: int = 0,
    cost: LinearCost | None = None,
    num_blocks: int = 1000,
    max_batch: int = 64,
    max_batch_tokens: int = 512,
    growth_horizon_tokens: int = 256,
    network: NetworkSpec | None = None,
    router: RouterSpec | None = None,
    nodes: int = 1,
    policy: Mixing | None = None,
    prefix_cache: bool = False,
    request_admission_cost_s: float = 0.0,
) -> Deployment:
    """Instances p0, p1 ... and d0, d1 ..., dealt to the nodes in turn. With a `policy` they are colocated; without, c0,
    c1 ... are colocated beside them."""
    roles: list[RoleName] = ["prefill", "decode"] if policy is None else ["colocated", "colocated"]
    specs = [(roles[0], f"p{i}", i % nodes) for i in range(prefill)]
    specs += [(roles[1], f"d{i}", i % nodes) for i in range(decode)]
    specs += [("colocated", f"c{i}", i % nodes) for i in range(colocated)]
    return Deployment(
        tuple(
            InstanceSpec(
                instance_id=name,
                role=role,
                policy=policy or "chunked",
                cost=cost or LinearCost(),
                num_blocks=num_blocks,
                max_batch_tokens=max_batch_tokens,
                max_batch=max_batch,
                growth_horizon_tokens=growth_horizon_tokens,
                prefix_cache=prefix_cache,
                node=node,
                request_admission_cost_s=request_admission_cost_s if role == "decode" else 0.0,
                step_cost=StepCoefficients.of(cost or LinearCost()),
            )
            for role, name, node in specs
        ),
        network or NetworkSpec(),
        router or RouterSpec(),
    )
