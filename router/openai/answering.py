"""Runs a plan: deltas in, one JSON object or a stream of events out."""

from tandem.core.completion import Completion, CompletionService, Finish
from tandem.core.errors import TandemError
from tandem.router.http_exchange import Exchange
from tandem.router.openai.endpoints import Plan
from tandem.router.openai.shapes import DONE, Answer, usage_body


async def answer(service: CompletionService, plan: Plan, exchange: Exchange) -> None:
    """Answers in any case, with an error if need be. Being cancelled ends the generation on the workers too."""
    try:
        completion = await service.open(plan.request)
        async with completion:
            plan.writer.begin(completion.prompt_token_ids)
            if plan.is_stream:
                await _stream(plan, completion, exchange)
            else:
                await _collect(plan, completion, exchange)
    except TandemError as error:
        await exchange.fail(error)


async def _stream(plan: Plan, completion: Completion, exchange: Exchange) -> None:
    finishes: list[Finish | None] = [None] * _num_choices(plan)
    async for delta in completion:
        if delta.finish is not None:
            finishes[delta.choice] = delta.finish
        if events := plan.writer.chunks(delta):
            await exchange.send_events(events)
    usage = _usage(plan, completion, finishes)
    await exchange.send_events(plan.writer.usage_event(usage) + DONE, is_last=True)


async def _collect(plan: Plan, completion: Completion, exchange: Exchange) -> None:
    answers = [Answer() for _ in range(_num_choices(plan))]
    async for delta in completion:
        answers[delta.choice].add(delta)
    usage = _usage(plan, completion, [answer.finish for answer in answers])
    await exchange.send_json(200, plan.writer.whole(answers, usage))


def _num_choices(plan: Plan) -> int:
    return len(plan.request.prompts) * plan.request.n


def _usage(plan: Plan, completion: Completion, finishes: list[Finish | None]) -> dict[str, object]:
    whole = [finish for finish in finishes if finish is not None]
    assert len(whole) == len(finishes), "every choice ends with a finish"
    return usage_body(
        whole,
        num_prompt_tokens=sum(map(len, completion.prompt_token_ids)),
        num_output_tokens=0 if plan.is_silent else sum(finish.num_output_tokens for finish in whole),
        n=plan.request.n,
        with_timelines=plan.with_timelines,
    )
