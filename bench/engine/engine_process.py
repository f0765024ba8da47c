"""Runs one engine, which reads orders as JSON lines from stdin; `bench.engine` starts it.

This file imports nothing of Tandem at its top: the interpreter may belong to an environment without Tandem.

    {"do": "prefill", "tokens": 512, "seed": 1}                       -> {"seconds": 0.9}, one prompt, one output token
    {"do": "decode", "batch": 8, "prompt": 224, "steps": 64}          -> {"seconds": 2.1}, without the prefill
    {"do": "limits"}                                                  -> {"bytes_per_s": ..., "flops_per_s": ...}
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

_LOWEST_ID, _HIGHEST_ID = 10, 8000  # ids in the vocabulary of every model here, without special tokens
_MAX_LEN = 4096
_MAX_BATCH = 64


def random_prompts(batch: int, length: int, seed: int) -> list[list[int]]:
    draw = random.Random(f"{seed} {length}")  # no prompt is a prefix of another, which would be found in a cache
    return [[draw.randrange(_LOWEST_ID, _HIGHEST_ID) for _ in range(length)] for _ in range(batch)]


class EngineRunner(Protocol):
    """A loaded engine."""

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a new prompt to its first token."""
        ...

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of `steps` steps, each with one token of every sequence, without prefill."""
        ...


class TandemRunner:
    """Tandem's engine alone, without worker and router."""

    def __init__(self, model: Path, dtype: str, threads: int, ops: str) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        import torch

        from tandem.engine.config import EngineConfig
        from tandem.engine.engine import load_engine

        config = EngineConfig(model, dtype=dtype, device="cpu", num_threads=threads, kv_memory_bytes=2 << 30, ops=ops)
        self._engine = load_engine(config)
        self._engine.warm_up()
        pool = self._engine.pool  # instead of a prefill: the speed of decode does not depend on the values
        pool[:] = torch.randn(pool.shape[2:])

    def prefill(self, prompt: list[int]) -> float:
        started_s = time.perf_counter()
        self._step([prompt], [0])
        return time.perf_counter() - started_s

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        last = [prompt[-1] for prompt in prompts]
        begin = len(prompts[0])
        started_s = time.perf_counter()
        for step in range(steps):
            last = self._step([[token] for token in last], [begin + step] * len(last))
        return time.perf_counter() - started_s

    def _step(self, token_ids: Sequence[Sequence[int]], starts: Sequence[int]) -> list[int]:
        """A greedy step. Sequence i owns the i-th part of the pool."""
        from tandem.core.request import SamplingParams
        from tandem.engine.step import SampleRequest, SequenceSlice

        blocks_each = self._engine.layout.num_blocks // _MAX_BATCH
        greedy = SamplingParams(temperature=0.0)
        slices = []
        for index, (new, start) in enumerate(zip(token_ids, starts, strict=True)):
            table = range(index * blocks_each, (index + 1) * blocks_each)
            needed = self._engine.layout.blocks_for(start + len(new))
            request = SampleRequest(greedy, start + len(new), (), start + len(new))
            slices.append(SequenceSlice(new, start, table[:needed], request))
        tokens = self._engine.step(slices).tokens
        assert all(token is not None for token in tokens)
        return [token.token_id for token in tokens if token is not None]


