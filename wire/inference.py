"""The public gRPC API: `InferenceService` in front of a `core.completion.CompletionService`."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import Any
from urllib.parse import unquote

import grpc

from tandem.core.access import AccessControl, Caller, OpenAccess
from tandem.core.clock import Clock
from tandem.core.completion import (
    ChatMessage,
    ChatPrompt,
    CompletionRequest,
    CompletionService,
    Finish,
    Prompt,
    SamplingDefaults,
    TextDelta,
    TextPrompt,
    TokenPrompt,
)
from tandem.core.errors import CancelledError, InvalidRequestError
from tandem.core.request_trace import CallTracer, Operation, RequestTrace
from tandem.core.slo import RequestedSlo
from tandem.core.timeline import Stage, Timeline
from tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tandem.wire.channels import TOKEN_KEY
from tandem.wire.convert import finish_to_pb, logprob_to_pb, prompt_logprobs_to_pb, sampling_from_pb

GENERATE = f"/{inference_pb2.DESCRIPTOR.services_by_name['InferenceService'].full_name}/Generate"


def _prompt_from_pb(pb: inference_pb2.GenerateRequest) -> Prompt:
    match pb.WhichOneof("prompt"):
        case "text":
            return TextPrompt(pb.text)
        case "chat":
            return ChatPrompt(tuple(ChatMessage(message.role, message.content) for message in pb.chat.messages))
        case "tokens":
            return TokenPrompt(tuple(pb.tokens.token_ids))
        case _:
            raise InvalidRequestError("The request has no prompt: set text, chat or tokens.", param="prompt")


def request_from_pb(
    pb: inference_pb2.GenerateRequest,
    *,
    model: str,
    request_id: str,
    received_s: float,
    timeout_s: float | None,
    caller: Caller,
    trace: RequestTrace | None = None,
    defaults: SamplingDefaults,
) -> CompletionRequest:
    """`model`, `request_id` and `defaults` count where a message says nothing; `timeout_s` is the time to its deadline.

    Raises InvalidRequestError if there is no prompt, PermissionDeniedError for a tenant that the caller may not name;
    the service checks everything else.
    """
    return CompletionRequest(
        request_id=pb.request_id or request_id,
        model=pb.model or model,
        prompts=(_prompt_from_pb(pb),),
        received_s=received_s,
        sampling=sampling_from_pb(pb.sampling, defaults.sampling),
        seed=pb.sampling.seed if pb.sampling.HasField("seed") else None,
        max_tokens=pb.sampling.max_tokens if pb.sampling.HasField("max_tokens") else defaults.max_tokens,
        stop=tuple(pb.stop),
        cache_salt=pb.cache_salt,
        deadline_s=float("inf") if timeout_s is None else received_s + timeout_s,
        client=caller.client,
        tenant=caller.tenant_of(pb.tenant),
        slo=RequestedSlo(
            pb.slo,
            pb.ttft_s if pb.HasField("ttft_s") else None,
            pb.tpot_s if pb.HasField("tpot_s") else None,
        ),
        trace=trace,
    )


def client_of(peer: str) -> str:
    """The address in gRPC's "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000", without the port, which is of a connection;
    as in HTTP's scope."""
    return unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]")


