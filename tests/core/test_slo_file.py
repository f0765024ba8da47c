"""SLO files and plans: their error messages."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from tandem.core.config_file import apply_overrides, dump_config, load_config
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile

SLO = """\
model: Llama-3.1-70B
cluster:
  nodes:
    - device: H100-80GB-SXM5
slo:
  - {ttft_s: 1, tpot_s: 0.1}
workload: {dataset: sharegpt}
"""
PLAN = """\
model: m
verdict: disaggregate
groups:
  - {role: prefill, instances: 1, device: H100, kv_tokens: 1000}
  - {role: decode, instances: 2, device: H100, kv_tokens: 1000}
"""
SOURCE = "give exactly one of trace, populations, dataset, lengths, or prompt_tokens with output_tokens"

SLO_MISTAKES = {  # what of the good file -> by what, and the sentence
    "typing error in a list": (
        ("SXM5\n", "SXM5\n    - device: L4\n      devces: 4\n"),
        "FILE line 6: cluster.nodes.1.devces is not a setting; did you mean devices?",
    ),
    "missing in a list": (
        ("- device: H100-80GB-SXM5", "- devices: 4"),
        "FILE line 4: cluster.nodes.0.device is missing; add it",
    ),
    "too small in a list": (
        ("SXM5\n", "SXM5\n      devices: 0\n"),
        "FILE line 5: cluster.nodes.0.devices must be at least 1, not 0",
    ),
    "a section where a list belongs": (
        ("- device: H100-80GB-SXM5", "  device: H100"),
        "FILE line 3: cluster.nodes must be a list, each item after '- ', not a section",
    ),
    "text where a section belongs": (
        ("- device: H100-80GB-SXM5", "- H100"),
        "FILE line 4: cluster.nodes.0 is a section, not 'H100'; give it settings of its own, e.g. device, or remove it",
    ),
    "empty list": (("\n    - device: H100-80GB-SXM5", " []"), "FILE line 3: cluster.nodes must have at least 1 item"),
    "section missing": (("workload: {dataset: sharegpt}\n", ""), "FILE line 1: workload is missing; add it"),
    "right word, wrong place": (
        ("workload", "seed: 3\nworkload"),
        "FILE line 7: seed is not a setting; did you mean search.seed?",
    ),
    "right word, wrong place, in a list": (
        ("workload", "attainment: 0.9\nworkload"),
        "FILE line 7: attainment is not a setting; did you mean slo[].attainment?",
    ),
    "unit that is not ours": (
        ("ttft_s: 1, tpot_s: 0.1", "ttft_s: 1, tpot_s: 0.1, ttft_ms: 200"),
        "FILE line 6: slo.0.ttft_ms is not a setting; did you mean ttft_s?",
    ),
    "percent for a share": (
        ("0.1}", "0.1, attainment: 90}"),
        "FILE line 6: slo.0.attainment must be at most 1.0, not 90",
    ),
    "not a number": (("ttft_s: 1", "ttft_s: soon"), "FILE line 6: slo.0.ttft_s must be a number, not 'soon'"),
    "no target": (("ttft_s: 1", "ttft_s: .nan"), "FILE line 6: slo.0.ttft_s must be a finite number, not nan"),
    "empty target": (("ttft_s: 1", "ttft_s:"), "FILE line 6: slo.0.ttft_s must be a number, not empty"),
    "two classes of one name": (
        ("0.1}\n", "0.1}\n  - {ttft_s: 5, tpot_s: 1}\n"),
        "FILE line 7: slo.1: two SLO classes are called 'default'; give each class a name",
    ),
    "two sources of lengths": (("sharegpt", "sharegpt, trace: x.csv"), f"FILE line 7: workload: {SOURCE}"),
    "no source of lengths": (("dataset: sharegpt", "rate: 3"), f"FILE line 7: workload: {SOURCE}"),
    "half a source": (
        ("dataset: sharegpt", "prompt_tokens: {mean: 9}"),
        "FILE line 7: workload: prompt_tokens and output_tokens belong together; give both",
    ),
    "mean outside": (
        ("{dataset: sharegpt}", "\n  prompt_tokens:\n    min: 16\n    mean: 9\n  output_tokens: {mean: 9}"),
        "FILE line 10: workload.prompt_tokens.mean: 9 is not between min 16 and max 1048576",
    ),
    "no lengths at all": (
        ("dataset: sharegpt", "prompt_tokens: {cv: 1}, output_tokens: {mean: 9}"),
        "FILE line 7: workload.prompt_tokens: give exactly one of mean, table, mixture",
    ),
    "a mixture of a mean": (
        ("dataset: sharegpt", "prompt_tokens: {mean: 9}, output_tokens: {mixture: [{share: 1}]}"),
        "FILE line 7: workload.output_tokens.mixture.0: give exactly one of mean, table",
    ),
    "moments of a table": (
        ("dataset: sharegpt", "prompt_tokens: {table: a.csv, cv: 2}, output_tokens: {mean: 9}"),
        "FILE line 7: workload.prompt_tokens.cv: belongs to mean; remove it",
    ),
    "cv of a Pareto distribution": (
        ("dataset: sharegpt", "prompt_tokens: {mean: 9, distribution: pareto, cv: 2}, output_tokens: {mean: 9}"),
        "FILE line 7: workload.prompt_tokens.cv: belongs to log-normal; pareto has only a mean, min and max",
    ),
    "a population without lengths": (
        ("dataset: sharegpt", "populations: [{name: a, share: 1}]"),
        "FILE line 7: workload.populations.0: "
        "give exactly one of dataset, lengths, or prompt_tokens with output_tokens",
    ),
    "arrivals beside populations": (
        ("dataset: sharegpt", "populations: [{name: a, share: 1, dataset: arxiv}], arrivals: {process: gamma}"),
        "FILE line 7: workload.arrivals: belongs to each population; move it there",
    ),
    "two populations of one name": (
        (
            "dataset: sharegpt",
            "populations: [{name: a, share: 1, dataset: arxiv}, {name: a, share: 1, dataset: sharegpt}]",
        ),
        "FILE line 7: workload.populations.1: two populations are called 'a'; give each a name of its own",
    ),
    "a population of an unknown class": (
        ("dataset: sharegpt", "populations: [{name: a, share: 1, dataset: arxiv, slo_class: slow}]"),
        "FILE line 7: workload.populations.0.slo_class: 'slow' is none of the SLO classes: default",
    ),
    "rate in words": (
        ("sharegpt", "sharegpt, rate: most"),
        "FILE line 7: workload.rate: 'most' is neither a number of requests per second above 0 nor max",
    ),
    "no rate": (
        ("sharegpt", "sharegpt, rate: 0"),
        "FILE line 7: workload.rate: 0 is neither a number of requests per second above 0 nor max",
    ),
    "cheapest for what": (
        ("workload", "objective: cheapest\nworkload"),
        "FILE line 7: objective: cheapest needs workload.rate; set it to the requests per second",
    ),
    "unknown arrivals": (
        ("sharegpt", "sharegpt, arrivals: {process: uniform}"),
        "FILE line 7: workload.arrivals.process must be one of poisson, gamma or weibull, not 'uniform'",
    ),
    "unknown layout": (
        ("workload", "search:\n  layouts:\n    - colocated\n    - both\nworkload"),
        "FILE line 10: search.layouts.1 must be one of disaggregated, colocated or mixed, not 'both'",
    ),
    "bad size": (
        ("  nodes", "  kv_memory: plenty\n  nodes"),
        "FILE line 3: cluster.kv_memory must be a whole number or a size like 512MiB, not 'plenty'",
    ),
    "trace that is no path": (
        ("dataset: sharegpt", "trace: 3"),
        "FILE line 7: workload.trace must be the path of a file or folder, not 3",
    ),
    "model that is a number": (
        ("model: Llama-3.1-70B", "model: 70"),
        "FILE line 1: model must be text, not 70; put it in quotes",
    ),
}
PLAN_MISTAKES = {
    "half a plan": (
        ("role: decode", "role: prefill"),
        "FILE line 3: groups: there is no decode group; prefill and decode groups need each other",
    ),
    "devices for too few instances": (
        ("instances: 2,", 'instances: 2, devices: [["0:0"]],'),
        "FILE line 5: groups.1.devices: lists 1 instances, but there are 2",
    ),
    "devices for too few ranks": (
        ("instances: 1,", 'instances: 1, tp: 2, devices: [["0:0"]],'),
        "FILE line 4: groups.0.devices: each instance needs 2 devices (tp 2 x pp 1)",
    ),
    "devices for too few ranks that share experts": (
        ("instances: 1,", 'instances: 1, dp: 2, devices: [["0:0"]],'),
        "FILE line 4: groups.0.devices: each instance needs 2 devices (dp 2)",
    ),
    "experts over the ranks of layers": (
        ("instances: 1,", "instances: 1, dp: 2, tp: 2,"),
        "FILE line 4: groups.0.dp: 2 is for tp 1 and pp 1, not tp 2 and pp 1",
    ),
    "a device for two": (
        ("instances: 2,", 'instances: 2, devices: [["0:0"], ["0:0"]],'),
        "FILE line 3: groups: device 0:0 is given to two ranks",
    ),
    "a device that YAML takes for a number": (
        ("instances: 1,", "instances: 1, devices: [[10]],"),
        "FILE line 4: groups.0.devices.0.0 must be text, not 10; put it in quotes",
    ),
    "another version": (
        ("model: m", "model: m\nversion: 2"),
        "FILE line 2: version: this tandem reads plans of version 1, not 2; make a new plan with `tandem plan`",
    ),
    "unknown verdict": (
        ("disaggregate", "maybe"),
        "FILE line 2: verdict must be one of disaggregate, colocate, mixed or infeasible, not 'maybe'",
    ),
}


def told(path: Path, text: str, kind: type[BaseModel]) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, kind)
    return caught.value.message.replace(str(path), "FILE")


@pytest.mark.parametrize(("change", "sentence"), SLO_MISTAKES.values(), ids=SLO_MISTAKES)
def test_each_mistake_in_an_slo_file_is_reported_with_its_line(
    tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    assert change[0] in SLO
    assert told(tmp_path / "slo.yaml", SLO.replace(*change, 1), SloFile) == sentence


def test_a_device_needs_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.replace("instances: 1,", "instances: 1, devices: [[1:0]],", 1))
    assert load_config(path, Plan).groups[0].devices == (("1:0",),)


@pytest.mark.parametrize(("change", "sentence"), PLAN_MISTAKES.values(), ids=PLAN_MISTAKES)
def test_each_mistake_in_a_plan_is_reported_with_its_line(
    tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    assert change[0] in PLAN
    assert told(tmp_path / "plan.yaml", PLAN.replace(*change, 1), Plan) == sentence


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = SLO.replace("ttft_s: 1", "ttft_s: 0").replace("sharegpt", "sharegpt, rate: no").replace("device:", "devise:")
    assert [line.partition(":")[0] for line in told(tmp_path / "slo.yaml", text, SloFile).splitlines()] == [
        "FILE line 4",  # device is missing
        "FILE line 4",  # devise is not a setting
        "FILE line 6",
        "FILE line 7",
    ]


def test_relative_paths_in_sections_start_at_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    path = tmp_path / "conf" / "slo.yaml"
    text = SLO.replace("dataset: sharegpt", "trace: ../traces/a.csv").replace(
        "SXM5", "SXM5\n      calibration: here.yaml"
    )
    path.write_text(text)
    monkeypatch.chdir(tmp_path)
    slo = load_config(Path("conf/slo.yaml"), SloFile)
    assert slo.workload.trace == tmp_path / "traces" / "a.csv"
    assert slo.cluster.nodes[0].calibration == tmp_path / "conf" / "here.yaml"


def test_the_slo_file_of_a_plan_is_relative_to_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN + "slo_file: slo.yaml\n")
    assert load_config(path, Plan).slo_file == tmp_path / "slo.yaml"


def test_a_model_is_a_folder_if_it_exists_and_a_name_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(SLO)
    assert load_config(path, SloFile).model == "Llama-3.1-70B"
    (tmp_path / "Llama-3.1-70B").mkdir()
    assert load_config(path, SloFile).model == str(tmp_path / "Llama-3.1-70B")


def test_without_a_file_paths_count_from_the_current_folder(tmp_path: Path) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(SLO)
    changed = apply_overrides(load_config(path, SloFile), ["workload.dataset=null", "workload.trace=a.csv"])
    assert changed.workload.trace == Path("a.csv").resolve()


def test_what_is_dumped_loads_again(tmp_path: Path) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(SLO.replace("sharegpt", "sharegpt, rate: 2.5, prefix: {share: 0.5, tokens: 100}"))
    slo = load_config(path, SloFile)
    path.write_text(dump_config(slo))
    assert load_config(path, SloFile) == slo
    plan_path = tmp_path / "plan.yaml"
    plan_path.write_text(PLAN.replace("instances: 1,", 'instances: 1, devices: [["1:0"]],'))
    plan = load_config(plan_path, Plan)
    plan_path.write_text(dump_config(plan))
    assert load_config(plan_path, Plan) == plan
