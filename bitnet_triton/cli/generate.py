"""``bitnet-triton generate``: write text with a ternary model, token by token."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.console import Console

from bitnet_triton.cli import attention as options
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

DEFAULT_PROMPT = "import os\n\n\ndef read_lines(path):"
_GREEDY = " (`--no-do-sample` takes the likeliest token)"

console = Console(stderr=True, highlight=False)


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue; `-` reads standard input.  [default: a Python def]"),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="A folder or a model on the Hub; `tiny` and `recall` are embedded."),
    ] = DEFAULT,
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
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template.")] = False,
    attention: options.Attention = None,
    window: options.Window = None,
    sinks: options.Sinks = None,
    block: options.Block = None,
    full_decode: options.FullDecode = None,
    full_layers: options.FullLayers = None,
    think: Annotated[
        bool, typer.Option("--think", help="Ask for reasoning first: it helps where windows are.")
    ] = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens to write at most.",
            parser=number("--max-new-tokens", int, least=1, most=MOST_TOKENS),
            metavar="INTEGER",
        ),
    ] = 200,
    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--no-do-sample", help="Sample, or take the likeliest token."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Flatness of the distribution, above 0.",
            parser=number("--temperature", float, above=0, hint=_GREEDY),
            metavar="NUMBER",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Sample from the k likeliest tokens.",
            parser=number("--top-k", int, least=1, most=MOST_TOKENS),
            metavar="INTEGER",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from this much probability, up to 1.",
            parser=number("--top-p", float, above=0, most=1),
            metavar="NUMBER",
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Leave out tokens below this share of the likeliest, 0 to 1.",
            parser=number("--min-p", float, least=0, most=1),
            metavar="NUMBER",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1: repeat less.",
            parser=number("--repetition-penalty", float, above=0),
            metavar="NUMBER",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Same seed, same text.",
            parser=number("--seed", int, least=0, most=2**63 - 1),
            metavar="INTEGER",
        ),
    ] = None,
) -> None:
    """Write text with a ternary model and say how fast it went.

    Streams to standard output; speeds of prefill (reading the prompt) and decode (writing) go to
    standard error. Works for BitNet checkpoints and for any other architecture with
    `quant_method: bitnet`. Sampling options that are left out come from the model's
    `generation_config.json`; one that is given means sampling.

    **Examples**

    - `bitnet-triton generate`

    - `bitnet-triton generate "class Stack:" --max-new-tokens 100 --seed 1`

    - `bitnet-triton generate "Who are you?" --model microsoft/bitnet-b1.58-2B-4T --chat`

    - `bitnet-triton generate --attention sliding --window 1024 --sinks 4`

    - `bitnet-triton generate --attention '{"mode": "top_k", "keys": 64}'`

    - `bitnet-triton generate - --attention swaa-untrained --window 2048 --think < report.txt`
    """
    sampling = {
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    sampling = _sampling(sampling)
    chosen = options.parse_attention(
        attention, window=window, sinks=sinks, block=block, full_decode=full_decode,
        full_layers=full_layers,
    )  # fmt: skip
    found = find_checkpoint(model, "--model", tokenizer=True)
    text = _read_prompt(prompt, think)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from bitnet_triton import use_backend

    place = check_device(device)
    check_backend(backend, place)
    if threads:
        torch.set_num_threads(threads)
    if not sys.stderr.isatty():
        disable_progress_bar()
    with use_backend(backend.value) if backend else nullcontext():
        with console.status(f"Loading {model}"):
            config = read_config(found, model, "--model")
            options.check_attention(chosen, config)
            tokenizer = _load_tokenizer(found, model)
            inputs = _encode(tokenizer, text, chat).to(place)
            loaded = _load_model(found, model, dtype, chosen).to(place)
        with console.status("Compiling kernels (once for each machine)"), torch.inference_mode():
            loaded.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        if seed is not None:
            torch.manual_seed(seed)
        _write(loaded, tokenizer, inputs, max_new_tokens, sampling, show_prompt=not chat)


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are given; one that only matters in sampling turns it on."""
    sampling = {name: value for name, value in given.items() if value is not None}
    shaping = [name for name in sampling if name not in ("do_sample", "repetition_penalty")]
    if shaping and not sampling.setdefault("do_sample", True):
        option = shaping[0].replace("_", "-")
        raise WrongArgumentError(
            f"`--{option}`: expected sampling, got `--no-do-sample`, the likeliest token"
        )
    return sampling


