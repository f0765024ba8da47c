"""The reports are complete, self-contained and well-formed."""

import dataclasses
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tandem.core.slo import SloClass
from tandem.placement.evidence import Advice, ErrorBudget, LayoutComparison, NodeSummary
from tandem.placement.report import RunDescription, write_report
from tandem.placement.report.advice_text import advice_sentences, change_rows
from tandem.placement.report.formatting import headline, number, percent, seconds
from tandem.placement.report.plan_report import report_html
from tandem.placement.report.run_report import simulation_report_html
from tests.placement.planned import BATCH, CHAT, finished_run, planned

DESCRIPTION = RunDescription("Simulation of plan.yaml", "10 req/s, Poisson", "0.1.0", inputs=(("plan.yaml", "a: <1>"),))
UNDRAWN: dict[str, Any] = dict.fromkeys(("candidates", "attainments", "latencies", "bounds", "sensitivity"), ())  # fast


@pytest.fixture(scope="module")
def page() -> str:
    """The report of a plan for two classes."""
    return report_html(planned(classes=(CHAT, BATCH)))


def _svgs(page: str) -> list[ElementTree.Element]:
    """Every SVG of the page. Raises ParseError if one is not well-formed XML."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def _text(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page))


def test_the_report_of_a_plan_has_all_sections(page: str) -> None:
    for section in (
        "changes",
        "plan",
        "candidates",
        "attainment",
        "latency",
        "bounds",
        "sensitivity",
        "error",
        "workload",
        "reproduction",
    ):
        assert page.count(f'<section id="{section}">') == 1
        assert f'href="#{section}"' in page
    text = _text(page)
    assert "2 prefill instances (tp2) and 1 decode instance (tp1) on H100 serve 11.2 req/s" in text
    assert "TTFT is 1.4 x its target" in text
    assert "the weights alone do not fit" in text
    assert "against measurements is 8 %" in text
    assert "14.8 req/s" in text, "what the transient would have claimed"
    assert "Links are the vendor's figures." in text.replace("&#39;", "'")
    assert "data set sharegpt, Poisson arrivals" in text
    assert "model: Llama-3.1-70B" in text
    assert "seed 7" in text


def test_the_report_begins_with_what_to_do(page: str) -> None:
    header = _text(page[: page.index("<main>")])
    assert "A thousand requests cost 0.597 USD at 10.0 req/s (21.5 USD per hour)." in header
    assert "Class chat: 92.1 % meet both targets at 10.0 req/s, and 90 % must. 90 % of them stay within TTFT" in header
    assert (
        "The single change that helps most, simulated on the same requests: TPOT targets 20 % looser (48.0 ms) (+16 % "
        "goodput, 95 %: +13 to +21 %)." in header
    )
    assert "Then: one more decode instance (1 H100 device) (+18 % goodput, -2 % per USD)." in header
    assert (
        "Disaggregation pays: 2 x prefill tp2 + 1 x decode tp1 has 1.32 times the goodput per device of 3 x colocated "
        "tp1 (95 %: 1.25 to 1.43; 3 colocated configurations simulated on the same requests). Do not "
        "disaggregate with" in header
    )
    assert "prompts 25 % shorter: colocated instances then serve more" in header


def test_without_advice_there_are_cost_and_distance_only() -> None:
    text = " ".join(advice_sentences(planned(advice=None)))
    assert "A thousand requests cost" in text
    assert "helps most" not in text
    assert change_rows(planned(advice=None)) == []


@pytest.mark.parametrize(
    ("layouts", "sentence"),
    [
        (LayoutComparison(False, "b", "a", 0.5), "Do not disaggregate, as predicted: b serves more per device than a."),
        (
            LayoutComparison(False, "b", "a", 0.5, interval=(0.4, 0.8)),
            "Do not disaggregate: b has 2.00 times the goodput per device of a (95 %: 1.25 to 2.50;",
        ),
        (
            LayoutComparison(False, "b", "a", 0.5, (("tpot_target", 0.75, 1.1),)),
            "It would pay with TPOT targets 25 % tighter",
        ),
        (
            LayoutComparison(True, "a", "b", 0.9, (("tpot_target", 0.75, 0.8),)),
            "it also does with lengths and targets of 0.75 and 1.5 times these",
        ),
        (LayoutComparison(True, "a", "b", 0.9, interval=(0.7, 1.05)), "Whether to disaggregate hardly matters: a has"),
        (LayoutComparison(True, "a", "b", 1.2, interval=(1.1, 1.3)), "Do not disaggregate: b has 1.20 times"),
        (
            LayoutComparison(True, "a", "b", 0.0, interval=(0.0, 0.0)),
            "Disaggregation pays: b misses the targets at every rate.",
        ),
    ],
)
def test_it_says_when_not_to_disaggregate(layouts: LayoutComparison, sentence: str) -> None:
    assert sentence in " ".join(advice_sentences(planned(advice=Advice((), layouts))))


def test_every_plot_is_well_formed_and_has_a_text_for_screen_readers(page: str) -> None:
    svgs = _svgs(page)
    names = {svg.attrib["aria-labelledby"].split("-title")[0] for svg in svgs}
    assert names == {
        "candidates", "attainment-0", "attainment-1", "ttft", "tpot", "bounds", "sensitivity-goodput",
        "sensitivity-attainment", "error", "prompt-lengths", "output-lengths",
    }  # fmt: skip
    for svg in svgs:
        title, description = list(svg)[:2]
        assert title.tag.endswith("title")
        assert title.text
        assert description.tag.endswith("desc")
        assert description.text


def test_ids_are_unique_on_the_page(page: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_loads_nothing_and_is_small(page: str) -> None:
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "@import" not in page
    assert len(page.encode()) < 1_500_000


def test_the_same_plan_gives_the_same_bytes(page: str, tmp_path: Path) -> None:
    write_report(planned(classes=(CHAT, BATCH)), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.encode()


def test_names_from_files_are_escaped() -> None:
    odd = SloClass(ttft_s=1.0, tpot_s=0.1).model_copy(update={"name": "<b>&$x$"})
    page = report_html(planned(classes=(odd, BATCH)))
    assert "<b>&$x$" not in page
    assert "&lt;b&gt;&amp;$x$" in page
    _svgs(page)


def test_colours_of_plots_follow_the_reader_s_scheme(page: str) -> None:
    assert "prefers-color-scheme:dark" in page
    styles = re.findall(r'style="([^"]*)"', page)
    assert any("var(--prefill)" in style for style in styles)
    assert not any(re.search(r"#[0-9a-f]{6}", style) for style in styles)


def test_the_device_map_shows_instances_and_free_devices() -> None:
    page = report_html(planned(**UNDRAWN))
    cells = re.findall(r'class="cell (\w+)" title="([^"]*)"', page)
    assert cells == [
        ("prefill", "0:0: prefill P1"),
        ("prefill", "0:1: prefill P1"),
        ("decode", "0:2: decode D1"),
        ("idle", "0:3"),
        ("prefill", "1:0: prefill P2"),
        ("prefill", "1:1: prefill P2"),
    ]


def test_of_many_nodes_only_used_nodes_are_drawn() -> None:
    nodes = tuple(NodeSummary(str(index), "H100", 8) for index in range(50))
    page = report_html(planned(nodes=nodes, **UNDRAWN))
    assert page.count('class="node"') == 2
    assert "48 nodes without instances not drawn" in page


def test_instances_without_devices_are_drawn_beside_the_nodes() -> None:
    one = planned(nodes=(NodeSummary("0", "H100", 1),), **UNDRAWN)
    groups = tuple(group.model_copy(update={"devices": ()}) for group in one.plan.groups)
    page = report_html(dataclasses.replace(one, plan=one.plan.model_copy(update={"groups": groups})))
    assert [role for role, _ in re.findall(r'class="cell (\w+)" title="([^"]*)"', page)] == ["idle"] + 4 * [
        "prefill"
    ] + ["decode"]


def test_an_infeasible_plan_names_the_nearest_feasible_targets() -> None:
    page = _text(report_html(planned("infeasible", **UNDRAWN)))
    assert "The best plan reaches 90 % at TTFT 0.9 s." in page
    assert headline(planned("infeasible")) == "Infeasible: the best plan reaches 90 % at TTFT 0.9 s."


def test_a_plan_without_predictions_has_a_report() -> None:
    whole = planned("infeasible", **UNDRAWN)
    bare = dataclasses.replace(whole, plan=whole.plan.model_copy(update={"expected": None}))
    page = report_html(bare)
    assert "There was no other configuration." in page
    assert len(_svgs(page)) == 2, "the workload is known whatever becomes of the search"


def test_the_page_of_a_simulation() -> None:
    page = simulation_report_html(finished_run(), (CHAT,), DESCRIPTION)
    text = _text(page)
    assert "100 % of the requests met both targets" in text
    assert "Within targets" in text
    assert "prefill-0" in text
    assert "a: &lt;1&gt;" in page
    names = {svg.attrib["aria-labelledby"].split("-title")[0] for svg in _svgs(page)}
    assert names == {"ttft", "tpot", "parts", "rates", "in-system", "bounds", "prompt-lengths", "output-lengths"}


def test_the_report_of_a_live_run_has_no_server_timelines() -> None:
    slow = SloClass(name="strict", ttft_s=0.1, tpot_s=0.1)
    page = simulation_report_html(finished_run(inside=False), (slow,), DESCRIPTION)
    assert "Targets missed" in page
    assert 'id="bounds"' not in page
    assert "parts-title" not in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1,230"), (0.012345, "0.0123"), (9.999, "10.0"), (float("nan"), "–"), (3.2e7, "3.2e+07")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("time_s", "text"),
    [(85.2e-6, "85.2 µs"), (0.01234, "12.3 ms"), (0.9999, "1.00 s"), (12.3, "12.3 s"), (1200, "20.0 min")],
)
def test_times_have_the_unit_that_fits(time_s: float, text: str) -> None:
    assert seconds(time_s) == text


def test_a_very_large_transient_goodput_is_shown_as_no_limit() -> None:
    endless = planned(error=ErrorBudget(0.08, transient_goodput=1e10), **UNDRAWN)
    assert "goodput would be: no limit." in _text(report_html(endless))


def test_only_a_share_of_one_is_100_percent() -> None:
    assert percent(1.0) == "100 %"
    assert percent(0.99999) == ">99.9 %"
    assert percent(0.9213) == "92.1 %"
