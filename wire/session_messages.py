"""Session commands and events (core/session.py) <-> their messages, in both directions."""

from tandem.core.errors import InvalidRequestError
from tandem.core.request import SampledToken
from tandem.core.session import (
    Cancel,
    KvReserved,
    KvSource,
    NewTokens,
    PrefillFinished,
    PrefillStarted,
    RenewLease,
    RequestFailed,
    SessionCommand,
    SessionEvent,
    Submit,
    TokenFrame,
    TransferCommitted,
)
from tandem.v1 import worker_pb2
from tandem.wire import convert


def command_to_pb(command: SessionCommand, now_s: float) -> worker_pb2.SessionRequest:
    match command:
        case Submit(handle, request, kv, hand_over):
            submit = worker_pb2.SubmitCommand(
                handle=handle, request=convert.attempt_to_pb(request, now_s), hand_over=hand_over
            )
            if kv is not None:
                submit.kv.instance_id, submit.kv.address = kv.instance_id, kv.address
            return worker_pb2.SessionRequest(submit=submit)
        case Cancel(handle):
            return worker_pb2.SessionRequest(cancel=worker_pb2.CancelCommand(handle=handle))
        case RenewLease(handle):
            return worker_pb2.SessionRequest(renew_lease=worker_pb2.RenewLeaseCommand(handle=handle))


def command_from_pb(pb: worker_pb2.SessionRequest, now_s: float) -> SessionCommand:
    """Raises InvalidRequestError for what no sane router sends."""
    match pb.WhichOneof("command"):
        case "submit":
            submit = pb.submit
            kv = KvSource(submit.kv.instance_id, submit.kv.address) if submit.HasField("kv") else None
            if kv is not None and (submit.hand_over or not kv.instance_id or not kv.address):
                raise InvalidRequestError("KV from elsewhere needs a named source and is not handed over")
            return Submit(submit.handle, convert.attempt_from_pb(submit.request, now_s), kv, submit.hand_over)
        case "cancel":
            return Cancel(pb.cancel.handle)
        case "renew_lease":
            return RenewLease(pb.renew_lease.handle)
        case _:
            raise InvalidRequestError("an unknown command; router and instance are of different versions")


def event_to_pb(event: SessionEvent) -> worker_pb2.SessionResponse:
    match event:
        case TokenFrame(items):
            return worker_pb2.SessionResponse(frame=worker_pb2.TokenFrameEvent(items=map(_tokens_to_pb, items)))
        case PrefillStarted(handle, num_cached_tokens):
            started = worker_pb2.PrefillStartedEvent(handle=handle, num_cached_tokens=num_cached_tokens)
            return worker_pb2.SessionResponse(started=started)
        case PrefillFinished():
            finished = worker_pb2.PrefillFinishedEvent(
                handle=event.handle,
                token=convert.sampled_to_pb(event.token),
                prompt_logprobs=convert.prompt_logprobs_to_pb(event.prompt_logprobs),
                finish_reason=convert.finish_to_pb(event.finish_reason),
                num_cached_tokens=event.num_cached_tokens,
                compute_s=event.compute_s,
            )
            return worker_pb2.SessionResponse(finished=finished)
        case KvReserved(handle):
            return worker_pb2.SessionResponse(reserved=worker_pb2.KvReservedEvent(handle=handle))
        case TransferCommitted():
            committed = worker_pb2.TransferCommittedEvent(
                handle=event.handle,
                transfer_s=event.transfer_s,
                transfer_bytes=event.transfer_bytes,
                transport=event.transport,
                streamed_bytes=event.streamed_bytes,
                streamed_s=event.streamed_s,
            )
            return worker_pb2.SessionResponse(committed=committed)
        case RequestFailed(handle, code, message):
            failed = worker_pb2.FailedEvent(handle=handle, code=code, message=message)
            return worker_pb2.SessionResponse(failed=failed)


def event_from_pb(pb: worker_pb2.SessionResponse) -> SessionEvent:
    """Raises InvalidRequestError for an event that this version does not know."""
    match pb.WhichOneof("event"):
        case "frame":
            return TokenFrame(tuple(map(_tokens_from_pb, pb.frame.items)))
        case "started":
            return PrefillStarted(pb.started.handle, pb.started.num_cached_tokens)
        case "finished":
            finished = pb.finished
            return PrefillFinished(
                handle=finished.handle,
                token=convert.sampled_from_pb(finished.token),
                prompt_logprobs=convert.prompt_logprobs_from_pb(list(finished.prompt_logprobs)),
                finish_reason=convert.finish_from_pb(finished.finish_reason),
                num_cached_tokens=finished.num_cached_tokens,
                compute_s=finished.compute_s,
            )
        case "reserved":
            return KvReserved(pb.reserved.handle)
        case "committed":
            committed = pb.committed
            return TransferCommitted(
                handle=committed.handle,
                transfer_s=committed.transfer_s,
                transfer_bytes=committed.transfer_bytes,
                transport=committed.transport,
                streamed_bytes=committed.streamed_bytes,
                streamed_s=committed.streamed_s,
            )
        case "failed":
            return RequestFailed(pb.failed.handle, pb.failed.code, pb.failed.message)
        case _:
            raise InvalidRequestError("an unknown event; router and instance are of different versions")


def _tokens_to_pb(item: NewTokens) -> worker_pb2.NewTokens:
    pb = worker_pb2.NewTokens(handle=item.handle, token_ids=[token.token_id for token in item.tokens])
    if item.tokens and item.tokens[0].logprob is not None:
        pb.logprobs.extend(convert.logprob_to_pb(token.logprob) for token in item.tokens if token.logprob is not None)
    if item.finish_reason is not None:
        pb.finish_reason = convert.finish_to_pb(item.finish_reason)
    if item.queue_s is not None:
        pb.queue_s = item.queue_s
    return pb


def _tokens_from_pb(pb: worker_pb2.NewTokens) -> NewTokens:
    if pb.logprobs:
        if len(pb.logprobs) != len(pb.token_ids):
            raise InvalidRequestError("a frame with tokens and log-probabilities of different number")
        logprobs = map(convert.logprob_from_pb, pb.logprobs)
        tokens = tuple(
            SampledToken(token_id, logprob) for token_id, logprob in zip(pb.token_ids, logprobs, strict=True)
        )
    else:
        tokens = tuple(map(SampledToken, pb.token_ids))
    return NewTokens(
        pb.handle,
        tokens,
        convert.finish_from_pb(pb.finish_reason),
        pb.queue_s if pb.HasField("queue_s") else None,
    )
