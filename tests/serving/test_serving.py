"""OpenAI's client against the server: the text of ``generate``, and nothing left behind."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import transformers
from packaging.version import Version

from bitnet_triton.models.choosing import Chooser

openai = pytest.importorskip("openai", reason="needs bitnet-triton[serve]: openai is not installed")
for name in ("fastapi", "uvicorn"):
    pytest.importorskip(name, reason=f"needs bitnet-triton[serve]: {name} is not installed")
httpx = pytest.importorskip("httpx")  # what openai sends with
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="serving needs transformers 5.23"
)
GREEDY = {"do_sample": False}
PROMPTS = [
    "def add(a, b):", "import os\n\n\ndef read_lines(path):", "class Stack:\n    def push(",
    "for name in sorted(os.listdir(", "# The number of\n", "x = [1, 2, 3",
]  # fmt: skip


def prompt_of(number):
    """Return texts of many lengths; some begin alike for several pages."""
    return PROMPTS[0] * (number % 4 * 8) + PROMPTS[number % len(PROMPTS)] + f" # {number}\n"


def complete(client, prompt, tokens, stream=False, **settings):
    done = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=tokens, stream=stream, **settings
    )
    if not stream:
        return done.choices[0].text
    return "".join(chunk.choices[0].text for chunk in done)


def is_empty(engine):
    """Return whether nothing is held for any request."""
    return not (engine.running or engine.held_pages() or engine._outputs.result_handlers)


def wait_until_empty(engine, wait):
    wait(lambda: is_empty(engine))
    scheduler = engine.manager.batch_processor.scheduler
    assert not scheduler.active_requests
    assert not scheduler.waiting_requests


def leave_mid_stream(client):
    stream = client.completions.create(model="tiny", prompt="x =", max_tokens=1000, stream=True)
    for _, _ in zip(range(3), stream):
        pass
    stream.close()


def test_32_requests_at_a_time_get_the_texts_of_generate(served, client, written, wait):
    """Beside a client that leaves in its stream, and a request for more than there is."""
    lengths = [4 + number % 9 for number in range(32)]
    with ThreadPoolExecutor(34) as pool:
        texts = [
            pool.submit(complete, client, prompt_of(n), size, stream=n % 2 == 0, temperature=0)
            for n, size in enumerate(lengths)
        ]
        gone = pool.submit(leave_mid_stream, client)
        absurd = pool.submit(complete, client, "a b " * 2000, 1000, temperature=0)
        texts = [text.result() for text in texts]
        gone.result()
        with pytest.raises(openai.BadRequestError, match=r"4\d\d\d tokens .* context of 4096"):
            absurd.result()
    assert texts == [written(prompt_of(n), size, **GREEDY) for n, size in enumerate(lengths)]
    wait_until_empty(served.engine, wait)


def test_a_request_longer_than_the_memory_is_refused_with_its_numbers(client):
    with pytest.raises(openai.BadRequestError, match=r"1001 .* memory holds, 1920 tokens"):
        complete(client, "a b " * 500, 1001)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({"seed": 3}, {}),  # as the model's generation config says, with its penalty
        ({"seed": 4, "temperature": 0.9, "top_p": 0.8}, {"temperature": 0.9, "top_p": 0.8}),
        (
            {"temperature": 0, "extra_body": {"repetition_penalty": 1.5}},
            {"do_sample": False, "repetition_penalty": 1.5},
        ),
        ({"seed": 5, "extra_body": {"top_k": 3, "min_p": 0.1}}, {"top_k": 3, "min_p": 0.1}),
    ],
)
def test_requests_choose_as_generate_does(client, written, asked, given):
    expected = written(PROMPTS[1], 12, seed=asked.get("seed"), **given)
    assert complete(client, PROMPTS[1], 12, **asked) == expected


def test_chat_continues_the_messages(client, written):
    messages = [
        {"role": "system", "content": "import os"},
        {"role": "user", "content": [{"type": "text", "text": "def f(path):"}]},
    ]
    ask = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
    expected = written("import os\ndef f(path):\n", 12, **GREEDY)
    answer = client.chat.completions.create(**ask)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == 12
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_there_is_one_model_and_names_are_no_paths(served, client, tmp_path):
    assert [model.id for model in client.models.list()] == ["tiny"]
    for name in (str(tmp_path), "gpt-4", "../tiny", "tiny@main"):
        with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
            client.completions.create(model=name, prompt="x", max_tokens=1)
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/audio/transcriptions"):
        assert httpx.post(served.address + path, json={"model": str(tmp_path)}).status_code == 404
    assert httpx.get(f"{served.address}/docs").status_code == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ["a", "b"]}, "`prompt`: expected one text"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "a", "max_tokens": 10**9}, "from 1 to 1024, got 1000000000"),
        ({"prompt": "a", "max_tokens": True}, "`max_tokens`: expected an integer"),
        ({"prompt": "a", "max_tokens": 1, "max_completion_tokens": 2}, "expected one number"),
        ({"prompt": "a", "temperature": -1}, "`temperature`"),
        ({"prompt": "a", "temperature": "hot"}, "`temperature`"),
        ({"prompt": "a", "top_p": 0}, "`top_p`"),
        ({"prompt": "a", "n": 2}, "`n`: not served"),
        ({"prompt": "a", "stop": ["b"]}, "`stop`: not served"),
        ({"prompt": "a", "frequency_penalty": 1}, "`frequency_penalty`: not served"),
        ({"prompt": "a", "generation_config": "{}"}, "`generation_config`: not served"),
        ({"messages": []}, "`messages`"),
        ({"messages": [{"role": "user", "content": None}]}, "expected text, got NoneType"),
        (
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {}},
            "`chat_template_kwargs`: not served",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
                        ],
                    }
                ]
            },
            "expected text, got 'image_url'",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(served, body, message):
    path = "chat/completions" if "messages" in body else "completions"
    answer = httpx.post(
        f"{served.address}/v1/{path}",
        content=json.dumps({"max_tokens": 1, **body}),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert is_empty(served.engine)


@pytest.mark.parametrize("body", [b"{", b"[]", b"", b'"text"', b"\xff"])
def test_a_malformed_body_is_answered_in_the_form_of_the_api(served, body):
    answer = httpx.post(
        f"{served.address}/v1/completions",
        content=body,
        headers={"Content-Type": "application/json"},
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, 400)
    assert "body" in error["message"]


def test_an_unknown_address_is_answered_in_the_form_of_the_api(served):
    for answer in (
        httpx.get(f"{served.address}/v1"),
        httpx.get(f"{served.address}/v1/completions"),
    ):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["code"] == answer.status_code


def test_a_body_above_the_limit_is_refused(served):
    url = f"{served.address}/v1/completions"
    told = httpx.post(url, content=b"x" * 20_001)
    assert (told.status_code, "at most 20000 bytes, got 20001" in told.text) == (413, True)
    untold = httpx.post(url, content=iter([b"x" * 15_000] * 2))  # in chunks, of unknown number
    assert untold.status_code == 413


def test_requests_above_the_limit_wait_outside(served, client, monkeypatch):
    monkeypatch.setattr(served.engine, "limits", replace(served.engine.limits, requests=0))
    with pytest.raises(openai.RateLimitError, match="try again later"):
        complete(client, "x", 1)


def test_a_request_that_takes_too_long_ends(served, client, monkeypatch, wait):
    monkeypatch.setattr(served.engine, "limits", replace(served.engine.limits, seconds=0.01))
    with pytest.raises(openai.InternalServerError, match=r"longer than 0\.01 s"):
        complete(client, "x", 1000)
    with pytest.raises(openai.APIError) as caught:
        complete(client, "x", 1000, stream=True)
    assert caught.value.body == "the request took longer than 0.01 s"
    wait_until_empty(served.engine, wait)


def test_a_client_that_does_not_stream_and_leaves_frees_its_pages(served, wait):
    url, body = f"{served.address}/v1/completions", {"prompt": "x", "max_tokens": 1000}
    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(httpx.post, url, json=body, timeout=0.4)
        wait(served.engine.held_pages)
        scheduler = served.engine.manager.batch_processor.scheduler
        (state,) = list(scheduler.active_requests.values())
        with pytest.raises(httpx.ReadTimeout):
            left.result()
    wait_until_empty(served.engine, wait)
    assert len(state.generated_tokens) < 1000


def test_a_request_that_fails_leaves_others_right(served, client, written, monkeypatch, wait):
    choose = Chooser.__call__

    def fail(self, prompt, tokens, scores):
        if self.generator is not None and len(tokens) == 3:
            raise RuntimeError("drawn in vain")
        return choose(self, prompt, tokens, scores)

    expected = written(PROMPTS[0], 16, **GREEDY)
    monkeypatch.setattr(Chooser, "__call__", fail)
    with ThreadPoolExecutor(3) as pool:
        right = pool.submit(complete, client, PROMPTS[0], 16, temperature=0)
        wrong = [
            pool.submit(complete, client, PROMPTS[0], 16, seed=1, stream=how)
            for how in (False, True)
        ]
        for one in wrong:
            with pytest.raises(openai.APIError) as caught:
                one.result()
            assert "drawn in vain" in str(caught.value.body)
        assert right.result() == expected
    wait_until_empty(served.engine, wait)


def test_sigterm_lets_requests_end_and_leaves_nothing(written, wait):
    """The command itself, with a key."""
    code = "import sys; from bitnet_triton.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, "--api-key", "secret", "--memory", "0.01", "--grace", "120"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(process.stderr.readline, "")
        first = next(line for line in lines if "Serving" in line)
        url = first.split(" at ")[1].strip()
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
            streams = [
                client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=60, temperature=0, stream=True
                )
                for prompt in PROMPTS
            ]
            firsts = [next(stream).choices[0].text for stream in streams]
            process.send_signal(signal.SIGTERM)
            texts = [
                first + "".join(chunk.choices[0].text for chunk in stream)
                for first, stream in zip(firsts, streams)
            ]
            assert texts == [written(prompt, 60, **GREEDY) for prompt in PROMPTS]
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 0
        assert rest.strip().endswith("Stopped")
        assert "Traceback" not in rest
    finally:
        process.kill()
        process.wait()
