"""What becomes of a request that cannot meet its targets: best effort, or refused."""

import math

import pytest

from tandem.core.errors import OverloadedError
from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.session import BlockCounts
from tandem.scheduling.routing_settings import RoutingSettings
from tests.scheduling.routing_fakes import STEP_COST, DrivenRouter

BLOCKS = BlockCounts(total=512, free=512, running=0, cached=0, leased=0)
DEMOTE = RequestSlo("chat", ttft_s=1.0, tpot_s=0.1)
REFUSE = RequestSlo("chat", ttft_s=1.0, tpot_s=0.1, if_unmet="refuse")


def _busy_router(*, waiting: int = 0, max_wait_s: float = math.inf) -> DrivenRouter:
    """One colocated instance that takes 10 ms for a token, and one prompt of 100 tokens at a time."""
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=1, max_wait_s=max_wait_s))
    router.join("c1", max_model_len=4096, blocks=BLOCKS)
    for number in range(6):
        router.ask(f"past{number}", prompt=100)
    for _ in range(6):
        router.advance(1.0)
        sent = router.take()
        router.start(sent)
        router.first_token(sent)
        router.finish(sent)
    router.ask("now", prompt=100)
    for number in range(waiting):
        router.ask(f"waiting{number}", prompt=100)
    return router


def test_a_request_that_can_be_on_time_keeps_its_targets() -> None:
    router = _busy_router()
    request = router.ask("r", prompt=10, slo=DEMOTE)
    assert request.effective_slo is DEMOTE
    assert request.predicted_ttft_s is not None
    assert request.predicted_ttft_s < 1.0


def test_a_request_that_would_be_late_is_made_best_effort() -> None:
    router = _busy_router()
    request = router.ask("r", prompt=1000, slo=DEMOTE)
    assert request.effective_slo is NO_SLO
    assert request.slo is DEMOTE
    assert request.demoted_because is not None
    assert "the target is 1 s" in request.demoted_because


def test_a_request_that_would_be_late_is_refused_with_a_retry_time() -> None:
    router = _busy_router(waiting=5)
    with pytest.raises(OverloadedError, match="would miss its TTFT target") as caught:
        router.ask("r", prompt=150, slo=REFUSE)
    assert caught.value.reason == "ttft-target"
    assert caught.value.retry_after_s > 0.1
    assert "r" not in router.ends
    assert router.machine.num_held == 5


def test_a_request_that_is_alone_is_never_refused() -> None:
    """Else a prediction that was wrong once would refuse all for ever, and nothing would correct it."""
    router = DrivenRouter()
    router.join("c1", max_model_len=4096, blocks=BLOCKS)
    router.ask("slow", prompt=10)
    router.advance(60.0)
    sent = router.take()
    router.start(sent)
    router.first_token(sent)
    router.finish(sent)
    assert router.ask("r", slo=REFUSE).effective_slo is REFUSE


def test_nothing_is_refused_or_demoted_before_anything_is_measured() -> None:
    router = DrivenRouter()
    router.join("c1", max_model_len=4096, blocks=BLOCKS)
    router.ask("first")
    assert router.ask("r", prompt=4000, slo=REFUSE).effective_slo is REFUSE


def test_an_instance_gets_what_it_computes_in_two_steps_and_others_wait_in_the_router() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=16384))
    router.join("c1", max_model_len=4096, blocks=BLOCKS, step_prompt_tokens=100)
    for name in ("a", "b", "c"):
        router.ask(name, prompt=100)
    first, _ = router.take(), router.take()
    assert not router.sent, "the third one waits"
    router.start(first)
    router.first_token(first)
    assert router.take().attempt.request.key == "c"


def test_a_request_whose_target_passes_while_it_waits_ends_or_becomes_best_effort() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=1))
    router.join("c1", max_model_len=4096, blocks=BLOCKS)
    router.ask("now", prompt=100)
    demoted = router.ask("demote", slo=DEMOTE)
    router.ask("refuse", slo=REFUSE)
    router.advance(1.5)
    error = router.ends["refuse"]
    assert isinstance(error, OverloadedError)
    assert error.reason == "ttft-target"
    assert demoted.demoted_because is None, "it waits"
    sent = router.take()
    router.start(sent)
    router.first_token(sent)
    assert router.take().attempt.request is demoted
    assert demoted.effective_slo is NO_SLO


def test_a_wait_that_is_too_long_names_its_reason() -> None:
    router = _busy_router(waiting=8, max_wait_s=10.0)
    with pytest.raises(OverloadedError) as caught:
        router.ask("r", prompt=100)
    assert caught.value.reason == "max-wait"
    with pytest.raises(OverloadedError) as caught:
        _busy_router(waiting=10).ask("r", prompt=100, deadline_s=router.now_s + 2.0)
    assert caught.value.reason == "deadline"


def _decoding_router() -> DrivenRouter:
    """An instance with step costs, on which a request decodes."""
    router = DrivenRouter(RoutingSettings(policy="goodput"))
    router.join("c1", max_model_len=4096, blocks=BLOCKS, step_cost=STEP_COST)
    router.ask("first", prompt=100, output=100)
    first = router.take()
    router.start(first)
    router.first_token(first)
    return router


@pytest.mark.parametrize(("tpot_s", "is_refused"), [(STEP_COST.step_s / 2, True), (0.5, False)])
def test_a_tpot_below_the_time_of_a_step_is_refused(tpot_s: float, is_refused: bool) -> None:
    router, slo = _decoding_router(), RequestSlo("fast", ttft_s=10.0, tpot_s=tpot_s, if_unmet="refuse")
    if not is_refused:
        assert router.ask("r", prompt=10, output=10, slo=slo).demoted_because is None
        return
    with pytest.raises(OverloadedError, match="would miss its TPOT target: a time per token of ") as caught:
        router.ask("r", prompt=10, output=10, slo=slo)
    assert caught.value.reason == "tpot-target"
    assert caught.value.retry_after_s > 0
    assert router.ask("only a token", prompt=10, output=1, slo=slo).demoted_because is None


def test_an_unreachable_tpot_makes_a_request_best_effort_unless_it_is_alone() -> None:
    slo = RequestSlo("fast", ttft_s=10.0, tpot_s=STEP_COST.step_s / 2)
    request = _decoding_router().ask("r", prompt=10, output=10, slo=slo)
    assert request.effective_slo is NO_SLO
    assert request.demoted_because is not None
    assert "time per token" in request.demoted_because
    alone = DrivenRouter(RoutingSettings(policy="goodput"))
    alone.join("c1", max_model_len=4096, blocks=BLOCKS, step_cost=STEP_COST)
    assert alone.ask("r", prompt=10, output=10, slo=slo).demoted_because is None
