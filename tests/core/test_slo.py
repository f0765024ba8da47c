"""SLO classes of a file, and what a client may ask for."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.config import ServeConfig
from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError, InvalidRequestError
from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.slo import MAX_TARGET_S, RequestedSlo, SloClass

CHAT = SloClass(name="chat", ttft_s=0.5, tpot_s=0.05, weight=2, priority=3, if_unmet="refuse")
DEFAULT = SloClass(ttft_s=1, tpot_s=0.1)


def test_a_class_is_found_by_its_name_and_the_default_without_one() -> None:
    assert RequestedSlo("chat").resolve([DEFAULT, CHAT]) == RequestSlo("chat", 0.5, 0.05, 2, 3, "refuse")
    assert RequestedSlo().resolve([DEFAULT, CHAT]).name == "default"
    assert RequestedSlo().resolve([CHAT]) is NO_SLO


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        (RequestedSlo("chat", ttft_s=1.0), "not both"),
        (RequestedSlo("other"), "there is no SLO class 'other'; the classes of this server: default, chat"),
        (RequestedSlo("x" * 1000), "there is no SLO class 'xxx"),
        (RequestedSlo("custom"), "there is no SLO class 'custom'"),
    ],
)
def test_invalid_requests_for_targets_are_refused(requested: RequestedSlo, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        requested.resolve([DEFAULT, CHAT])
    assert len(caught.value.message) < 300


@given(ttft_s=st.none() | st.floats(), tpot_s=st.none() | st.floats())
def test_targets_are_positive_numbers_of_at_most_a_day(ttft_s: float | None, tpot_s: float | None) -> None:
    given_targets = [target_s for target_s in (ttft_s, tpot_s) if target_s is not None]
    requested = RequestedSlo("", ttft_s, tpot_s)
    if not all(0 < target_s <= MAX_TARGET_S for target_s in given_targets):
        with pytest.raises(InvalidRequestError, match=r"ttft_s|tpot_s"):
            requested.resolve([DEFAULT])
        return
    slo = requested.resolve([CHAT])
    assert slo.has_targets is bool(given_targets)
    assert (slo.ttft_s, slo.tpot_s) == (math.inf if ttft_s is None else ttft_s, math.inf if tpot_s is None else tpot_s)


@pytest.mark.parametrize(
    ("slo", "mistake"),
    [
        ("- {name: custom, ttft_s: 1, tpot_s: 1}", "slo.0.name: custom is what metrics call"),
        ("- {name: two words, ttft_s: 1, tpot_s: 1}", "slo.0.name: "),
        ("- {name: a, ttft_s: .inf, tpot_s: 1}", "slo.0.ttft_s must be a finite number, not inf"),
        ("- {name: a, ttft_s: 1, tpot_s: .nan}", "slo.0.tpot_s must be a finite number, not nan"),
        ("- {name: a, ttft_s: 1, tpot_s: 1, if_unmet: drop}", "slo.0.if_unmet must be one of demote or refuse"),
        ("- {ttft_s: 1, tpot_s: 1}\n    - {ttft_s: 2, tpot_s: 1}", "slo.1: two SLO classes are called 'default'"),
    ],
)
def test_mistakes_in_a_serve_file(tmp_path: Path, slo: str, mistake: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(f"model: m\nrouter:\n  slo:\n    {slo}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ServeConfig)
    assert f"router.{mistake}" in caught.value.message
