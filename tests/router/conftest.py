"""Fixtures of the text side: a small tokenizer, and a running front."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop
from tokenizers import Tokenizer

from tandem.core.clock import SystemClock
from tandem.router.tokenizer import TextTokenizer
from tests.router.front import Front, serve_front, write_checkpoint


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Servers run on the router's own event loop: transports differ in what they do at the end of a stream."""
    if item.path.name.startswith("test_http"):
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path, executor: ThreadPoolExecutor) -> TextTokenizer:
    return TextTokenizer.load(checkpoint, clock=SystemClock(), executor=executor)


@pytest.fixture(scope="session")
def raw_tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_front(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> AsyncIterator[Front]:
    async with serve_front(tokenizer, raw_tokenizer) as front:
        yield front


@pytest.fixture
def front(module_front: Front) -> Front:
    """One server per module, since uvicorn takes its time to end. Tests must run on the module's event loop."""
    module_front.reset()
    return module_front
