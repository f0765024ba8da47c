"""A client's values <-> the public messages."""

from typing import Any

from tandem.completion import Delta, GenerateOptions, Usage
from tandem.core.errors import InvalidRequestError
from tandem.core.request import FinishReason, TokenLogprob
from tandem.core.timeline import Stage, Timeline
from tandem.v1 import common_pb2, inference_pb2

_FINISH_REASONS = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    common_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
_STAGES = {stage.value: stage for stage in Stage}
_PROMPTS = ("prompt", "messages", "token_ids")
_SAMPLING = frozenset(field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields)


def request_to_pb(options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequestError for options that do not fit into a message; the router validates the rest."""
    given = [name for name in _PROMPTS if options.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequestError(f"give exactly one of prompt, messages and token_ids, not {len(given)}")
    stop = options.get("stop") or ()
    sampling: dict[str, Any] = {k: v for k, v in options.items() if k in _SAMPLING and v is not None}
    try:
        request = inference_pb2.GenerateRequest(
            model=options.get("model") or "",
            sampling=common_pb2.SamplingParams(**sampling),
            stop=[stop] if isinstance(stop, str) else list(stop),
            request_id=options.get("request_id") or "",
            cache_salt=options.get("cache_salt") or "",
            slo=options.get("slo") or "",
            ttft_s=options.get("ttft_s"),
            tpot_s=options.get("tpot_s"),
            tenant=options.get("tenant") or "",
        )
        if given == ["prompt"]:
            request.text = options["prompt"]
        elif given == ["messages"]:
            chat = [inference_pb2.ChatMessage(role=m["role"], content=m["content"]) for m in options["messages"]]
            request.chat.CopyFrom(inference_pb2.ChatPrompt(messages=chat))
        else:
            request.tokens.CopyFrom(inference_pb2.TokenPrompt(token_ids=options["token_ids"]))
    except KeyError as error:
        raise InvalidRequestError(f"a message has no {error}; each needs role and content", param="messages") from error
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request cannot be sent: {error}") from error
    return request


def delta_from_pb(pb: inference_pb2.GenerateResponse) -> Delta:
    finish_reason = _FINISH_REASONS.get(pb.finish_reason)
    prompt_logprobs = tuple(None if p.token_id < 0 else _logprob_from_pb(p) for p in pb.prompt_logprobs)
    return Delta(
        request_id=pb.request_id,
        text=pb.text,
        token_ids=tuple(pb.token_ids),
        logprobs=tuple(_logprob_from_pb(logprob) for logprob in pb.logprobs),
        prompt_logprobs=prompt_logprobs or None,
        finish_reason=finish_reason,
        usage=_usage_from_pb(pb.usage) if finish_reason else None,
        timeline=_timeline_from_pb(pb.timeline, pb.usage) if finish_reason else None,
    )


def _logprob_from_pb(pb: common_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(pb.token_id, pb.logprob, tuple((top.token_id, top.logprob) for top in pb.top))


def _usage_from_pb(pb: common_pb2.Usage) -> Usage:
    return Usage(pb.prompt_tokens, pb.completion_tokens, pb.cached_tokens)


def _timeline_from_pb(pb: common_pb2.Timeline, usage: common_pb2.Usage) -> Timeline:
    """Times in seconds since the router received the request. Unknown stages, of a newer router, are left out."""
    stamps = {Stage.RECEIVED: 0.0}
    stamps |= {_STAGES[stamp.stage]: stamp.at_s for stamp in pb.stamps if stamp.stage in _STAGES}
    return Timeline(
        stamps=stamps,
        num_prompt_tokens=usage.prompt_tokens,
        num_cached_tokens=usage.cached_tokens,
        num_output_tokens=usage.completion_tokens,
        num_attempts=pb.num_attempts,
    )
