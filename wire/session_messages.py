"""Session commands and events (core/session.py) <-> their messages, in both directions."""

from tandem.core.errors import InvalidRequestError
from tandem.core.request import SampledToken
from tandem.core.session import (
    Cancel,
    DecodeCommand,
    DecodeEvent,
    DecodeFrame,
    DecodeReserved,
    DecodeTokens,
    KvSource,
    OpenDecode,
    PrefillCommand,
    PrefillEvent,
    PrefillFinished,
    PrefillStarted,
    RequestFailed,
    SubmitPrefill,
    TransferCommitted,
)
from tandem.v1 import worker_pb2
from tandem.wire import convert


def prefill_command_to_pb(command: PrefillCommand, now_s: float) -> worker_pb2.PrefillSessionRequest:
    match command:
        case SubmitPrefill(handle, request):
            submit = worker_pb2.SubmitPrefillCommand(handle=handle, request=convert.attempt_to_pb(request, now_s))
            return worker_pb2.PrefillSessionRequest(submit=submit)
        case Cancel(handle):
            return worker_pb2.PrefillSessionRequest(cancel=worker_pb2.CancelCommand(handle=handle))


def prefill_command_from_pb(pb: worker_pb2.PrefillSessionRequest, now_s: float) -> PrefillCommand:
    match pb.WhichOneof("command"):
        case "submit":
            return SubmitPrefill(pb.submit.handle, convert.attempt_from_pb(pb.submit.request, now_s))
        case "cancel":
            return Cancel(pb.cancel.handle)
        case _:
            raise InvalidRequestError("an unknown command; router and worker are of different versions")


def prefill_event_to_pb(event: PrefillEvent) -> worker_pb2.PrefillSessionResponse:
    match event:
        case PrefillStarted(handle, num_cached_tokens):
            started = worker_pb2.PrefillStartedEvent(handle=handle, num_cached_tokens=num_cached_tokens)
            return worker_pb2.PrefillSessionResponse(started=started)
        case PrefillFinished():
            finished = worker_pb2.PrefillFinishedEvent(
                handle=event.handle,
                token=convert.sampled_to_pb(event.token),
                prompt_logprobs=convert.prompt_logprobs_to_pb(event.prompt_logprobs),
                finish_reason=convert.finish_to_pb(event.finish_reason),
                num_cached_tokens=event.num_cached_tokens,
                queue_s=event.queue_s,
                compute_s=event.compute_s,
            )
            return worker_pb2.PrefillSessionResponse(finished=finished)
        case RequestFailed(handle, code, message):
            failed = worker_pb2.FailedEvent(handle=handle, code=code, message=message)
            return worker_pb2.PrefillSessionResponse(failed=failed)


def prefill_event_from_pb(pb: worker_pb2.PrefillSessionResponse) -> PrefillEvent:
    match pb.WhichOneof("event"):
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
                queue_s=finished.queue_s,
                compute_s=finished.compute_s,
            )
        case "failed":
            return RequestFailed(pb.failed.handle, pb.failed.code, pb.failed.message)
        case _:
            raise InvalidRequestError("an unknown event; router and worker are of different versions")


def decode_command_to_pb(command: DecodeCommand, now_s: float) -> worker_pb2.DecodeSessionRequest:
    match command:
        case OpenDecode(handle, request, source):
            return worker_pb2.DecodeSessionRequest(
                open=worker_pb2.OpenDecodeCommand(
                    handle=handle,
                    request=convert.attempt_to_pb(request, now_s),
                    source_instance_id=source.instance_id,
                    source_address=source.address,
                )
            )
        case Cancel(handle):
            return worker_pb2.DecodeSessionRequest(cancel=worker_pb2.CancelCommand(handle=handle))


def decode_command_from_pb(pb: worker_pb2.DecodeSessionRequest, now_s: float) -> DecodeCommand:
    match pb.WhichOneof("command"):
        case "open":
            source = KvSource(pb.open.source_instance_id, pb.open.source_address)
            if not source.instance_id or not source.address:
                raise InvalidRequestError("a decode must name the instance that holds its KV")
            return OpenDecode(pb.open.handle, convert.attempt_from_pb(pb.open.request, now_s), source)
        case "cancel":
            return Cancel(pb.cancel.handle)
        case _:
            raise InvalidRequestError("an unknown command; router and worker are of different versions")


def _tokens_to_pb(item: DecodeTokens) -> worker_pb2.DecodeTokens:
    pb = worker_pb2.DecodeTokens(handle=item.handle, token_ids=[token.token_id for token in item.tokens])
    if item.tokens and item.tokens[0].logprob is not None:
        pb.logprobs.extend(convert.logprob_to_pb(token.logprob) for token in item.tokens if token.logprob is not None)
    if item.finish_reason is not None:
        pb.finish_reason = convert.finish_to_pb(item.finish_reason)
    if item.queue_s is not None:
        pb.queue_s = item.queue_s
    return pb


def _tokens_from_pb(pb: worker_pb2.DecodeTokens) -> DecodeTokens:
    if pb.logprobs:
        logprobs = [convert.logprob_from_pb(logprob) for logprob in pb.logprobs]
        tokens = tuple(SampledToken(i, logprob) for i, logprob in zip(pb.token_ids, logprobs, strict=True))
    else:
        tokens = tuple(map(SampledToken, pb.token_ids))
    return DecodeTokens(
        pb.handle,
        tokens,
        convert.finish_from_pb(pb.finish_reason),
        pb.queue_s if pb.HasField("queue_s") else None,
    )


def decode_event_to_pb(event: DecodeEvent) -> worker_pb2.DecodeSessionResponse:
    match event:
        case DecodeFrame(items, step_s):
            frame = worker_pb2.DecodeFrameEvent(items=[_tokens_to_pb(item) for item in items], step_s=step_s)
            return worker_pb2.DecodeSessionResponse(frame=frame)
        case DecodeReserved(handle):
            return worker_pb2.DecodeSessionResponse(reserved=worker_pb2.DecodeReservedEvent(handle=handle))
        case TransferCommitted(handle, transfer_s, transfer_bytes, transport):
            committed = worker_pb2.TransferCommittedEvent(
                handle=handle, transfer_s=transfer_s, transfer_bytes=transfer_bytes, transport=transport
            )
            return worker_pb2.DecodeSessionResponse(committed=committed)
        case RequestFailed(handle, code, message):
            return worker_pb2.DecodeSessionResponse(
                failed=worker_pb2.FailedEvent(handle=handle, code=code, message=message)
            )


def decode_event_from_pb(pb: worker_pb2.DecodeSessionResponse) -> DecodeEvent:
    match pb.WhichOneof("event"):
        case "frame":
            return DecodeFrame(tuple(map(_tokens_from_pb, pb.frame.items)), pb.frame.step_s)
        case "reserved":
            return DecodeReserved(pb.reserved.handle)
        case "committed":
            committed = pb.committed
            return TransferCommitted(
                committed.handle, committed.transfer_s, committed.transfer_bytes, committed.transport
            )
        case "failed":
            return RequestFailed(pb.failed.handle, pb.failed.code, pb.failed.message)
        case _:
            raise InvalidRequestError("an unknown event; router and worker are of different versions")
