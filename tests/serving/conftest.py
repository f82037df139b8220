"""A server of the embedded model in this process, and a client of it."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, ContinuousBatchingConfig

from bitnet_triton import TINY_MODEL, BitNetForCausalLM

PAGE, PAGES = 16, 120


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="session")
def model():
    return BitNetForCausalLM.from_pretrained(
        TINY_MODEL, attn_implementation="bitnet_triton", dtype=torch.float32
    )


@pytest.fixture(scope="session")
def written(tokenizer, model):
    """Write behind a text by ``generate``, with a model that no server has."""
    alone = BitNetForCausalLM.from_pretrained(
        TINY_MODEL, attn_implementation="bitnet_triton", dtype=torch.float32
    )
    longest = model.config.max_position_embeddings

    def write(prompt, tokens, seed=None, **settings):
        if seed is not None:
            torch.manual_seed(seed)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = alone.generate(
            ids, max_new_tokens=tokens, context_length=longest, output_scores=True,
            return_dict_in_generate=True, **settings,
        )  # fmt: skip
        return Written(tokenizer, out.sequences[0, ids.shape[1] :], torch.cat(out.scores))

    return write


class Written:
    """A text of ``generate``; another one equals it until two tokens are nearly as good.

    Prompts and steps of another cut round otherwise in float32, which may turn a code of an
    activation; 0.014 was seen to part two texts.
    """

    def __init__(self, tokenizer, tokens, scores):
        self.texts = [
            tokenizer.decode(tokens[: n + 1], skip_special_tokens=True) for n in range(len(tokens))
        ]
        best = scores.topk(2).values
        self.leads = (best[:, 0] - best[:, 1]).tolist()

    def __eq__(self, text):
        for begin, lead in zip(self.texts, self.leads):
            if lead < 0.05 and not text.startswith(begin):
                return True
        return text == self.texts[-1]

    def __repr__(self):
        return repr(self.texts[-1])


@pytest.fixture(scope="session")
def served(model, tokenizer):
    import uvicorn

    from bitnet_triton.serving.engine import Engine
    from bitnet_triton.serving.limits import Limits
    from bitnet_triton.serving.server import build_app

    limits = Limits(
        context=4096, pages=PAGES * PAGE, new_tokens=1024, body=20_000, seconds=120, requests=64
    )
    config = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=PAGES, max_batch_tokens=96, max_requests_per_batch=64
    )
    engine = Engine(model, config, limits)
    app = build_app("tiny", model, tokenizer, engine, None)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    engine.start()
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield SimpleNamespace(engine=engine, address=address)
    server.should_exit = True
    thread.join()
    engine.stop()
    assert not engine.manager.is_running()


@pytest.fixture
def client(served):
    from openai import OpenAI

    with OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def wait_until(is_so, seconds=60):
    """Wait for what another thread or process does; the time is a limit, no expectation."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        threading.Event().wait(0.02)


@pytest.fixture
def wait():
    return wait_until
