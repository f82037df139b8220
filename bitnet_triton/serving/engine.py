"""Between transformers' handlers of requests and its continuous batching.

transformers has such a part too (``CBGenerateManager``). It settles sampling by the first request
for all, registers a stream behind its request, so that a short one can end unheard, and leaves the
pages of a client that is gone to be filled to the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from transformers import ContinuousBatchingConfig
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    CBStreamer,
    CBWorkerDeadError,
    _StreamError,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter

from bitnet_triton.models.window_pages import GONE
from bitnet_triton.serving.limits import Limits, refuse


class Outputs(OutputRouter):
    """Hands the engine's outputs to those who listen; what nobody hears is cancelled.

    Args:
        cancel: ends the request of that name.
    """

    def __init__(self, cancel: Callable[[str], None]) -> None:
        super().__init__()
        self._cancel = cancel

    def deliver(self, output: Any) -> None:
        """Hand over one output."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Hand over the outputs of a step at once."""
        heard, loop = [], None
        with self._lock:
            for output in outputs:
                entry = self.result_handlers.get(output.request_id)
                if entry is not None:
                    heard.append((entry[0], output))
                    loop = entry[1]
                elif not output.is_finished():
                    self._cancel(output.request_id)
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(lambda: [listen(output) for listen, output in heard])

    def listen(self, request: str, listener: Callable[[Any], None]) -> None:
        """Call ``listener`` in the running loop with each output of a request."""
        with self._lock:
            self.result_handlers[request] = (listener, asyncio.get_running_loop())

    def forget(self, request: str) -> None:
        """Listen no more to a request."""
        with self._lock:
            self.result_handlers.pop(request, None)


class Engine(BaseGenerateManager):
    """One model's continuous batching, as transformers' handlers call it.

    Args:
        model: with ``attn_implementation="bitnet_triton"``.
        config: of the engine, with its pages.
        limits: what a request may take.
    """

    def __init__(self, model: Any, config: ContinuousBatchingConfig, limits: Limits) -> None:
        self.limits = limits
        self.manager = model.init_continuous_batching(model.generation_config, config)
        self._outputs = Outputs(self.manager.cancel_request)
        self.manager.output_router = self._outputs
        self._running: dict[str, asyncio.TimerHandle] = {}

    def start(self) -> None:
        """Start the thread that generates."""
        self.manager.start()

    def stop(self) -> None:
        """End what still runs, and the thread."""
        self.manager.stop(block=True, hard_stop=True)

    def is_alive(self) -> bool:
        """Return whether the thread has not died."""
        return self.manager.background_thread_status.fatal_error is None

    @property
    def running(self) -> int:
        """Requests that are served or wait."""
        return len(self._running)

    def held_pages(self) -> int:
        """Return the pages of the texts that are being written."""
        processor = self.manager.batch_processor
        if processor is None:
            return 0
        return sum(
            page != GONE
            for allocator in processor.cache.cache_allocators.values()
            for pages in allocator.block_table.values()
            for page in pages
        )

    def abandon(self, request: str) -> None:
        """Free what a request holds, if it has not ended; in the event loop."""
        timer = self._running.pop(request, None)
        if timer is not None:
            timer.cancel()
            self._outputs.forget(request)
            self.manager.cancel_request(request)

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, Any],
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Any]:
        """Start a request; return the queue that its text comes through, and who fills it.

        Args:
            model: unused, there is one.
            processor: the tokenizer.
            inputs: tokens of the prompt.
            gen_config: of the handler: what the request asks for.
            request_id: its name.
            response_parser: of transformers.

        Raises:
            HTTPException: 400, longer than the context or the memory; 429, too many requests.
        """
        queue: asyncio.Queue[Any] = asyncio.Queue()
        streamer = CBStreamer(
            self.manager, request_id, processor._tokenizer, asyncio.get_running_loop(), queue,
            response_parser=response_parser,
        )  # fmt: skip

        def hear(output: Any, error: str | None) -> None:
            if error is None:
                streamer.put(output)
                if output.is_finished():
                    streamer.end()
            else:
                queue.put_nowait(_StreamError(error))

        self._submit(inputs["input_ids"], gen_config, request_id, hear)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: dict[str, Any], gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Return the text of a request, the length of its prompt, and its tokens.

        Args:
            model: unused, there is one.
            processor: the tokenizer.
            inputs: tokens of the prompt.
            gen_config: of the handler: what the request asks for.
            request_id: its name.

        Raises:
            HTTPException: 400, longer than the context or the memory; 429, too many requests; 500,
                it failed; 504, it took too long.
        """
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()

        def hear(output: Any, error: str | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(refuse(error, 504 if output is None else 500))
            elif output.is_finished():
                future.set_result(output.generated_tokens)

        prompt = inputs["input_ids"]
        self._submit(prompt, gen_config, request_id, hear)
        tokens = await future
        return processor.decode(tokens, skip_special_tokens=True), len(prompt), tokens

    def _submit(
        self,
        prompt: list[int],
        gen_config: Any,
        request: str,
        hear: Callable[[Any, str | None], None],
    ) -> None:
        """Hand a request to the engine; ``hear`` gets its outputs, or what went wrong."""
        if not self.is_alive():
            raise CBWorkerDeadError("the engine has stopped; start the server again")
        if self.running >= self.limits.requests:
            raise refuse(f"{self.running} requests are being served: try again later", 429)
        length = self.limits.length(len(prompt), gen_config.max_new_tokens)
        gen_config.max_new_tokens = length  # the handler tells by it why a text has ended

        def listen(output: Any) -> None:
            if request not in self._running:
                return
            error = output.error
            if error is not None:
                self.abandon(request)
            elif output.is_finished():
                self._running.pop(request).cancel()
                self._outputs.forget(request)
            hear(output, None if error is None else _plain(error))

        def late() -> None:
            self.abandon(request)
            hear(None, f"the request took longer than {self.limits.seconds:g} s")

        loop = asyncio.get_running_loop()
        self._outputs.listen(request, listen)
        self._running[request] = loop.call_later(self.limits.seconds, late)
        taken = self.manager.add_request(
            prompt, request_id=request, max_new_tokens=length, streaming=True,
            eos_token_id=gen_config.eos_token_id, **gen_config.wanted,
        )  # fmt: skip
        if taken is None:
            self.abandon(request)
            raise refuse("the server is stopping", 503)


def _plain(error: str) -> str:
    """Return an error as transformers can put it between quotes."""
    return " ".join(error.replace('"', "'").replace("\\", "/").split())[:300]
