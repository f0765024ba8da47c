"""A small checkpoint's text files, and a router's HTTP side on a scripted generator, for tests to share."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx
import openai
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tandem.core.access import AccessControl, OpenAccess
from tandem.core.clock import SystemClock
from tandem.core.completion import SamplingDefaults
from tandem.core.errors import TandemError
from tandem.core.request import GenerationRequest
from tandem.core.router_section import RouterSection
from tandem.router.http_app import HttpApp
from tandem.router.http_server import HttpServer
from tandem.router.text_service import TextService
from tandem.router.tokenizer import TextTokenizer
from tandem.wire.server_tls import ServerTls
from tests.router.text_fakes import ScriptedGenerator

MODEL = "tiny"
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_checkpoint(folder: Path) -> Path:
    """A byte-level BPE tokenizer over this file's text, with a chat template; no weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(keepends=True), trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 768, "eos_token_id": 0}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    return folder


@dataclass
class Refusals:
    """Counts requests that were refused before the generator got them; also the metrics page."""

    errors: list[TandemError] = field(default_factory=list)

    def refused(self, error: TandemError) -> None:
        self.errors.append(error)

    def render(self) -> bytes:
        return f"refused_total {len(self.errors)}\n".encode()


@dataclass
class Front:
    """A running HTTP side on a scripted generator. `say` sets the text of its responses."""

    tokenizer: TextTokenizer
    raw_tokenizer: Tokenizer
    generator: ScriptedGenerator
    refusals: Refusals
    service: TextService
    server: HttpServer
    url: str = ""

    def reset(self) -> None:
        """Restore the initial state. Nothing may be running."""
        assert not self.generator.running
        vars(self.generator).update(vars(ScriptedGenerator(echo_script)))
        self.refusals.errors.clear()

    def ids(self, text: str) -> list[int]:
        return list(self.raw_tokenizer.encode(text, add_special_tokens=False).ids)

    def say(self, text: str, *, then_eos: bool = True) -> None:
        """Respond to every request with that text; then end, or repeat a dot for ever."""
        ids = self.ids(text)
        ending = [min(self.tokenizer.eos_token_ids)] if then_eos else []
        self.generator.script = lambda _: itertools.chain(ids, ending, itertools.repeat(self.ids(".")[0]))

    def client(self, **options: object) -> httpx.AsyncClient:
        """Plain HTTP; loading certificates would take longer than the tests."""
        return httpx.AsyncClient(base_url=self.url, timeout=20, verify=False, **options)  # type: ignore[arg-type]

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    async def wait_until_idle(self) -> None:
        async with asyncio.timeout(5.0):
            while self.generator.running:  # noqa: ASYNC110 - seen from outside, as a client would
                await asyncio.sleep(0.005)


def echo_script(request: GenerationRequest) -> Iterator[int]:
    """Repeats the prompt: a response that depends on the request."""
    return itertools.cycle([token_id for token_id in request.token_ids if token_id > 2] or [5])


@asynccontextmanager
async def serve_front(
    tokenizer: TextTokenizer,
    raw_tokenizer: Tokenizer,
    settings: RouterSection | None = None,
    access: AccessControl = OpenAccess(),
    tls: ServerTls | None = None,
    defaults: SamplingDefaults | None = None,
) -> AsyncIterator[Front]:
    generator = ScriptedGenerator(echo_script)
    refusals = Refusals()
    random = Random(1)
    settings = (settings or RouterSection(max_body=1 << 20)).model_copy(update={"http": "127.0.0.1:0"})
    service = TextService(
        generator=generator,
        tokenizer=tokenizer,
        model=MODEL,
        random=random,
        settings=settings,
        on_refusal=(refusals.refused,),
        defaults=defaults or SamplingDefaults(),
    )
    app = HttpApp(
        service=service,
        tokenizer=tokenizer,
        settings=settings,
        render_metrics=refusals.render,
        clock=SystemClock(),
        random=random,
        access=access,
    )
    server = HttpServer(app, settings, tls, stop_timeout_s=1.0)
    url = f"{'http' if tls is None else 'https'}://{await server.start()}"
    front = Front(tokenizer, raw_tokenizer, generator, refusals, service, server, url)
    try:
        yield front
    finally:
        await server.stop()
