"""Read MLIR in its generic textual form: one grammar for every operation."""

from __future__ import annotations

import re

from bitnet_triton.triton_cpu.ir import Block, Op, Value, parse_type

_HEAD = re.compile(r'^\s*(?:(%[\w#:$.\-]+) = )?"([\w.]+)"\(')
_LOCATION = re.compile(r" loc\((.*)\)$")
_ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_FILE = re.compile(r'^"(.*)":(\d+):\d+')
_OPENING, _CLOSING = "<([{", ">)]}"


def parse_module(text: str) -> Op:
    """Return the ``builtin.module`` operation that ``text`` holds."""
    lines = [line for line in text.split("\n") if line.strip()]
    aliases = {m.group(1): m.group(2) for line in lines if (m := _ALIAS.match(line))}
    body = [line for line in lines if not line.startswith("#")]
    return _Parser(body, aliases).operation({})


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes ``text[start]``."""
    depth, i, quoted = 0, start, False
    while i < len(text):
        c = text[i]
        if quoted:
            if c == "\\":
                i += 1
            elif c == '"':
                quoted = False
        elif c == '"':
            quoted = True
        elif c == "-" and text[i + 1 : i + 2] == ">":
            i += 1
        elif c in _OPENING:
            depth += 1
        elif c in _CLOSING:
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise ValueError(f"unbalanced brackets in MLIR: {text[start : start + 80]}")


def split_top(text: str) -> list[str]:
    """Split at the commas that no bracket or quote encloses."""
    parts, start, i = [], 0, 0
    while i < len(text):
        c = text[i]
        if c in _OPENING:
            i = _closing(text, i)
        elif c == '"':
            i += 1
            while text[i] != '"':
                i += 2 if text[i] == "\\" else 1
        elif c == ",":
            parts.append(text[start:i].strip())
            start = i + 1
        i += 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _attributes(text: str) -> dict[str, str]:
    found = {}
    for item in split_top(text):
        key, equals, value = item.partition(" = ")
        found[key.strip().strip('"')] = value.strip() if equals else "true"
    return found


def _hint(name: str) -> str:
    """Return the name in the kernel's source that an SSA name was made of, for readers."""
    source_name = re.sub(r"_\d+$", "", re.sub(r"\W", "_", name[1:]))
    return source_name if source_name.isidentifier() else "v"


class _Parser:
    def __init__(self, lines: list[str], aliases: dict[str, str]) -> None:
        self._lines = lines
        self._aliases = aliases
        self._next = 0

    def operation(self, scope: dict[str, Value]) -> Op:
        line = self._lines[self._next]
        head = _HEAD.match(line)
        if head is None:
            raise ValueError(f"cannot read this line of MLIR: {line.strip()[:200]}")
        end = _closing(line, head.end() - 1)
        operands = [scope[name] for name in split_top(line[head.end() : end])]
        rest = line[end + 1 :].lstrip()
        successors: list[str] = []
        if rest.startswith("["):
            end = _closing(rest, 0)
            successors = split_top(rest[1:end])
            rest = rest[end + 1 :].lstrip()
        attributes: dict[str, str] = {}
        if rest.startswith("<{"):
            end = _closing(rest, 0)
            attributes.update(_attributes(rest[2 : end - 1]))
            rest = rest[end + 1 :].lstrip()
        self._next += 1
        op = Op(head.group(2), operands, [], attributes, [], successors, "")
        if rest.startswith("({"):
            rest = self._regions(op, rest, scope)
        self._finish(op, rest, head.group(1), scope)
        return op

    def _finish(self, op: Op, rest: str, names: str | None, scope: dict[str, Value]) -> None:
        """Read what follows the regions: more attributes, the types and the location."""
        if rest.startswith("{"):
            end = _closing(rest, 0)
            op.attributes.update(_attributes(rest[1:end]))
            rest = rest[end + 1 :].lstrip()
        location = _LOCATION.search(rest)
        if location:
            op.location = self._source_line(location.group(1))
            rest = rest[: location.start()]
        outputs = rest.partition(":")[2].strip()
        outputs = outputs[_closing(outputs, 0) + 1 :].partition("->")[2].strip()
        types = split_top(outputs[1:-1]) if outputs.startswith("(") else [outputs]
        for operand in op.operands:
            operand.uses.append(op)
        if names:
            self._define(op, names, types, scope)

    @staticmethod
    def _define(op: Op, names: str, types: list[str], scope: dict[str, Value]) -> None:
        name, _, _count = names.partition(":")
        hint = _hint(name)
        for i, text in enumerate(types):
            value = Value(parse_type(text), hint, op=op)
            op.results.append(value)
            scope[f"{name}#{i}"] = value
        scope[name] = op.results[0]

    def _regions(self, op: Op, rest: str, scope: dict[str, Value]) -> str:
        """Read the regions that open at the end of a line; return what follows them."""
        rest = rest[2:].strip()
        while True:
            if rest.startswith("})"):  # an empty region
                op.regions.append([])
                return rest[2:].lstrip()
            blocks, closing = self._region(op, dict(scope))
            op.regions.append(blocks)
            if not closing.startswith("}, {"):
                return closing[2:].lstrip()
            rest = closing[4:].strip()

    def _region(self, parent: Op, scope: dict[str, Value]) -> tuple[list[Block], str]:
        """Read lines up to the closing brace of a region."""
        blocks = [Block([], parent=parent)]
        while True:
            line = self._lines[self._next].strip()
            if line.startswith("}"):
                self._next += 1
                return blocks, line
            if line.startswith("^"):
                self._next += 1
                block = self._block(line, parent, scope)
                if blocks[-1].ops or blocks[-1].label:
                    blocks.append(block)
                else:
                    blocks[-1] = block
                continue
            op = self.operation(scope)
            blocks[-1].append(op)
            for result in op.results:
                result.block = blocks[-1]

    @staticmethod
    def _block(line: str, parent: Op, scope: dict[str, Value]) -> Block:
        label = re.match(r"\^\w+", line)
        block = Block([], label=label.group(0) if label else "", parent=parent)
        if "(" in line.partition(":")[0] or line.find("(") == len(block.label):
            start = line.index("(")
            for item in split_top(line[start + 1 : _closing(line, start)]):
                name, _, text = item.partition(":")
                text = re.sub(r"\s*loc\(.*\)$", "", text.strip())
                value = Value(parse_type(text), _hint(name.strip()), block=block)
                block.args.append(value)
                scope[name.strip()] = value
        return block

    def _source_line(self, location: str) -> str:
        """Return "file:line" of the outermost user code that a location names."""
        for _ in range(64):  # aliases of aliases; calls nest as deep as the kernel's helpers
            file = _FILE.match(location)
            if file:
                return f"{file.group(1)}:{file.group(2)}"
            if location in self._aliases:
                location = self._aliases[location]
            elif location.startswith("callsite("):
                location = location[len("callsite(") : -1].rpartition(" at ")[2]
            elif "(" in location:
                location = location[location.index("(") + 1 : location.rindex(")")]
            else:
                break
        return "unknown source line"
