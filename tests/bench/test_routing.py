import sys

import pytest

from bench.routing.__main__ import main


def test_prints_a_row_per_kind_of_call_and_checks_the_winners(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["routing", "--rounds", "6", "--full-rounds", "3"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines[2:]] == [
        f"{role}, {what}"
        for role in ("prefill", "decode")
        for what in ("compare all", "explained", "load changed", "best")
    ]
