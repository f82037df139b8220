"""``bitnet-triton serve``: an OpenAI-compatible server for a ternary model."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.console import Console

from bitnet_triton.cli.arguments import (
    MOST_TOKENS,
    Backend,
    Dtype,
    WrongArgumentError,
    check_backend,
    check_device,
    number,
    parse_threads,
)
from bitnet_triton.cli.checkpoint import DEFAULT, find_checkpoint, one_line, read_config

PAGE = 16  # tokens; the engine shares prefixes by whole pages
_LOCAL = ("127.0.0.1", "localhost", "::1")

console = Console(stderr=True, highlight=False)


def _count(option: str, most: int = MOST_TOKENS) -> dict[str, Any]:
    return {"parser": number(option, int, least=1, most=most), "metavar": "INTEGER"}


def serve(
    model: Annotated[
        str,
        typer.Argument(help="A folder or a model on the Hub; `tiny` and `recall` are embedded."),
    ] = DEFAULT,
    host: Annotated[str, typer.Option(help="Address to listen on; this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int,
        typer.Option(
            help="Port to listen on; 0 takes a free one.",
            parser=number("--port", int, least=0, most=65535),
            metavar="INTEGER",
        ),
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that clients have to bring. Others on this machine can read a command line: "
            "the environment is safer.",
            envvar="BITNET_TRITON_API_KEY",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model.  [default: MODEL]")
    ] = None,
    backend: Annotated[
        Backend | None, typer.Option(help="Force one; without it the fastest that can run.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="`cpu`, `cuda`, `cuda:1`. Default: the GPU, if there is one."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: as stored.")] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads, up to the number of CPUs.", parser=parse_threads, metavar="INTEGER"
        ),
    ] = None,
    memory: Annotated[
        float,
        typer.Option(
            help="GiB for the keys and values of all requests together.",
            parser=number("--memory", float, above=0),
            metavar="NUMBER",
        ),
    ] = 0.5,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens of one answer at most.", **_count("--max-tokens"))
    ] = 1024,
    max_requests: Annotated[
        int,
        typer.Option(
            help="Requests served or waiting at a time; more get status 429.",
            **_count("--max-requests", 2**20),
        ),
    ] = 256,
    max_batch_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of one step: of prompts and of answers.", **_count("--max-batch-tokens")
        ),
    ] = 512,
    max_body: Annotated[
        int, typer.Option(help="Bytes of one request at most.", **_count("--max-body"))
    ] = 2**20,
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds of one request at most.",
            parser=number("--timeout", float, above=0, most=86400),
            metavar="NUMBER",
        ),
    ] = 600,
    grace: Annotated[
        int,
        typer.Option(
            help="Seconds that requests get to end when the server is told to stop.",
            parser=number("--grace", int, least=0, most=86400),
            metavar="INTEGER",
        ),
    ] = 30,
) -> None:
    """Serve a ternary model to OpenAI's clients.

    transformers' server and continuous batching with our attention: completions, chat completions,
    both streamed or not, and the list of models, under `/v1`. Ctrl-C or SIGTERM lets the requests
    that run end. Needs `pip install bitnet-triton[serve]` and transformers 5.23 or later.

    **Examples**

    - `bitnet-triton serve`

    - `bitnet-triton serve microsoft/bitnet-b1.58-2B-4T --port 8080 --memory 4`

    - `BITNET_TRITON_API_KEY=secret bitnet-triton serve --host 0.0.0.0 --max-requests 64`
    """
    _check_installed()
    found = find_checkpoint(model, "MODEL", tokenizer=True)
    place = check_device(device)
    check_backend(backend, place)
    # before the model is loaded: a port may be taken
    with _listen(host, port) as listener:
        import torch

        from bitnet_triton import use_backend

        if threads:
            torch.set_num_threads(threads)
        with use_backend(backend.value) if backend else nullcontext():
            with console.status(f"Loading {model}"):
                loaded, tokenizer = _load(found, model, dtype, place)
            from bitnet_triton.serving.limits import Limits

            context = loaded.config.max_position_embeddings
            size = _bytes_of_a_token(loaded)
            pages = int(memory * 2**30) // (size * PAGE)
            limits = Limits(
                context=context, pages=pages * PAGE, new_tokens=max_tokens, body=max_body,
                seconds=timeout, requests=max_requests,
            )  # fmt: skip
            if pages < 1:
                raise WrongArgumentError(
                    f"`--memory`: expected room for a page of {PAGE} tokens, "
                    f"{size * PAGE / 2**30:.2g} GiB, got {memory:g}"
                )
            _run(
                loaded, tokenizer, name or model, limits, listener,
                max_batch_tokens=max_batch_tokens, key=api_key, grace=grace, size=size,
            )  # fmt: skip


def _run(
    model: Any,
    tokenizer: Any,
    name: str,
    limits: Any,
    listener: socket.socket,
    *,
    max_batch_tokens: int,
    key: str | None,
    grace: int,
    size: int,
) -> None:
    """Serve until a signal comes; then let requests end, and stop the engine."""
    import uvicorn
    from transformers import ContinuousBatchingConfig

    from bitnet_triton.serving.engine import Engine
    from bitnet_triton.serving.server import build_app

    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=limits.pages // PAGE,
        max_batch_tokens=max_batch_tokens,
        max_requests_per_batch=min(limits.requests, max_batch_tokens),
        use_cuda_graph=False,
        use_async_batching=False,
    )
    has_template = tokenizer.chat_template is not None
    with console.status("Compiling kernels (once for each machine)"):
        _warm_up(model, tokenizer)
    engine = Engine(model, config, limits)
    app = build_app(name, model, tokenizer, engine, key)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=grace,
            timeout_keep_alive=5,
            server_header=False,
        )
    )
    listener.listen()  # before it is told of: who comes early waits, and is not refused
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    console.print(f"Serving [bold]{name}[/] at http://{where}:{port}/v1")
    console.print(
        f"[dim]context[/] {limits.context} tokens, answers of at most {limits.new_tokens}; "
        f"[dim]memory[/] {limits.pages * size / 2**30:.2g} GiB of keys and values, "
        f"{limits.pages} tokens, {limits.pages / limits.longest:.1f} of the longest texts; "
        f"[dim]requests[/] {limits.requests} at a time"
    )
    if not has_template:
        console.print("[dim]no chat template: messages are joined, one a line, without roles[/]")
    if key is None and host not in _LOCAL:
        console.print("[bold red]Open to the network without a key[/]: `--api-key` asks for one")
    # uvicorn raises the signals that it has caught once more at its end: for nobody
    for number_ in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_, lambda *_: None)
    engine.start()
    try:
        server.run(sockets=[listener])
    finally:
        engine.stop()
    console.print("Stopped")


def _check_installed() -> None:
    """Refuse to start without what the server needs.

    Raises:
        WrongArgumentError: a package is missing, or transformers is too old.
    """
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version("5.23"):
        raise WrongArgumentError(
            f"`serve`: expected transformers 5.23 or later, got {transformers.__version__}"
        )
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise WrongArgumentError(
            "`serve`: needs fastapi, uvicorn and openai: install bitnet-triton[serve]"
        )


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound.

    Raises:
        WrongArgumentError: there is no such address here, or somebody has it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise WrongArgumentError(
            f"`--host`, `--port`: cannot listen on {host}:{port}: {error.strerror or error}"
        ) from error
    return listener


def _load(found: str, model: str, dtype: Dtype | None, place: Any) -> tuple[Any, Any]:
    """Return the model with our attention, and its tokenizer."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from bitnet_triton import BitNetForCausalLM
    from bitnet_triton.attention import hub

    transformers_logging.set_verbosity(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    config = read_config(found, model, "MODEL")
    if config.model_type not in ("bitnet", "bitnet_triton"):
        raise WrongArgumentError(
            f"`MODEL`: expected a BitNet model, got {model}, a {config.model_type}: pages of other "
            "classes are not served"
        )
    with one_line(model, "MODEL"):
        tokenizer = AutoTokenizer.from_pretrained(found)
        loaded = BitNetForCausalLM.from_pretrained(
            found,
            dtype="auto" if dtype is None else dtype.to_torch(),
            attn_implementation=hub.NAME,
        )
    return loaded.eval().to(place), tokenizer


def _bytes_of_a_token(model: Any) -> int:
    """Return the bytes of the keys and values of one token, in all layers."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize


def _warm_up(model: Any, tokenizer: Any) -> None:
    """Compile what requests will run, and refuse what the engine cannot do before it listens."""
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=8, max_batch_tokens=64, max_requests_per_batch=4
    )
    text = tokenizer("def f(x):")["input_ids"]
    done = model.generate_batch(
        [text, text * 2], continuous_batching_config=config, max_new_tokens=3
    )
    for one in done.values():
        if one.error is not None:
            raise RuntimeError(one.error)
