"""What do the codecs of KV cost and bring: bytes, time, and what a model says next?

*Quality*: over held-out files of the built-in model's training data, the change of the next-token distribution when the
KV of a prompt has gone through a codec (`codec_quality.py`). The model is small: larger ones have wider heads and
outliers of their own.

*Time*: encoding and decoding in one thread, by native code and by torch, in time of the processor; and hand-overs of 64
MiB of KV between two processes over gloo on this host, whose loopback is faster than most networks. These wall times
need a quiet machine; the load is printed first.

    python -m bench.kv_transfer.codecs
    python -m bench.kv_transfer.codecs --skip time --prompts 512 --texts 40

Over a network of 1 Gbit/s, as root:

    unshare -n bash -c "ip link set lo up; tc qdisc add dev lo root tbf rate 1gbit burst 1m latency 100ms;
        python -m bench.kv_transfer.codecs --skip quality"
"""

import argparse
import asyncio
import json
import os
import sysconfig
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.kv_transfer.codec_quality import measure_quality
from bench.kv_transfer.measure import fetch_s, served_source
from tandem.core.kv_codec import KvCodec
from tandem.core.kv_layout import KvLayout
from tandem.core.transfer import Transport
from tandem.engine.ops.kv_codec import NativeKvCodes
from tandem.kv_transfer.block_coder import BlockCoder, KvCodes
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.receiver import KvReceiver
from tandem.kv_transfer.torch_codec import TorchKvCodes

_MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-python"
_CODED = (KvCodec.FP8, KvCodec.INT8, KvCodec.INT4)
_FOLLOWING = 64  # tokens after a prompt that are compared
_LAYOUT = KvLayout(28, 160, 4, 16, 128, "bfloat16", "bench")  # a model with 28 layers and 4 KV heads
_NUM_BLOCKS = 73  # 64 MiB of KV


def _held_out_texts(num_tokens: int, most: int) -> list[torch.Tensor]:
    """Windows of that many tokens, of files of this interpreter that the model has not been trained on."""
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    names = json.loads((_MODEL / "training.json").read_text())["held_out_by_file"]
    folder = Path(sysconfig.get_path("stdlib"))
    windows: list[torch.Tensor] = []
    for name in names:
        ids = torch.tensor(tokenizer.encode((folder / name).read_text().expandtabs(8).strip() + "\n"))
        windows += [ids[at : at + num_tokens] for at in range(0, len(ids) - num_tokens + 1, num_tokens)]
    return windows[:most]


def _print_quality(prompts: list[int], most: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(_MODEL, dtype=torch.float32)
    for num_prompt in prompts:
        texts = _held_out_texts(num_prompt + _FOLLOWING, most)
        print(f"\n{_MODEL.name}, fp32, {len(texts)} prompts of {num_prompt} tokens, {_FOLLOWING} tokens after each")
        print(f"{'codec':>6} {'bytes':>7} {'KL':>9} {'KL p99':>9} {'top-1':>8} {'loss':>9}")
        for quality in measure_quality(model, texts, num_prompt, _CODED, NativeKvCodes()):
            print(
                f"{quality.codec.value:>6} {quality.wire_share:>7.1%} {quality.kl_mean:>9.2e} {quality.kl_p99:>9.2e}"
                f" {quality.top1_agreement:>8.2%} {quality.nats_more:>+9.1e}",
                flush=True,
            )


def _print_coding(repetitions: int) -> None:
    """One chunk, as a transfer has it, in time of the processor."""
    layers = 2
    print(f"\n{'codec':>6} {'dtype':>9} {'by':>7} {'encode':>12} {'decode':>12}   of KV in memory, one thread")
    for dtype in ("bfloat16", "float32"):
        layout = KvLayout(layers, 32, 4, 16, 128, dtype, "bench")
        raw = torch.randn(layout.shape).to(getattr(torch, dtype)).view(-1).view(torch.uint8)
        for codec in _CODED:
            for name, codes in (("native", NativeKvCodes()), ("torch", TorchKvCodes())):
                encode_s, decode_s = _coding_s(BlockCoder(codec, layout, codes), raw, layout, repetitions)
                speeds = (f"{raw.nbytes / seconds / 1e9:>7.2f} GB/s" for seconds in (encode_s, decode_s))
                print(f"{codec.value:>6} {dtype:>9} {name:>7}", *speeds, flush=True)


def _coding_s(coder: BlockCoder, raw: torch.Tensor, layout: KvLayout, repetitions: int) -> tuple[float, float]:
    coded = torch.empty(layout.num_layers * layout.num_blocks * coder.layer_block_bytes, dtype=torch.uint8)
    arrived = torch.empty_like(raw)
    encode_s, decode_s = [], []
    for _ in range(repetitions):
        started_s = time.thread_time()
        coder.encode(raw, coded, layout.num_layers)
        encoded_s = time.thread_time()
        coder.decode(coded, arrived, layout.num_layers)
        encode_s.append(encoded_s - started_s)
        decode_s.append(time.thread_time() - encoded_s)
    return median(encode_s), median(decode_s)


async def _print_hand_overs(repetitions: int) -> None:
    """All codecs take turns."""
    pool, codes = SharedPool.create(_LAYOUT.pool_bytes), NativeKvCodes()
    receivers = {codec: _receiver(codec, pool, codes) for codec in KvCodec}
    seconds: dict[KvCodec, list[float]] = {codec: [] for codec in KvCodec}
    try:
        async with served_source(_LAYOUT) as source:
            for i in range(repetitions + 1):
                for codec, receiver in receivers.items():
                    seconds[codec].append(await fetch_s(receiver, source, _LAYOUT, _NUM_BLOCKS, (2 * i + 1, 2 * i + 2)))
        print(f"\nhand-over of {_NUM_BLOCKS * _LAYOUT.block_bytes / 2**20:.0f} MiB (bf16) over gloo")
        for codec, receiver in receivers.items():
            (stats,) = receiver.links()
            handover_s = median(seconds[codec][1:])  # the first is a warm-up
            share = stats.wire_bytes / stats.transfer_bytes
            print(f"{codec.value:>6} {share:>7.1%} of the bytes {handover_s * 1e3:>8.1f} ms", flush=True)
    finally:
        for receiver in receivers.values():
            await receiver.close()
        pool.close()


def _receiver(codec: KvCodec, pool: SharedPool, codes: KvCodes) -> KvReceiver:
    name = f"bench-{codec.value}"
    return KvReceiver(_LAYOUT, [pool.tensor], name, transport=Transport.GLOO, codec=codec, codes=codes)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_transfer.codecs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--skip", choices=("quality", "time"), help="one of the two halves")
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1024], help="tokens of a prompt")
    parser.add_argument("--texts", type=int, default=60, help="prompts of each length, at most")
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    load = os.getloadavg()
    print(f"load average {load[0]:.1f} {load[1]:.1f} {load[2]:.1f} on {os.cpu_count()} cores", flush=True)
    torch.set_num_threads(1)
    if options.skip != "quality":
        _print_quality(options.prompts, options.texts)
    if options.skip != "time":
        _print_coding(options.repetitions)
        asyncio.run(_print_hand_overs(options.repetitions))


if __name__ == "__main__":
    main()
