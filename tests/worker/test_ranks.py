"""Instances of several ranks, in real processes, compute what one rank and transformers compute."""

import contextlib
import itertools
import random
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import SystemClock
from tandem.core.errors import InternalError, TandemError
from tandem.core.instance_section import EngineSection
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.core.session import PrefillFinished, Role, Submit, TokenFrame
from tandem.engine.collectives.interface import RankLostError
from tandem.engine.engine import Engine
from tandem.engine.step import SampleRequest, SequenceSlice, StepHandle, StepOutput
from tandem.kv_transfer.places import Places
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.remote_pool import RemotePool, view_over
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint
from tandem.scheduling.budget import role_budget
from tandem.worker.engine_setup import load_worker_engine
from tandem.worker.loop import InstanceLoop
from tandem.worker.loop_messages import SendEvent, SubmitAttempt
from tandem.worker.ranks import group
from tandem.worker.ranks.follower import loaded_rank
from tandem.worker.ranks.group import RankGroup
from tests.engine.driver import Driver
from tests.worker.loop_turn import turn

VOCABULARY = 323  # a prime: no tp divides it
NUM_NEW_TOKENS = 10
TOLERANCE = 1e-4  # of a log-probability: sums in another order, in float32


def checkpoint(folder: Path, family: str, **sizes: int) -> Path:
    shape = {
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family == "opt" else 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
    }
    return write_random_checkpoint(folder / family, CheckpointShape(family=family, **{**shape, **sizes}), seed=5)


def section(tp: int = 1, pp: int = 1, kv_memory: int = 2 << 20) -> EngineSection:
    return EngineSection(device="cpu", threads=1, kv_memory=kv_memory, dtype="float32", tp=tp, pp=pp)


@contextlib.contextmanager
def running_with_pools(
    model: Path, tp: int = 1, pp: int = 1, kv_memory: int = 2 << 20
) -> Iterator[tuple[Engine, Sequence[SharedPool]]]:
    with running_ranks(model, tp, pp, kv_memory) as (engine, pools, _):
        yield engine, pools


@contextlib.contextmanager
def running_ranks(
    model: Path, tp: int = 1, pp: int = 1, kv_memory: int = 2 << 20
) -> Iterator[tuple[Engine, Sequence[SharedPool], RankGroup | None]]:
    settings = section(tp, pp, kv_memory)
    lost: list[TandemError] = []
    ranks = RankGroup(model, settings, lost.append) if tp * pp > 1 else None
    if ranks is not None:
        ranks.start()
    try:
        engine, all_pools = load_worker_engine(model, settings, ranks)
        pools = [pool for pool in all_pools if isinstance(pool, SharedPool)]
        yield engine, pools, ranks
        engine.close()
        for pool in pools:
            pool.close()
    finally:
        if ranks is not None:
            ranks.close()
    assert lost == []


@contextlib.contextmanager
def running(model: Path, tp: int = 1, pp: int = 1, kv_memory: int = 2 << 20) -> Iterator[Engine]:
    with running_with_pools(model, tp, pp, kv_memory) as (engine, _):
        yield engine


def prompts() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (1, 3, 40, 200, 17)]


def greedy(engine: Engine) -> tuple[list[list[int]], torch.Tensor]:
    """Tokens, and the log-probabilities of each drawn one and of the four likeliest [tokens, 5]. In chunks of 64
    tokens, all together."""
    driver = Driver(engine)
    sequences = [
        driver.add(prompt, NUM_NEW_TOKENS, SamplingParams(temperature=0.0, logprobs=4)) for prompt in prompts()
    ]
    tokens = driver.run(sequences, chunk_tokens=64)
    entries = [token.logprob for sequence in sequences for token in sequence.drawn if token.logprob is not None]
    return tokens, torch.tensor([[entry.logprob, *(score for _, score in entry.top)] for entry in entries])


