"""Checks of a serve file and its model: whether this machine allows what they ask for.

A check returns findings and never raises for a problem. It changes nothing.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tandem.core.clock import SystemClock
from tandem.core.config import ServeConfig
from tandem.core.errors import TandemError
from tandem.core.instance_section import EngineSection, InstanceSection
from tandem.core.model_spec import ModelSpec
from tandem.deploy.finding import Finding, Grade, gib
from tandem.deploy.machine import available_memory_bytes
from tandem.deploy.model_folder import check_model_folder, check_pairs, weight_bytes
from tandem.deploy.topology import Machine, uses_gpu

_MIN_BLOCKS = 2  # one for a prompt, one for its answer


def check_memory(
    config: ServeConfig, machine: Machine, available_bytes: int | None = None, running: ServeConfig | None = None
) -> Finding:
    """Compare the KV pools and weights of all instances on CPUs with the memory that is free now. Those on GPUs are in
    the memory of the GPUs. What instances of `running` have is not free now, and counts as theirs."""
    available = available_memory_bytes() if available_bytes is None else available_bytes
    on_cpu = _on_cpu(config, machine)
    if not on_cpu:
        return Finding("memory", Grade.OK, f"all instances are on GPUs; {gib(available)} available here")
    kv, weights = _memory_of(config, machine)
    if running is not None:
        kv, weights = (more - there for more, there in zip((kv, weights), _memory_of(running, machine), strict=True))
    more = " more" if running is not None else ""
    text = f"{gib(kv)}{more} of KV pools and {gib(weights)} of weights, {gib(available)} available"
    if kv + weights <= 0.9 * available:
        return Finding("memory", Grade.OK, text)
    settings = " and ".join(dict.fromkeys(f"{role}.engine.kv_memory" for role, _ in on_cpu))
    advice = f"lower {settings}, or run fewer instances"
    return Finding("memory", Grade.FAILED, text, advice)


def _on_cpu(config: ServeConfig, machine: Machine) -> list[tuple[str, InstanceSection]]:
    return [(role, section) for role, section in config.kinds if not uses_gpu(section.engine, machine)]


def _memory_of(config: ServeConfig, machine: Machine) -> tuple[int, int]:
    """Bytes of the KV pools and of the weights of all instances on CPUs."""
    sections = [section for _, section in _on_cpu(config, machine)]
    kv = sum(section.instances * section.engine.kv_memory for section in sections)
    return kv, sum(section.instances for section in sections) * weight_bytes(config.model)


def check_settings(config: ServeConfig, machine: Machine) -> Iterator[Finding]:
    """Settings that this machine or this model does not allow. Cheap: reads config.json only, and imports no torch.
    Nothing about a model that cannot be read, of which `check_checkpoint` tells."""
    try:
        spec = check_model_folder(config.model)
    except TandemError:
        return
    for role, section in config.kinds:
        yield from _section_findings(role, section, spec, machine)
    threads = sum(section.instances * section.engine.threads for _, section in config.kinds)
    if threads > machine.cores:
        text = f"{threads} threads of instances for {machine.cores} cores"
        yield Finding("threads", Grade.WARNING, text, "lower engine.threads, or set it to 0 to share the cores")


def _section_findings(role: str, section: InstanceSection, spec: ModelSpec, machine: Machine) -> Iterator[Finding]:
    engine = section.engine
    yield from _device_findings(role, section, machine)
    limit = spec.max_context_tokens
    if engine.max_model_len is not None and engine.max_model_len > limit:
        text = f"{role}.engine.max_model_len is {engine.max_model_len}, but the model's context has {limit} tokens"
        yield Finding("context", Grade.FAILED, text, f"set it to {limit} or less, or leave it out")
    block = spec.kv_bytes_per_token(_kv_number_bytes(engine, spec, machine)) * engine.block_size
    blocks = engine.kv_memory // block
    wanted = min(engine.max_model_len or limit, limit)
    memory_bytes = None if uses_gpu(engine, machine) else machine.memory_bytes
    if memory_bytes is not None and engine.kv_memory > memory_bytes:
        text = f"{role}.engine.kv_memory is {gib(engine.kv_memory)}, and this machine has {gib(memory_bytes)}"
        yield Finding("kv memory", Grade.FAILED, text, f"lower {role}.engine.kv_memory")
    elif blocks < _MIN_BLOCKS:
        text = (
            f"{role}.engine.kv_memory is {engine.kv_memory} bytes, which is room for {blocks} blocks of "
            f"{engine.block_size} tokens with {block} bytes each"
        )
        yield Finding("kv memory", Grade.FAILED, text, f"set it to {_MIN_BLOCKS * block} or more, for example 512MiB")
    elif blocks * engine.block_size < wanted:
        text = f"{role}.engine.kv_memory has room for {blocks * engine.block_size} of {wanted} tokens"
        yield Finding("kv memory", Grade.WARNING, text, "longer requests are refused; raise it to allow them")


def _device_findings(role: str, section: InstanceSection, machine: Machine) -> Iterator[Finding]:
    name, device = f"{role}.engine.device", section.engine.device
    on_gpu = uses_gpu(section.engine, machine)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        yield Finding("device", Grade.FAILED, f"{name} is {device}, which is no device", "use auto, cpu or cuda")
    elif device.startswith("cuda") and not machine.gpus:
        text = f"{name} is {device}, but this machine has no GPU"
        yield Finding("device", Grade.FAILED, text, f"set {name} to cpu or auto")
    elif device.startswith("cuda:") and device != "cuda:0":
        text = f"{name} is {device}, but each instance of `tandem serve` sees one GPU, the one that it is given"
        yield Finding("device", Grade.FAILED, text, f"set {name} to cuda; CUDA_VISIBLE_DEVICES says which GPUs to use")
    if role != "colocated" and section.engine.shape.num_ranks > 1 and on_gpu:
        text = (
            f"{role} instances have {section.engine.shape.num_ranks} GPUs each, and KV moves between single GPUs only"
        )
        yield Finding("device", Grade.FAILED, text, f"set {name} to cpu, or {role}.engine.tp and pp to 1")
    if section.engine.ops == "native" and on_gpu:
        text = f"{role}.engine.ops is native, but these kernels run on CPUs only"
        yield Finding("ops", Grade.FAILED, text, f"set {role}.engine.ops to auto, or {name} to cpu")
    if section.transport == "nccl" and not on_gpu:
        text = f"{role}.transport is nccl, which moves KV between GPUs only"
        yield Finding("transport", Grade.FAILED, text, f"set {role}.transport to auto")
    if section.transport == "shared_memory" and section.kv_codec != "none":
        text = f"{role}.kv_codec is {section.kv_codec}, and KV in shared memory is copied as it is"
        yield Finding("transport", Grade.WARNING, text, f"set {role}.kv_codec to none, or {role}.transport to auto")


def _kv_number_bytes(engine: EngineSection, spec: ModelSpec, machine: Machine) -> int:
    """As `engine.device.choose_dtype`, which needs torch."""
    if engine.dtype != "auto":
        return 4 if engine.dtype == "float32" else 2
    if spec.dtype == "float32" or not (uses_gpu(engine, machine) or machine.multiplies_bf16):
        return 4
    return 2


def check_checkpoint(config: ServeConfig) -> Iterator[Finding]:
    """Whether the model's files are complete and of a supported family. Reads the files' headers and hashes."""
    try:
        check_pairs(config, check_model_folder(config.model))
        from tandem.engine.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(config.model)
    except TandemError as error:
        yield Finding(
            "model", Grade.FAILED, error.message, "choose another model with --set model=FOLDER, or repair this one"
        )
        return
    spec = checkpoint.spec
    text = f"{config.served_name}: {spec.architecture}, {spec.num_parameters / 1e6:.1f} M parameters"
    yield Finding("model", Grade.OK, f"{text}, context {spec.max_context_tokens}")
    try:
        from tandem.router.sampling_defaults import load_sampling_defaults
        from tandem.router.tokenizer import TextTokenizer

        with ThreadPoolExecutor(1) as executor:
            TextTokenizer.load(
                config.model,
                clock=SystemClock(),
                executor=executor,
                parse_control_tokens=config.router.parse_control_tokens,
            )
        load_sampling_defaults(config.model, config.router.generation_config)
    except TandemError as error:
        advice = "download the tokenizer's files from the model's publisher again"
        yield Finding("tokenizer", Grade.FAILED, error.message, advice)
    else:
        yield Finding("tokenizer", Grade.OK, "tokenizer.json")
