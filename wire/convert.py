"""Conversion of the messages between routers and instances: protobuf <-> core values.

`*_to_pb` writes a message, `*_from_pb` reads and validates one: messages of internal peers may be wrong, too.
"""

import math
from collections.abc import Sequence

from tandem.core.errors import InvalidRequestError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken, SamplingParams, TokenLogprob
from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.sampling_ranges import INT32_MAX, check_range, check_sampling
from tandem.core.session import BlockCounts, InstanceState, InstanceStatus, LinkStats, Role
from tandem.core.step_coefficients import StepCoefficients
from tandem.v1 import common_pb2, worker_pb2
from tandem.wire.same_fields import from_message, to_message

_FINISH_TO_PB = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
}
_FINISH_FROM_PB = {value: key for key, value in _FINISH_TO_PB.items()}
_ROLE_TO_PB = {
    Role.PREFILL: worker_pb2.ROLE_PREFILL,
    Role.DECODE: worker_pb2.ROLE_DECODE,
    Role.COLOCATED: worker_pb2.ROLE_COLOCATED,
}
_ROLE_FROM_PB = {value: key for key, value in _ROLE_TO_PB.items()}
_STATE_TO_PB = {
    InstanceState.LOADING: worker_pb2.INSTANCE_STATE_LOADING,
    InstanceState.READY: worker_pb2.INSTANCE_STATE_READY,
    InstanceState.DRAINING: worker_pb2.INSTANCE_STATE_DRAINING,
    InstanceState.STALLED: worker_pb2.INSTANCE_STATE_STALLED,
}
_STATE_FROM_PB = {value: key for key, value in _STATE_TO_PB.items()}

MAX_NAME_CHARS = 1024
_NO_PREFERENCE = SamplingParams()
NO_TOKEN = -1  # stands for the first prompt token, which has no log-probability


def finish_to_pb(reason: FinishReason | None) -> common_pb2.FinishReason:
    return _FINISH_TO_PB[reason]


def finish_from_pb(value: common_pb2.FinishReason) -> FinishReason | None:
    return _FINISH_FROM_PB.get(value)


def sampling_to_pb(params: SamplingParams) -> common_pb2.SamplingParams:
    """All fields set."""
    return common_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        max_tokens=params.max_tokens,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
    )


def sampling_from_pb(pb: common_pb2.SamplingParams, default: SamplingParams = _NO_PREFERENCE) -> SamplingParams:
    """Fields that are not set are those of `default`."""
    return SamplingParams(
        temperature=pb.temperature if pb.HasField("temperature") else default.temperature,
        top_p=pb.top_p if pb.HasField("top_p") else default.top_p,
        top_k=pb.top_k if pb.HasField("top_k") else default.top_k,
        min_p=pb.min_p if pb.HasField("min_p") else default.min_p,
        presence_penalty=pb.presence_penalty,
        frequency_penalty=pb.frequency_penalty,
        repetition_penalty=pb.repetition_penalty if pb.HasField("repetition_penalty") else default.repetition_penalty,
        seed=pb.seed if pb.HasField("seed") else default.seed,
        max_tokens=pb.max_tokens if pb.HasField("max_tokens") else default.max_tokens,
        logprobs=pb.logprobs if pb.HasField("logprobs") else None,
        prompt_logprobs=pb.prompt_logprobs if pb.HasField("prompt_logprobs") else None,
        stop_token_ids=tuple(pb.stop_token_ids),
        ignore_eos=pb.ignore_eos,
    )


def logprob_to_pb(logprob: TokenLogprob) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        top=[common_pb2.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top],
    )