def greedy_at_once(engine: Engine) -> list[list[int]]:
    """Tokens of the same prompts as an instance's loop computes them: with a step in each stage."""
    budget = role_budget(Role.COLOCATED, max_batch=64, max_queue=64, max_batch_tokens=64)
    loop = InstanceLoop(engine, budget, SystemClock(), prefix_cache=False)
    for number, prompt in enumerate(prompts()):
        sampling = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(str(number), tuple(prompt), sampling)
        loop.apply(SubmitAttempt(AttemptId(0, number), Submit(number, request)))
    tokens: list[list[int]] = [[] for _ in prompts()]
    while any(len(each) < NUM_NEW_TOKENS for each in tokens):
        for event in turn(loop):
            match event:
                case SendEvent(_, PrefillFinished() as finished):
                    tokens[finished.handle].append(finished.token.token_id)
                case SendEvent(_, TokenFrame(items)):
                    for item in items:
                        tokens[item.handle] += [token.token_id for token in item.tokens]
    return tokens


@torch.inference_mode()
def reference(model: Path) -> list[list[int]]:
    transformer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = []
    for prompt in prompts():
        token_ids = torch.tensor([prompt])
        output = transformer.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


SHAPES = [(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "opt"]
IN_GATE = [("opt", (1, 2))]


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        pytest.param(*case, marks=() if case in IN_GATE else pytest.mark.slow)
        for case in itertools.product(FAMILIES, SHAPES)
    ],
)
def test_tokens_are_those_of_one_rank_and_of_transformers(family: str, shape: tuple[int, int], tmp_path: Path) -> None:
    model = checkpoint(tmp_path, family)
    expected = reference(model)
    with running(model) as engine:
        tokens, logprobs = greedy(engine)
        assert tokens == expected
    with running(model, *shape) as engine:
        tokens, of_ranks = greedy(engine)
        assert tokens == expected
        assert greedy_at_once(engine) == expected
        torch.testing.assert_close(of_ranks, logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_kv_of_a_rank_whose_memory_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a GPU: rank 0 reads the same KV over a connection, and the rank goes on with what rank 0 writes."""
    model = checkpoint(tmp_path, "llama")
    prompt, next_token = [5, 9, 200, 31, 8] * 10, 17
    block_ids, others = [3, 1, 4, 2], [5, 8, 6, 7]

    def kv_of(engine: Engine, pool: SharedPool | RemotePool, block_ids: Sequence[int]) -> torch.Tensor:
        layout = engine.layout.pool_of(1)
        view = view_over(pool.tensor if isinstance(pool, SharedPool) else pool, layout)
        kv = torch.empty(2 * layout.num_layers * len(block_ids) * layout.segment_bytes, dtype=torch.uint8)
        view.take_blocks(range(layout.num_layers), block_ids, kv)
        return kv

    def token_after(engine: Engine) -> int:
        sample = SampleRequest(SamplingParams(temperature=0.0), len(prompt) + 1, (), len(prompt))
        part = SequenceSlice([next_token], len(prompt), block_ids, sample)
        token = engine.collect(engine.launch([part])).tokens[0]
        assert token is not None
        return token.token_id

    with running_ranks(model, tp=2) as (engine, pools, _):
        engine.step([SequenceSlice(prompt, 0, block_ids)])
        expected = kv_of(engine, pools[1], block_ids)
        own = pools[0].tensor.clone()
        token_id = token_after(engine)
    monkeypatch.setattr(RankGroup, "_maps_pools", lambda _: False)
    settings, lost = section(tp=2), list[TandemError]()
    ranks = RankGroup(model, settings, lost.append)
    ranks.start()
    try:
        engine, (first, second) = load_worker_engine(model, settings, ranks)
        assert isinstance(second, RemotePool)
        layout = engine.layout.pool_of(1)
        assert not kv_of(engine, second, block_ids).any()
        shape = (layout.num_layers, 2, len(block_ids), layout.num_kv_heads, 1, -1)
        view = view_over(second, layout)
        view.put(
            slice(0, layout.num_layers), Places(torch.tensor(block_ids), None), expected.view(view.word).view(shape)
        )
        assert isinstance(first, SharedPool)
        first.tensor.copy_(own)
        assert token_after(engine) == token_id
        engine.step([SequenceSlice(prompt, 0, others)])
        assert torch.equal(kv_of(engine, second, others), expected)
        engine.close()
        first.close()
        second.close()
    finally:
        ranks.close()
    assert lost == []


@pytest.mark.slow
def test_what_a_later_stage_reports_is_written(tmp_path: Path) -> None:
    """All blocks of the steps before, and of the last step the layers that it reports."""
    with running_ranks(checkpoint(tmp_path, "llama"), tp=2, pp=2) as (engine, pools, ranks):
        assert ranks is not None
        layout = engine.layout
        of_rank = [pool.tensor.view(torch.float32).view(layout.pool_of(rank).shape) for rank, pool in enumerate(pools)][
            layout.tp :
        ]
        num_layers = layout.layers_per_stage[1]
        block_ids, chunk = list(range(1, 25)), [3] * layout.block_size
        seen = set()
        for _ in range(5):
            first = engine.next_step
            computed = threading.Thread(target=_compute_chunks, args=(engine, block_ids, chunk))
            computed.start()
            while computed.is_alive():
                ((step, layers),) = ranks.later_stages()
                if step < first:
                    continue
                seen.add((step - first, layers))
                for number, block in enumerate(block_ids[: step - first + 1]):
                    done = num_layers if number < step - first else layers
                    assert all(bool(pool[:done, :, block].any(-1).all()) for pool in of_rank), (step - first, layers)
            computed.join()
            for pool in of_rank:
                pool[:, :, block_ids] = 0
        assert len(seen) > 3


def _compute_chunks(engine: Engine, block_ids: Sequence[int], chunk: Sequence[int]) -> None:
    for number in range(len(block_ids)):
        engine.step([SequenceSlice(chunk, number * engine.layout.block_size, block_ids[: number + 1])])
    engine.settle()


@pytest.mark.slow
def test_no_stage_computes_a_step_after_it_is_settled(tmp_path: Path) -> None:
    """Chunks of prompts draw no token, so rank 0 waits for nobody; but a transfer may be given their blocks next."""
    with running_with_pools(checkpoint(tmp_path, "llama"), pp=3) as (engine, pools):
        layout = engine.layout
        block_ids = list(range(1, 25))
        chunk = [3] * layout.block_size
        for _ in range(5):
            for number in range(len(block_ids)):
                blocks = block_ids[: number + 1]
                engine.step([SequenceSlice(chunk, number * layout.block_size, blocks)])
            engine.settle()
            for rank, pool in enumerate(pools):
                blocks_of_pool = pool.tensor.view(torch.float32).view(layout.pool_of(rank).shape)[:, :, block_ids]
                assert bool(blocks_of_pool.any(-1).all()), f"rank {rank} has not written all blocks"
                pool.tensor.view(torch.float32).view(layout.pool_of(rank).shape)[:, :, block_ids] = 0
        engine.settle()  # without a step: it does not wait
        tokens, _ = greedy(engine)
    with running(checkpoint(tmp_path, "llama")) as engine:
        assert greedy(engine)[0] == tokens


@pytest.mark.slow
def test_a_layer_is_announced_when_all_ranks_have_written_it(tmp_path: Path) -> None:
    """Also the last layer of a chunk that draws no token."""
    with running_with_pools(checkpoint(tmp_path, "llama"), tp=2) as (engine, pools):
        layout = engine.layout
        views = [pool.tensor.view(torch.float32).view(layout.pool_of(rank).shape) for rank, pool in enumerate(pools)]
        draw = random.Random(4)
        block_ids = list(range(1, 1 + 4 * layout.num_blocks // 5))
        num_tokens = min(len(block_ids) * layout.block_size, 256)
        block_ids = block_ids[: num_tokens // layout.block_size]
        for number in range(300):
            announced: dict[tuple[int, int], torch.Tensor] = {}

            def copy(num_layers: int, announced: dict[tuple[int, int], torch.Tensor] = announced) -> None:
                for rank, view in enumerate(views):
                    announced[num_layers - 1, rank] = view[num_layers - 1][:, block_ids].clone()

            token_ids = [draw.randrange(VOCABULARY) for _ in range(num_tokens)]
            engine.collect(engine.launch([SequenceSlice(token_ids, 0, block_ids)], copy))
            for (layer, rank), kv in announced.items():
                assert torch.equal(kv, views[rank][layer][:, block_ids]), f"step {number}, rank {rank}, layer {layer}"


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("shape", [(1, 2), (1, 3)], ids=str)
def test_ranks_do_not_deadlock(shape: tuple[int, int], tmp_path: Path) -> None:
    """Hidden states of each step and its logits are more than a mailbox takes."""
    rows, length, vocabulary = 40, 128, 20_000
    sizes = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 3, "vocab_size": vocabulary}
    model = checkpoint(tmp_path, "llama", **sizes)
    draw = random.Random(5)
    batches = [[[draw.randrange(vocabulary) for _ in range(length)] for _ in range(rows)] for _ in range(5)]
    blocks_each = length // section().block_size

    def step(prompts: list[list[int]]) -> list[SequenceSlice]:
        """Four prompts are scored, too."""
        request = SampleRequest(SamplingParams(temperature=0.0), length, (), length)
        return [
            SequenceSlice(
                prompt,
                0,
                range(row * blocks_each, (row + 1) * blocks_each),
                request,
                prompt_logprobs=0 if row < 4 else None,
            )
            for row, prompt in enumerate(prompts)
        ]

    def tokens_of(output: StepOutput) -> list[int]:
        return [token.token_id for token in output.tokens if token is not None]

    with running(model, kv_memory=64 << 20) as engine:
        expected = [tokens_of(engine.step(step(batch))) for batch in batches]
    with running(model, *shape, kv_memory=64 << 20) as engine:
        under_way: deque[StepHandle] = deque()
        outputs = []
        for batch in batches:
            under_way.append(engine.launch(step(batch)))
            if len(under_way) == engine.num_stages:
                outputs.append(engine.collect(under_way.popleft()))
        outputs += [engine.collect(handle) for handle in under_way]
    assert [tokens_of(output) for output in outputs] == expected


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a flipped bit", "another step's number"])
def test_a_damaged_step_ends_the_instance(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank computes it, and the waits of all ranks end."""
    encode = group.encode_step
    lost = threading.Event()
    ranks = RankGroup(checkpoint(tmp_path, "llama"), section(pp=2), lambda _: lost.set())
    ranks.start()
    try:
        engine, _ = load_worker_engine(tmp_path / "llama", section(pp=2), ranks)

        def damaged(number: int, slices: Sequence[SequenceSlice]) -> bytes:
            if damage == "a flipped bit":
                data = bytearray(encode(number, slices))
                data[len(data) // 2] ^= 1
                return bytes(data)
            return encode(number + 1, slices)

        monkeypatch.setattr(group, "encode_step", damaged)
        request = SampleRequest(SamplingParams(temperature=0.0), 3, (), 3)
        with pytest.raises(RankLostError):
            engine.step([SequenceSlice([1, 2, 3], 0, [1], request)])
        assert lost.wait(10)
        with pytest.raises(InternalError, match="step"):
            ranks.wait_ready(loaded_rank(engine))
        engine.close()
    finally:
        ranks.close()


@pytest.mark.slow
def test_without_a_compiler_ranks_meet_over_gloo_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path, "qwen3")
    with running(model) as engine:
        expected, _ = greedy(engine)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("PATH", "")
    with running(model, 2, 2) as engine:
        assert engine.ops_name == "torch"
        assert greedy(engine)[0] == expected
        assert list(temporary.iterdir()) == [], "what is there would stay when a rank is killed"