def caller_of(access: AccessControl, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
    """Raises UnauthenticatedError."""
    given = [value for key, value in context.invocation_metadata() or () if key == TOKEN_KEY]
    authorization = given[0] if len(given) == 1 and isinstance(given[0], str) else ""
    return access.authenticate(authorization, client_of(context.peer()))


def timeline_to_pb(timeline: Timeline) -> common_pb2.Timeline:
    received_s = timeline.stamps[Stage.RECEIVED]
    stamps = sorted((at_s - received_s, stage.value) for stage, at_s in timeline.stamps.items())
    return common_pb2.Timeline(
        stamps=[common_pb2.Timeline.Stamp(stage=stage, at_s=at_s) for at_s, stage in stamps],
        parts=[common_pb2.Timeline.Part(name=name, duration_s=part_s) for name, part_s in timeline.parts().items()],
        total_s=timeline.total_s,
        ttft_s=timeline.ttft_s,
        tpot_s=timeline.tpot_s,
        num_attempts=timeline.num_attempts,
    )


def _usage_to_pb(finish: Finish) -> common_pb2.Usage:
    return common_pb2.Usage(
        prompt_tokens=finish.timeline.num_prompt_tokens,
        completion_tokens=finish.num_output_tokens,
        cached_tokens=finish.timeline.num_cached_tokens,
    )


def delta_to_pb(delta: TextDelta, request_id: str) -> inference_pb2.GenerateResponse:
    """A stop token is among the token ids, and not in the text."""
    tokens = delta.tokens if delta.stop_token is None else (*delta.tokens, delta.stop_token)
    response = inference_pb2.GenerateResponse(
        request_id=request_id,
        text=delta.text,
        token_ids=[token.token_id for token in tokens],
        logprobs=[logprob_to_pb(token.logprob) for token in tokens if token.logprob is not None],
    )
    if delta.prompt_logprobs is not None:
        response.prompt_logprobs.extend(prompt_logprobs_to_pb(delta.prompt_logprobs))
    if delta.finish is not None:
        response.finish_reason = finish_to_pb(delta.finish.reason)
        response.usage.CopyFrom(_usage_to_pb(delta.finish))
        response.timeline.CopyFrom(timeline_to_pb(delta.finish.timeline))
    return response


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """`random` makes ids for requests without one. A cancelled call ends its request at once, and so does a client that
    does not read its responses for `write_timeout_s`. `access` is that of the server (`build_public_server`).
    `hold_bytes` counts the bytes of a request while it runs, and raises OverloadedError for too many."""

    def __init__(
        self,
        service: CompletionService,
        clock: Clock,
        random: Random,
        write_timeout_s: float,
        access: AccessControl = OpenAccess(),
        tracer: CallTracer | None = None,
        hold_bytes: Callable[[int], AbstractContextManager[None]] = lambda num_bytes: nullcontext(),
    ) -> None:
        self._hold_bytes = hold_bytes
        self._service = service
        self._access = access
        self._clock = clock
        self._random = random
        self._write_timeout_s = write_timeout_s
        self._tracer = tracer

    async def Generate(
        self,
        request: inference_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
    ) -> None:
        """Writes to the context, and does not yield, so that a cancellation is raised inside the `async with`."""
        if self._tracer is None:
            await self._generate(request, context, None)
            return
        operation: Operation = "chat" if request.WhichOneof("prompt") == "chat" else "text_completion"
        metadata = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        with self._tracer.grpc_call(GENERATE[1:], metadata, operation) as trace:
            await self._generate(request, context, trace)

    async def _generate(
        self,
        request: inference_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
        trace: RequestTrace | None,
    ) -> None:
        received_s = self._clock.now_s()
        completion_request = request_from_pb(
            request,
            model=self._service.models()[0].name,
            request_id=f"{self._random.getrandbits(96):024x}",
            received_s=received_s,
            timeout_s=context.time_remaining(),
            caller=caller_of(self._access, context),
            trace=trace,
            defaults=self._service.defaults,
        )
        with self._hold_bytes(request.ByteSize()):
            async with await self._service.open(completion_request) as completion:
                async for delta in completion:
                    try:
                        async with asyncio.timeout(self._write_timeout_s):
                            await context.write(delta_to_pb(delta, completion_request.request_id))
                    except TimeoutError as error:
                        raise CancelledError(
                            f"The client did not read its response for {self._write_timeout_s:g} s."
                        ) from error

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """`max_model_len` is 0 while no pair of workers is ready."""
        models = self._service.models()
        return inference_pb2.ListModelsResponse(
            models=[inference_pb2.Model(id=model.name, max_model_len=model.max_model_len or 0) for model in models]
        )
