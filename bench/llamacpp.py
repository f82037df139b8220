"""llama.cpp as a peer: a GGUF of equal shapes with random weights, in a process of its own.

llama.cpp brings its own threads and, for some builds, its own OpenMP library; in one process with
PyTorch they would disturb each other. The process takes commands and answers with times.

As a script: ``python bench/llamacpp.py MODEL.gguf``, which is what ``LlamaCpp`` starts.
"""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bench.models import Shape

BLOCK = 256  # weights that share a scale, in both ternary formats
# Bytes of codes before the scale, a float16, that ends a block
_CODES = {"TQ1_0": 52, "TQ2_0": 64}
_ROPE_THETA = 500000.0


def write_gguf(path: Path, shape: Shape, *, weights: str = "TQ2_0", head: str = "F16") -> int:
    """Write a model of architecture ``bitnet`` with random codes; return its size in bytes.

    Args:
        path: of the file.
        shape: the widths; rows are multiples of 256.
        weights: format of the linears, "TQ2_0" or "TQ1_0".
        head: format of the embedding, which is the output head too: "F16" or "Q8_0".
    """
    import gguf

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "bitnet")
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(_ROPE_THETA)
    writer.add_layer_norm_rms_eps(1e-5)

    def add_ternary(name: str, N: int, K: int) -> None:
        codes = _CODES[weights]
        # three values of two bits, four a byte; TQ1_0 takes any byte
        packed = random.integers(0, 3, (N, K // BLOCK, codes, 4), dtype=np.uint8)
        rows = np.empty((N, K // BLOCK, codes + 2), np.uint8)
        rows[..., :codes] = packed @ np.array([1, 4, 16, 64], np.uint8)
        scale = np.float16((1.5 / K) ** 0.5)
        rows[..., codes:] = np.frombuffer(scale.tobytes(), np.uint8)
        kind = gguf.GGMLQuantizationType[weights]
        writer.add_tensor(name, rows.reshape(N, -1), raw_dtype=kind)

    def add_norm(name: str, width: int) -> None:
        writer.add_tensor(name, np.ones(width, np.float32))

    embedding = random.standard_normal((shape.vocab, shape.hidden), np.float32)
    kind = gguf.GGMLQuantizationType[head]
    writer.add_tensor("token_embd.weight", gguf.quantize(embedding, kind), raw_dtype=kind)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for i in range(shape.layers):
        for name, (N, K) in shape.linears.items():
            add_ternary(f"blk.{i}.{names[name]}.weight", N, K)
        for norm in ("attn_norm", "attn_sub_norm", "ffn_norm"):
            add_norm(f"blk.{i}.{norm}.weight", shape.hidden)
        add_norm(f"blk.{i}.ffn_sub_norm.weight", shape.ffn)
    add_norm("output_norm.weight", shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()
    return path.stat().st_size


class LlamaCpp:
    """A loaded model in a process of its own.

    Args:
        path: of the GGUF.
        threads: that it computes with.
        context: tokens that its cache has room for.
    """

    def __init__(self, path: Path, *, threads: int, context: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.loaded = self._ask("load", threads=threads, context=context)

    def prefill(self, tokens: int) -> float:
        """Empty the cache, read a prompt, and return the seconds that it took."""
        return self._ask("prefill", tokens=tokens)

    def decode(self) -> float:
        """Take one more step, and return the seconds that it took."""
        return self._ask("decode")

    def crop(self, tokens: int) -> float:
        """Forget all but the first tokens."""
        return self._ask("crop", tokens=tokens)

    def set_threads(self, threads: int) -> float:
        """Compute with so many threads from now on."""
        return self._ask("set_threads", threads=threads)

    def save(self, path: Path) -> float:
        """Write the cache to a file; a model with another head can ``restore`` it."""
        return self._ask("save", path=str(path))

    def restore(self, path: Path) -> float:
        """Replace the cache by that of a file."""
        return self._ask("restore", path=str(path))

    def peak_memory(self) -> int:
        """Return the largest resident size of the process so far, in bytes."""
        return int(self._ask("peak_memory"))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _ask(self, command: str, **arguments: Any) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"llama.cpp has ended with code {self._process.wait()}")
        return float(answer)


def peak_resident_bytes() -> int:
    """Return the largest resident size of this process so far.

    Where /proc tells it, it is that of this program: ``getrusage`` counts what a parent had when it
    started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


class _Worker:
    """The other side: calls of llama.cpp's C interface."""

    def __init__(self, path: str) -> None:
        import llama_cpp

        self.c = llama_cpp
        self.path = path

    def load(self, threads: int, context: int) -> None:
        self.c.llama_backend_init()
        parameters = self.c.llama_model_default_params()
        self.model = self.c.llama_model_load_from_file(self.path.encode(), parameters)
        assert self.model, "the model cannot be loaded"
        options = self.c.llama_context_default_params()
        options.n_ctx = context
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        self.context = self.c.llama_init_from_model(self.model, options)
        assert self.context, "no context"
        vocabulary = self.c.llama_model_get_vocab(self.model)
        self.vocabulary = self.c.llama_vocab_n_tokens(vocabulary)

    def _run(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), 512):
            part = tokens[start : start + 512]
            array = (self.c.llama_token * len(part))(*part)
            failed = self.c.llama_decode(self.context, self.c.llama_batch_get_one(array, len(part)))
            assert not failed, f"llama_decode failed with {failed}"

    def prefill(self, tokens: int) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        self._run([1 + i % 1000 for i in range(tokens)])

    def decode(self) -> None:
        self._run([7])
        # greedy: the largest logit of all
        logits = self.c.llama_get_logits(self.context)
        np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax()

    def crop(self, tokens: int) -> None:
        memory = self.c.llama_get_memory(self.context)
        self.c.llama_memory_seq_rm(memory, 0, tokens, -1)

    def set_threads(self, threads: int) -> None:
        self.c.llama_set_n_threads(self.context, threads, threads)

    def save(self, path: str) -> None:
        data = (ctypes.c_uint8 * self.c.llama_state_seq_get_size(self.context, 0))()
        written = self.c.llama_state_seq_get_data(self.context, data, len(data), 0)
        assert written == len(data), "the cache cannot be saved"
        Path(path).write_bytes(data)

    def restore(self, path: str) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        stored = Path(path).read_bytes()
        data = (ctypes.c_uint8 * len(stored)).from_buffer_copy(stored)
        read = self.c.llama_state_seq_set_data(self.context, data, len(data), 0)
        assert read == len(data), "the cache does not fit"

    def peak_memory(self) -> int:
        return peak_resident_bytes()


def _serve(path: str) -> None:
    worker = _Worker(path)
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        start = time.perf_counter()
        answer = getattr(worker, command)(**request)
        print(time.perf_counter() - start if answer is None else answer, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
