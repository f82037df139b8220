"""What a compiled kernel depends on, as a hash: equal digests, equal machine code.

The source counts as Python reads it: comments, docstrings, line numbers and the layout of the text
do not, so that only what can change the code asks for a new compilation.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import tokenize
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
_LENGTH = 20


def digest(*parts: Any) -> str:
    """Hash plain values, and functions of Triton by all that they are made of."""
    import triton

    text = repr((triton.__version__, [_readable(part) for part in parts]))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def _readable(part: Any) -> Any:
    from triton.runtime.jit import JITFunction

    if isinstance(part, dict):
        return [(key, _readable(value)) for key, value in part.items()]
    return _source(part) if isinstance(part, JITFunction) else part


@functools.cache
def _source(kernel: Any) -> str:
    """Return a kernel, the functions that it calls and the constants that they read, as text."""
    from triton.runtime.jit import JITFunction

    found: dict[str, str] = {}
    left = [kernel]
    while left:
        function = left.pop()
        name = f"{function.fn.__module__}.{function.fn.__qualname__}"
        if name in found:
            continue
        inline = "noinline" if function.noinline else ""
        constants = []
        for used, value in sorted(_globals(function), key=lambda pair: pair[0]):
            if isinstance(value, JITFunction):
                left.append(value)
            constants.append(f"{used}={_text(value)}")
        found[name] = repr((inline, _tokens(function.src), constants))
    return repr(sorted(found.items()))


def _globals(function: Any) -> Iterator[tuple[str, Any]]:
    """Return what a function reads from outside, by the names that it uses."""
    scope = function.fn.__globals__ | inspect.getclosurevars(function.fn).nonlocals
    for node in ast.walk(ast.parse(function.src)):
        dotted = _dotted(node)
        if dotted and dotted[0] in scope:
            value = scope[dotted[0]]
            for attribute in dotted[1:]:
                if not isinstance(value, ModuleType):
                    break
                value = getattr(value, attribute)
            yield ".".join(dotted), value


def _dotted(node: ast.AST) -> list[str]:
    """Return ["a", "b"] of the expression ``a.b``, nothing of others."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (left := _dotted(node.value)):
        return [*left, node.attr]
    return []


def _text(value: Any) -> str:
    """Return a constant as text; of everything else that has a name, the name."""
    from triton.language import constexpr

    if isinstance(value, constexpr):
        return repr(value.value)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return str(name or repr(value))


def _tokens(source: str) -> list[str]:
    """Return the words of a source; blocks keep their beginning and end."""
    words, at_start = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.STRING and at_start:
            continue  # a docstring
        at_start = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT) or (
            at_start and token.type in _LAYOUT
        )
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            words.append(tokenize.tok_name[token.type])
        elif token.type not in _LAYOUT:
            words.append(token.string)
    return words