class TransformersRunner:
    """The `generate` loop of Hugging Face transformers."""

    def __init__(self, model: Path, dtype: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        self._torch, self._transformers = torch, transformers
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()

    def prefill(self, prompt: list[int]) -> float:
        return self._token_times([prompt], 1)[1]

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        # Every row gets a copy of the first prompt's cache, so that only one has to be computed; their tokens differ.
        inputs = self._torch.tensor([prompts[0][:-1]])
        with self._torch.inference_mode():
            cache = self._model(inputs, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(prompts))
        times = self._token_times([prompts[0][:-1] + prompt[-1:] for prompt in prompts], steps + 1, cache)
        return times[-1] - times[1]

    def _token_times(self, prompts: list[list[int]], num_tokens: int, cache: Any = None) -> list[float]:
        """Seconds since the call, at its start and after each token."""
        times = [time.perf_counter()]

        class Stopwatch(self._transformers.StoppingCriteria):  # type: ignore[name-defined, misc]
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                times.append(time.perf_counter())
                return input_ids.new_zeros(len(input_ids), dtype=bool)

        inputs = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            self._model.generate(
                inputs,
                attention_mask=self._torch.ones_like(inputs),
                past_key_values=cache,
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=self._transformers.StoppingCriteriaList([Stopwatch()]),
            )
        return [moment - times[0] for moment in times]


class VllmRunner:
    """vLLM's offline engine. Prefix caching is on: a repeated decode measurement does not compute its prompts again.
    Prompts of prefill measurements are always new."""

    def __init__(self, model: Path, dtype: str, threads: int) -> None:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

        del threads  # given by the environment
        self._sampling_params = SamplingParams
        self._llm = LLM(
            model=str(model),
            dtype=dtype,
            max_model_len=_MAX_LEN,
            max_num_seqs=_MAX_BATCH,
            max_num_batched_tokens=2 * _MAX_LEN,  # the prompts of a whole batch in one step
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self._next_id = 0

    def prefill(self, prompt: list[int]) -> float:
        started_s = time.perf_counter()
        self._add([prompt], 1)
        while self._llm.llm_engine.has_unfinished_requests():
            self._llm.llm_engine.step()
        return time.perf_counter() - started_s

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        self._add(prompts, steps + 4)  # a few more than measured, since sequences start in different steps
        counts: dict[str, int] = {}
        marks: dict[int, float] = {}
        while self._llm.llm_engine.has_unfinished_requests():
            for output in self._llm.llm_engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if len(counts) == len(prompts):
                marks.setdefault(min(counts.values()), time.perf_counter())
        return marks[steps + 2] - marks[2]

    def _add(self, prompts: list[list[int]], num_tokens: int) -> None:
        params = self._sampling_params(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            self._next_id += 1
            self._llm.llm_engine.add_request(str(self._next_id), {"prompt_token_ids": prompt}, params)


def limits(threads: int) -> dict[str, float]:
    """The machine's limits: bytes read from memory per second, and the better of torch's matrix rates."""
    import torch

    torch.set_num_threads(threads)

    def shortest_s(*tensors: torch.Tensor) -> float:
        times = []
        for _ in range(5):
            started_s = time.perf_counter()
            if len(tensors) == 1:
                tensors[0].sum()
            else:
                torch.nn.functional.linear(*tensors)
            times.append(time.perf_counter() - started_s)
        return min(times)

    memory, size = torch.ones(1 << 26), 1536
    rates = [
        2 * size**3 / shortest_s(*(torch.randn(2, size, size).to(t).unbind())) for t in (torch.float32, torch.bfloat16)
    ]
    return {"bytes_per_s": memory.nbytes / shortest_s(memory), "flops_per_s": max(rates)}


def _load(args: argparse.Namespace) -> EngineRunner | None:
    if args.engine in ("tandem", "tandem-torch"):
        return TandemRunner(
            args.model, args.dtype, args.threads, "torch" if args.engine == "tandem-torch" else "native"
        )
    if args.engine == "transformers":
        return TransformersRunner(args.model, args.dtype, args.threads)
    return VllmRunner(args.model, args.dtype, args.threads) if args.engine == "vllm" else None


def _execute(runner: EngineRunner | None, threads: int, order: dict[str, Any]) -> dict[str, float]:
    if order["do"] == "limits":
        return limits(threads)
    assert runner is not None
    if order["do"] == "prefill":
        return {"seconds": runner.prefill(random_prompts(1, order["tokens"], order["seed"])[0])}
    prompts = random_prompts(order["batch"], order["prompt"], order["batch"])
    return {"seconds": runner.decode(prompts, order["steps"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", required=True, choices=["tandem", "tandem-torch", "transformers", "vllm", "limits"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    # Libraries print to stdout; results have their own descriptor.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runner = _load(args)
    print(json.dumps({"ready": True}), file=results, flush=True)
    for line in sys.stdin:
        print(json.dumps(_execute(runner, args.threads, json.loads(line))), file=results, flush=True)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
