"""Settings that cannot work are told in a sentence before anything starts."""

from pathlib import Path

import pytest

from tandem.core.config import ServeConfig
from tandem.deploy.finding import Grade
from tandem.deploy.host_checks import check_folders, check_ports
from tandem.deploy.run_state import StateFolders
from tandem.deploy.settings_checks import check_memory, check_settings
from tandem.deploy.topology import Machine
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint

CPU, GPU = Machine(cores=4), Machine(cores=4, gpus=2)
SMALL = Machine(cores=4, memory_bytes=2 << 30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "little", CheckpointShape())


def failures(model: Path, machine: Machine, **colocated: object) -> list[str]:
    config = ServeConfig.model_validate({"model": model, "colocated": colocated})
    return [finding.text for finding in check_settings(config, machine) if finding.grade is Grade.FAILED]


def test_the_defaults_are_fine(model: Path) -> None:
    for machine in (CPU, GPU):
        config = ServeConfig(model=model)
        assert [finding for finding in check_settings(config, machine) if finding.grade is Grade.FAILED] == []


@pytest.mark.parametrize(
    ("machine", "settings", "text"),
    [
        (CPU, {"engine": {"device": "cuda"}}, "colocated.engine.device is cuda, but this machine has no GPU"),
        (CPU, {"engine": {"device": "cuda:0"}}, "colocated.engine.device is cuda:0, but this machine has no GPU"),
        (CPU, {"engine": {"device": "tpu"}}, "colocated.engine.device is tpu, which is no device"),
        (
            GPU,
            {"engine": {"device": "cuda:1"}},
            "colocated.engine.device is cuda:1, but each instance",
        ),
        (GPU, {"engine": {"ops": "native"}}, "colocated.engine.ops is native, but these kernels run on CPUs only"),
        (CPU, {"transport": "nccl"}, "colocated.transport is nccl, which moves KV between GPUs only"),
        (
            CPU,
            {"engine": {"max_model_len": 10**6}},
            "colocated.engine.max_model_len is 1000000, but",
        ),
        (
            SMALL,
            {"engine": {"kv_memory": "3GiB"}},
            "colocated.engine.kv_memory is 3.0 GiB, and this machine has 2.0 GiB",
        ),
        (CPU, {"engine": {"kv_memory": 512}}, "colocated.engine.kv_memory is 512 bytes, which is room for 0 blocks"),
        (CPU, {"engine": {"kv_memory": "64KiB", "block_size": 256}}, "colocated.engine.kv_memory is 65536 bytes"),
    ],
)
def test_a_setting_that_cannot_work(model: Path, machine: Machine, settings: dict[str, object], text: str) -> None:
    (found,) = failures(model, machine, **settings)
    assert found.startswith(text)


def test_kv_moves_between_several_ranks_on_cpus_only(model: Path) -> None:
    config = ServeConfig.model_validate({"model": model, "prefill": {"engine": {"tp": 2}}})
    assert [finding for finding in check_settings(config, CPU) if finding.grade is Grade.FAILED] == []
    (found,) = (finding for finding in check_settings(config, GPU) if finding.grade is Grade.FAILED)
    assert found.text == "prefill instances have 2 GPUs each, and KV moves between single GPUs only"


def test_what_is_only_odd_is_a_warning(model: Path) -> None:
    config = ServeConfig.model_validate({"model": model, "colocated": {"engine": {"threads": 9, "kv_memory": "16KiB"}}})
    findings = list(check_settings(config, CPU))
    assert [finding.grade for finding in findings] == [Grade.WARNING, Grade.WARNING]
    assert findings[1].text == "9 threads of instances for 4 cores"


def test_a_codec_without_a_network_is_a_warning(model: Path) -> None:
    section = {"transport": "shared_memory", "kv_codec": "fp8"}
    config = ServeConfig.model_validate({"model": model, "prefill": {}, "decode": section})
    (found,) = (finding for finding in check_settings(config, CPU) if finding.subject == "transport")
    assert found.grade is Grade.WARNING
    assert found.text == "decode.kv_codec is fp8, and KV in shared memory is copied as it is"


@pytest.mark.parametrize(("http", "grpc"), [("127.0.0.1:8123", "127.0.0.1:8123"), ("0.0.0.0:8123", "127.0.0.1:8123")])
def test_one_address_for_two_things(model: Path, http: str, grpc: str) -> None:
    config = ServeConfig.model_validate(
        {"model": model, "router": {"http": http, "grpc": grpc, "allow_anonymous": True}}
    )
    first = next(iter(check_ports(config)))
    assert first.grade is Grade.FAILED
    assert first.text == f"router.http and router.grpc are both {grpc}"
    assert "different ports" in first.advice


def test_folders_for_the_files_of_a_run(tmp_path: Path) -> None:
    fine = StateFolders(tmp_path / "state", tmp_path / "state" / "logs", tmp_path / "state" / "clusters")
    assert [finding.grade for finding in check_folders(fine, Path("/tmp/tandem-0"))] == [Grade.OK]
    (tmp_path / "file").write_text("")
    blocked = StateFolders(tmp_path / "file" / "below", tmp_path, tmp_path)
    (finding,) = check_folders(blocked, Path("/tmp/tandem-0"))
    assert finding.grade is Grade.FAILED
    assert finding.advice == "set TANDEM_STATE_DIR to a folder where you may write"
    (finding,) = check_folders(fine, Path("/tmp") / ("x" * 60) / "tandem-0")
    assert finding.grade is Grade.FAILED
    assert "set TMPDIR to a folder whose path is shorter by" in finding.advice


def test_memory_of_gpus_is_not_this_machines(model: Path) -> None:
    """Pools and weights of instances on GPUs are in the GPUs."""
    large = {"engine": {"kv_memory": "60GiB"}}
    config = ServeConfig.model_validate({"model": model, "prefill": large, "decode": large})
    assert check_memory(config, CPU, available_bytes=8 << 30).text.startswith("120.0 GiB of KV pools")
    found = check_memory(config, GPU, available_bytes=8 << 30)
    assert (found.grade, found.text) == (Grade.OK, "all instances are on GPUs; 8.0 GiB available here")
    on_both = {"model": model, "prefill": large, "decode": {"engine": {"kv_memory": "60GiB", "device": "cpu"}}}
    found = check_memory(ServeConfig.model_validate(on_both), GPU, available_bytes=8 << 30)
    assert found.grade is Grade.FAILED
    assert found.text.startswith("60.0 GiB of KV pools")
    assert found.advice == "lower decode.engine.kv_memory, or run fewer instances"