def logprob_from_pb(pb: common_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(pb.token_id, pb.logprob, tuple((top.token_id, top.logprob) for top in pb.top))


def sampled_to_pb(token: SampledToken) -> worker_pb2.SampledToken:
    logprob = None if token.logprob is None else logprob_to_pb(token.logprob)
    return worker_pb2.SampledToken(token_id=token.token_id, logprob=logprob)


def sampled_from_pb(pb: worker_pb2.SampledToken) -> SampledToken:
    return SampledToken(pb.token_id, logprob_from_pb(pb.logprob) if pb.HasField("logprob") else None)


def prompt_logprobs_to_pb(logprobs: tuple[TokenLogprob | None, ...] | None) -> list[common_pb2.TokenLogprob]:
    missing = common_pb2.TokenLogprob(token_id=NO_TOKEN)
    return [missing if logprob is None else logprob_to_pb(logprob) for logprob in logprobs or ()]


def prompt_logprobs_from_pb(pbs: "list[common_pb2.TokenLogprob]") -> tuple[TokenLogprob | None, ...] | None:
    return tuple(None if pb.token_id == NO_TOKEN else logprob_from_pb(pb) for pb in pbs) or None


def attempt_to_pb(request: GenerationRequest, now_s: float) -> worker_pb2.AttemptRequest:
    return worker_pb2.AttemptRequest(
        request_id=request.request_id,
        epoch=request.epoch,
        token_ids=request.token_ids,
        num_output_tokens=request.num_output_tokens,
        sampling=sampling_to_pb(request.sampling),
        cache_salt=request.cache_salt,
        timeout_s=request.deadline_s - now_s,
        slo=_slo_to_pb(request.slo),
    )


def attempt_from_pb(pb: worker_pb2.AttemptRequest, now_s: float) -> GenerationRequest:
    """Raises InvalidRequestError for a malformed attempt. Token ids are not looked at."""
    if not pb.request_id or not pb.token_ids or not 0 <= pb.num_output_tokens < len(pb.token_ids):
        raise InvalidRequestError("the attempt has no id, no tokens, or more output than tokens")
    if math.isnan(pb.timeout_s):
        raise InvalidRequestError("the attempt has no time limit: it is not a number")
    sampling = sampling_from_pb(pb.sampling)
    check_sampling(sampling)
    check_range("max_tokens", sampling.max_tokens, 1, INT32_MAX)
    return GenerationRequest(
        request_id=pb.request_id,
        token_ids=tuple(pb.token_ids),
        sampling=sampling,
        num_output_tokens=pb.num_output_tokens,
        cache_salt=pb.cache_salt,
        deadline_s=now_s + pb.timeout_s,
        epoch=pb.epoch,
        slo=_slo_from_pb(pb.slo) if pb.HasField("slo") else NO_SLO,
    )


def _slo_to_pb(slo: RequestSlo) -> worker_pb2.SloTargets | None:
    if not slo.has_targets:
        return None
    ttft_s, tpot_s = (0.0 if math.isinf(target_s) else target_s for target_s in (slo.ttft_s, slo.tpot_s))
    return worker_pb2.SloTargets(name=slo.name, ttft_s=ttft_s, tpot_s=tpot_s, max_gap_s=slo.max_gap_s or 0.0)


def _slo_from_pb(pb: worker_pb2.SloTargets) -> RequestSlo:
    if not (pb.ttft_s >= 0.0 and pb.tpot_s >= 0.0 and pb.max_gap_s >= 0.0):
        raise InvalidRequestError("the attempt has a target that is negative, or not a number")
    return RequestSlo(pb.name, pb.ttft_s or math.inf, pb.tpot_s or math.inf, max_gap_s=pb.max_gap_s or None)


def role_to_pb(role: Role) -> worker_pb2.Role:
    return _ROLE_TO_PB[role]


def role_from_pb(value: worker_pb2.Role) -> Role:
    """Raises InvalidRequestError for a role that this version does not know."""
    if value not in _ROLE_FROM_PB:
        raise InvalidRequestError(f"the role {value} is unknown; controller and instance have different versions")
    return _ROLE_FROM_PB[value]


def status_to_pb(status: InstanceStatus) -> worker_pb2.InstanceStatus:
    return to_message(
        worker_pb2.InstanceStatus,
        status,
        role=_ROLE_TO_PB[status.role],
        state=_STATE_TO_PB[status.state],
        blocks=to_message(worker_pb2.BlockCounts, status.blocks),
        lease_s=0.0 if math.isinf(status.lease_s) else status.lease_s,
        links=[to_message(worker_pb2.LinkStats, link) for link in status.links],
        step_cost=status.step_cost or (),
        certificate_not_after_s=status.certificate_not_after_s or 0.0,
    )


def _step_cost(values: Sequence[float]) -> StepCoefficients | None:
    """None for values that are no times, too: a router without them decides by counts of tokens."""
    is_valid = len(values) == len(StepCoefficients._fields) and all(0 <= value < math.inf for value in values)
    return StepCoefficients(*values) if is_valid and any(values) else None


def status_from_pb(pb: worker_pb2.InstanceStatus) -> InstanceStatus:
    """Raises InvalidRequestError for a status without instance, address, known role or known state."""
    role, state = _ROLE_FROM_PB.get(pb.role), _STATE_FROM_PB.get(pb.state)
    if role is None or state is None or not pb.instance_id or not pb.address:
        raise InvalidRequestError("a heartbeat must name instance, role, state and address")
    if max(map(len, (pb.instance_id, pb.address, pb.model, pb.fingerprint, pb.weights_hash))) > MAX_NAME_CHARS:
        raise InvalidRequestError(f"a heartbeat has a name of more than {MAX_NAME_CHARS} characters")
    return from_message(
        InstanceStatus,
        pb,
        role=role,
        state=state,
        blocks=from_message(BlockCounts, pb.blocks),
        lease_s=pb.lease_s if pb.lease_s > 0.0 else math.inf,
        links=tuple(from_message(LinkStats, link) for link in pb.links),
        step_cost=_step_cost(pb.step_cost),
        certificate_not_after_s=pb.certificate_not_after_s or None,
    )
