"""The choice among remote prefill, local prefill and colocated instances by expected goodput."""

import math

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.session import BlockCounts
from tandem.core.step_coefficients import StepCoefficients
from tandem.scheduling.routing_settings import RoutingSettings
from tests.scheduling.routing_fakes import STEP_COST, DrivenRouter, Sent

_GOODPUT = RoutingSettings(policy="goodput")
_LARGE = {"max_model_len": 100_000, "blocks": BlockCounts(total=6000, free=6000, running=0, cached=0, leased=0)}
_LAX = RequestSlo("lax", ttft_s=1.0, tpot_s=0.5)


def _router(*instance_ids: str, settings: RoutingSettings = _GOODPUT) -> DrivenRouter:
    router = DrivenRouter(settings)
    router.join(*instance_ids, step_cost=STEP_COST, **_LARGE)
    return router


def _decode(router: DrivenRouter, count: int, slo: RequestSlo) -> None:
    """That many requests decode on the first instance that takes them."""
    for number in range(count):
        router.ask(f"running {number}", prompt=10, output=100, slo=slo)
        first = router.take()
        router.start(first)
        if first.attempt.hand_over:
            router.take()
        router.first_token(first)


def test_an_idle_pair_computes_the_prompt_remotely() -> None:
    router = _router("p1", "d1")
    router.ask("r", prompt=100, slo=_LAX)
    sent = router.take()
    assert (sent.instance_id, sent.attempt.hand_over) == ("p1", True)
    assert sent.selection is not None
    assert {name for name, _ in sent.selection.candidates[0].terms} == {"ttft_ms", "tpot_ms", "on_time", "loss"}


def test_a_decode_instance_computes_a_prompt_that_would_be_late_elsewhere() -> None:
    router = _router("p1", "d1")
    router.ask("long", prompt=12_000)  # 1.2 s; best effort
    assert router.take().instance_id == "p1"
    router.ask("r", prompt=1000, slo=_LAX)
    sent = router.take()
    assert (sent.instance_id, sent.attempt.hand_over) == ("d1", False)


def test_a_request_waits_if_it_would_make_others_late() -> None:
    """The prefill instance is without credit. The decode instance has some, but no time for a prompt."""
    router = DrivenRouter(RoutingSettings(policy="goodput", max_outstanding_tokens=16384))
    router.join("p1", "d1", step_cost=STEP_COST, step_prompt_tokens=2048, **_LARGE)
    _decode(router, 2, RequestSlo("tight", ttft_s=1.0, tpot_s=0.0115))
    router.ask("long", prompt=5000)
    first = router.take()
    router.ask("r", prompt=3000, output=100, slo=RequestSlo("x", ttft_s=2.0, tpot_s=0.5))
    assert not router.sent, "it waits"
    router.start(first)
    assert router.take().instance_id == "d1", "the first one's decode instance"
    router.first_token(first)
    assert router.take().instance_id == "p1"


def test_a_request_does_not_wait_while_another_instance_of_the_role_has_credit() -> None:
    router = DrivenRouter(RoutingSettings(policy="goodput", max_outstanding_tokens=2000))
    router.join("c1", step_cost=STEP_COST, step_prompt_tokens=2048, **_LARGE)
    router.join("c2", step_cost=StepCoefficients(*(8 * each for each in STEP_COST)), step_prompt_tokens=2048, **_LARGE)
    places = []
    for name in ("a", "b", "c"):
        router.ask(name, prompt=3000, output=100, slo=RequestSlo("x", ttft_s=2.0, tpot_s=0.5))
        places += [sent.instance_id for sent in router.sent]
        router.sent.clear()
    assert places == ["c1", "c2"], "the third waits, for neither has credit"


def test_running_requests_are_not_made_late_for_a_new_one() -> None:
    """As before, but two requests decode with targets that leave no time for a prompt."""
    router = _router("p1", "d1")
    _decode(router, 2, RequestSlo("tight", ttft_s=1.0, tpot_s=0.0115))
    router.ask("long", prompt=12_000)
    assert router.take().instance_id == "p1"
    router.ask("r", prompt=5000, output=100, slo=RequestSlo("x", ttft_s=1.0, tpot_s=0.5))
    assert router.take().instance_id == "p1"


def test_cached_tokens_are_not_priced() -> None:
    router = _router("p1", "p2", "d1", settings=RoutingSettings(policy="goodput", local_prefill=False))
    names = tuple(range(250))
    router.ask("first", prompt=4001, tokens=names)
    warm = router.take()
    router.start(warm)
    router.first_token(warm, is_last=True)
    router.ask("second", prompt=1500)  # the other one's turn, or the same instance's
    busy = router.take()
    if busy.instance_id != warm.instance_id:  # keep the warm one busy
        router.ask("third", prompt=1500)
        busy = router.take()
    router.ask("again", prompt=4001, tokens=names, slo=_LAX)
    assert router.take().instance_id == warm.instance_id, "150 ms in its queue are less than 400 ms of prompt"


@given(
    prompts=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
    slo=st.sampled_from([NO_SLO, _LAX, RequestSlo("tight", ttft_s=0.05, tpot_s=0.0105)]),
)
def test_without_step_costs_the_choice_is_the_balanced_one(prompts: list[int], slo: RequestSlo) -> None:
    sent: list[list[Sent]] = []
    for settings in (_GOODPUT, RoutingSettings()):
        router = DrivenRouter(settings)
        router.join("p1", "p2", "d1", step_cost=STEP_COST, **_LARGE)
        router.join("c1", **_LARGE)
        for number, prompt in enumerate(prompts):
            router.ask(number, prompt=prompt, slo=slo)
        sent.append(router.sent)
    assert [one.instance_id for one in sent[0]] == [one.instance_id for one in sent[1]]


def test_errors_of_predictions_are_kept() -> None:
    router = _router("p1", "d1")
    for number in range(20):
        router.ask(number, prompt=1000, output=11, slo=_LAX)
        first = router.take()
        router.start(first)
        second = router.take()
        router.now_s += 2 * 0.11
        router.first_token(first)
        router.machine.transfer_committed(first.attempt, router.now_s)
        router.now_s += 10 * 0.0111
        router.machine.tokens_generated(first.attempt, 10, router.now_s)
        router.finish(second)
    errors = router.machine.prediction_errors()
    assert errors["ttft_remote"].count == errors["tpot"].count == 20
    assert 0.8 < errors["ttft_remote"].quantile(0.5) < 1.2, "twice as long as predicted"
    assert abs(errors["tpot"].quantile(0.5)) < 0.2
    assert not math.isnan(errors["ttft_local"].error)


def test_a_report_brings_new_costs() -> None:
    router = _router("p1", "p2", "d1", settings=RoutingSettings(policy="goodput", local_prefill=False))
    slow = StepCoefficients(*(10 * each for each in STEP_COST))
    router.join("p1", step_cost=slow, **_LARGE)
    router.ask("a", prompt=1000, slo=_LAX)
    router.ask("b", prompt=1000, slo=_LAX)
    assert [sent.instance_id for sent in router.sent] == ["p2", "p2"]