def _read_prompt(prompt: str | None, think: bool) -> str:
    """Return the text to continue, from the argument, standard input or the default."""
    if prompt is None:
        text = DEFAULT_PROMPT
    elif prompt == "-":
        if sys.stdin is None:
            raise WrongArgumentError("`PROMPT`: expected text on standard input, which is closed")
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise WrongArgumentError(
                f"`PROMPT`: expected text in {error.encoding} on standard input, got byte "
                f"0x{error.object[error.start]:02x} at {error.start}"
            ) from error
    else:
        text = prompt
    if not text:
        where = " on standard input" if prompt == "-" else ""
        raise WrongArgumentError(f"`PROMPT`: expected text{where}, got none")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise WrongArgumentError("`PROMPT`: expected UTF-8, got other bytes")
    if think:
        from bitnet_triton.attention.swaa import ask_to_think

        return ask_to_think(text)
    return text


def _load_tokenizer(found: str, model: str) -> Any:
    from transformers import AutoTokenizer

    with one_line(model, "--model"):
        return AutoTokenizer.from_pretrained(found)


def _load_model(
    found: str, model: str, dtype: Dtype | None, attention: dict[str, Any] | None
) -> Any:
    """Return the model; refuse one without ternary layers."""
    from transformers import AutoModelForCausalLM

    from bitnet_triton import BitNetForCausalLM, enable
    from bitnet_triton.nn import BitLinear, PackedBitLinear

    wanted = "auto" if dtype is None else dtype.to_torch()
    enable()
    with one_line(model, "--model"):
        if attention is None:
            loaded = AutoModelForCausalLM.from_pretrained(found, dtype=wanted, use_safetensors=True)
        else:
            loaded = BitNetForCausalLM.from_pretrained(found, dtype=wanted, attention=attention)
    loaded = loaded.eval()
    if not any(isinstance(m, (BitLinear, PackedBitLinear)) for m in loaded.modules()):
        raise WrongArgumentError(
            f"`--model`: expected a checkpoint with `quant_method: bitnet`, got {model}, a dense "
            f"{type(loaded).__name__}"
        )
    return loaded


def _encode(tokenizer: Any, text: str, chat: bool) -> Any:
    if not chat:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        if inputs["input_ids"].numel() == 0:
            raise WrongArgumentError(
                f"`PROMPT`: expected text that the tokenizer has tokens for, got {text!r}"
            )
        return inputs
    if tokenizer.chat_template is None:
        raise WrongArgumentError("`--chat`: expected a model with a chat template, got one without")
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def _write(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    max_new_tokens: int,
    sampling: dict[str, Any],
    show_prompt: bool,
) -> None:
    import torch
    from transformers import TextStreamer

    class TimedStreamer(TextStreamer):
        """Prints text and remembers when each token came."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=not show_prompt, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())
            super().put(value)

    streamer = TimedStreamer()
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=pad,
            **sampling,
        )
    prompt_tokens = inputs["input_ids"].shape[1]
    _report(streamer.times, prompt_tokens, output.shape[1] - prompt_tokens, model)


def _report(times: list[float], prompt_tokens: int, new_tokens: int, model: Any) -> None:
    """Print the speeds: the first time stands before prefill, the second before decode."""
    prefill = times[1] - times[0]
    console.print(
        f"\n[dim]prefill[/] {prompt_tokens} tokens in {prefill:.2f} s, "
        f"[bold]{prompt_tokens / prefill:.0f} tokens/s[/]"
    )
    if new_tokens > 1:
        decode = times[-1] - times[1]
        console.print(
            f"[dim]decode [/] {new_tokens} tokens in {decode:.2f} s, "
            f"[bold]{(new_tokens - 1) / decode:.1f} tokens/s[/] "
            f"[dim]on {model.device.type}, {str(model.dtype).removeprefix('torch.')}[/]"
        )
