"""``bitnet-triton generate``: write text with a ternary model, token by token."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.console import Console

from bitnet_triton.cli import attention as options
from bitnet_triton.cli.arguments import parse_dtype

EMBEDDED = "tiny"
DEFAULT_PROMPT = "import os\n\n\ndef read_lines(path):"

console = Console(stderr=True, highlight=False)


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue; `-` reads standard input.  [default: a Python def]"),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="A folder or a model on the Hub; `tiny` is the embedded one."),
    ] = EMBEDDED,
    backend: Annotated[
        str | None, typer.Option(help="Force `triton`, `compile` or `reference`.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: the GPU, if there is one.")] = None,
    dtype: Annotated[
        str, typer.Option(help="`auto` (as stored), `float32`, `bfloat16`, `float16`.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 200,
    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--no-do-sample", help="Sample, or take the likeliest token."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Flatness of the distribution.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out tokens below this share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
) -> None:
    """Write text with a ternary model and say how fast it went.

    Streams to standard output; speeds of prefill (reading the prompt) and decode (writing) go to
    standard error. Works for BitNet checkpoints and for any other architecture with
    `quant_method: bitnet`. Sampling options that are left out come from the model's
    `generation_config.json`.

    **Examples**

    - `bitnet-triton generate`

    - `bitnet-triton generate "class Stack:" --max-new-tokens 100 --seed 1`

    - `bitnet-triton generate "Who are you?" --model microsoft/bitnet-b1.58-2B-4T --chat`

    - `bitnet-triton generate --attention sliding --window 1024 --sinks 4`

    - `bitnet-triton generate - --attention swaa-untrained --window 2048 --think < report.txt`
    """
    import torch

    from bitnet_triton import use_backend
    from bitnet_triton.attention.swaa import ask_to_think

    chosen = options.parse_attention(
        attention, window=window, sinks=sinks, block=block, full_decode=full_decode,
        full_layers=full_layers,
    )  # fmt: skip
    if threads:
        torch.set_num_threads(threads)
    text = sys.stdin.read() if prompt == "-" else prompt or DEFAULT_PROMPT
    text = ask_to_think(text) if think else text
    with use_backend(backend) if backend else nullcontext():
        with console.status(f"Loading {model}"):
            tokenizer, loaded = load(model, device, dtype, chosen)
        inputs = _encode(tokenizer, text, chat).to(loaded.device)
        with console.status("Compiling kernels (once for each machine)"), torch.inference_mode():
            loaded.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        if seed is not None:
            torch.manual_seed(seed)
        sampling = {
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        sampling = {name: value for name, value in sampling.items() if value is not None}
        _write(loaded, tokenizer, inputs, max_new_tokens, sampling, show_prompt=not chat)


def load(
    model: str, device: str | None, dtype: str, attention: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """Return tokenizer and model; refuse a model without ternary layers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitnet_triton import TINY_MODEL, BitNetForCausalLM, enable
    from bitnet_triton.nn import BitLinear, PackedBitLinear

    wanted = dtype if dtype == "auto" else parse_dtype(dtype)
    enable()
    folder = TINY_MODEL if model == EMBEDDED else model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if attention is None:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, use_safetensors=True)
    else:
        loaded = BitNetForCausalLM.from_pretrained(folder, dtype=wanted, attention=attention)
    loaded = loaded.eval()
    if not any(isinstance(m, (BitLinear, PackedBitLinear)) for m in loaded.modules()):
        raise ValueError(
            f"`--model`: expected a checkpoint with `quant_method: bitnet`, got {model}, a dense "
            f"{type(loaded).__name__}"
        )
    loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return tokenizer, loaded


def _encode(tokenizer: Any, text: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if tokenizer.chat_template is None:
        raise ValueError("`--chat`: expected a tokenizer with a chat template, this one has none")
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
