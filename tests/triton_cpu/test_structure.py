"""Jumps become branches that do the same: random graphs of blocks, run before and after."""

import contextlib
import random

import pytest

from bitnet_triton.triton_cpu.analyse import walk
from bitnet_triton.triton_cpu.ir import UnsupportedOperation
from bitnet_triton.triton_cpu.parse import parse_module
from bitnet_triton.triton_cpu.structure import RETURN_IF, structure

GRAPHS = 400
INPUTS = 12


class Graph:
    """Writes a function whose blocks jump ahead, anyhow, in MLIR's generic form."""

    def __init__(self, draw, results):
        self.draw = draw
        self.results = results
        self.count = 0
        self.blocks = draw.randint(2, 9)
        # what a block is given; the first gets the function's arguments
        self.arguments = [2] + [draw.choice((0, 0, 1, 2)) for _ in range(1, self.blocks)]
        self.jumps = [self.targets(block) for block in range(self.blocks)]

    def targets(self, block):
        later = range(block + 1, self.blocks)
        if not later or (block and self.draw.random() < 0.25):
            return []
        return [self.draw.choice(later) for _ in range(self.draw.choice((1, 2, 2, 2)))]

    def dominators(self):
        """Return for each block the blocks that every way to it leads through."""
        found = [{0}] + [None] * (self.blocks - 1)
        for block, targets in enumerate(self.jumps):
            for target in targets:
                if found[block] is not None:
                    ways = found[block] | {target}
                    before = found[target]
                    found[target] = ways if before is None else (before & ways) | {target}
        return [ways or {0, block} for block, ways in enumerate(found)]

    def text(self):
        dominators = self.dominators()
        own = [[f"%b{b}a{n}" for n in range(self.arguments[b])] for b in range(self.blocks)]
        lines = []
        for block, targets in enumerate(self.jumps):
            seen = [value for other in sorted(dominators[block]) for value in own[other]]
            given = ", ".join(f"{name}: i32" for name in own[block])
            lines.append(f"  ^bb{block}({given}):" if given else f"  ^bb{block}:")
            for _ in range(self.draw.randint(0, 2)):
                self.count += 1
                a, b = self.draw.choice(seen), self.draw.choice(seen)
                name = f"%v{self.count}"
                kind = self.draw.choice(("arith.addi", "arith.xori"))
                lines.append(f'    {name} = "{kind}"({a}, {b}) : (i32, i32) -> i32')
                own[block].append(name)
                seen.append(name)
            if self.draw.random() < 0.5:
                lines.append(f'    "test.effect"({self.draw.choice(seen)}) : (i32) -> ()')
            lines += self.end(targets, seen)
        return "\n".join(lines)

    def end(self, targets, seen):
        if not targets:
            values = [self.draw.choice(seen) for _ in range(self.results)]
            types = ", ".join(["i32"] * self.results)
            return [f'    "tt.return"({", ".join(values)}) : ({types}) -> ()']
        passed = [self.draw.choice(seen) for t in targets for _ in range(self.arguments[t])]
        labels = ", ".join(f"^bb{target}" for target in targets)
        if len(targets) == 1:
            types = ", ".join(["i32"] * len(passed))
            return [f'    "cf.br"({", ".join(passed)})[{labels}] : ({types}) -> ()']
        self.count += 1
        a, b, flag = self.draw.choice(seen), self.draw.choice(seen), f"%f{self.count}"
        types = ", ".join(["i1", *["i32"] * len(passed)])
        operands = ", ".join([flag, *passed])
        return [
            f'    {flag} = "arith.cmpi"({a}, {b}) <{{predicate = 2 : i64}}> : (i32, i32) -> i1',
            f'    "cf.cond_br"({operands})[{labels}] : ({types}) -> ()',
        ]


def function(name, body, visibility, types="i32, i32"):
    properties = f'function_type = ({types}) -> (), sym_name = "{name}"'
    properties += f', sym_visibility = "{visibility}"'
    return f'  "tt.func"() <{{{properties}}}> ({{\n{body}\n  }}) : () -> ()'


def parse(*functions):
    module = parse_module('"builtin.module"() ({\n' + "\n".join(functions) + "\n}) : () -> ()")
    found = {op.attributes["sym_name"].strip('"'): op for op in module.regions[0][0].ops}
    return found["k"], found


class Left(Exception):
    """The program has ended."""


def interpret(region, values, functions, effects):
    """Run the blocks of a region; return what they hand over at the end."""
    labels = {block.label: block for block in region}
    block = region[0]
    while True:
        for op in block.ops:
            given = [values[operand] for operand in op.operands]
            if op.successors:
                place = 0
                if op.name == "cf.cond_br":
                    place = 0 if given.pop(0) else 1
                first = len(labels[op.successors[0]].args) if place else 0
                block = labels[op.successors[place]]
                values.update(zip(block.args, given[first:]))
                break
            if op.name in ("tt.return", "scf.yield"):
                return given
            step(op, given, values, functions, effects)


def step(op, given, values, functions, effects):
    results = []
    if op.name == "arith.addi":
        results = [(given[0] + given[1]) % 64]
    elif op.name == "arith.xori":
        results = [given[0] ^ given[1]]
    elif op.name == "arith.cmpi":
        results = [given[0] < given[1]]
    elif op.name == "arith.constant":
        results = [op.attributes["value"] == "true"]
    elif op.name == "arith.select":
        results = [given[1] if given[0] else given[2]]
    elif op.name == "ub.poison":
        results = [None]  # reading it raises
    elif op.name == "test.effect":
        effects.append(given[0])
    elif op.name == RETURN_IF:
        if given[0]:
            raise Left
    elif op.name == "scf.if":
        region = op.regions[0 if given[0] else 1]
        results = interpret(region, values, functions, effects)
    elif op.name == "tt.call":
        body = functions[op.attributes["callee"].lstrip("@")].regions[0]
        results = interpret(body, dict(zip(body[0].args, given)), functions, effects)
    else:
        raise AssertionError(op.name)
    values.update(zip(op.results, results))


def behaviour(kernel, functions):
    """Return what the kernel does for some inputs, in order."""
    seen = []
    for number in range(INPUTS):
        effects = []
        inputs = zip(kernel.regions[0][0].args, (number * 7 % 13, number * 5 % 11))
        with contextlib.suppress(Left):
            interpret(kernel.regions[0], dict(inputs), functions, effects)
        seen.append(effects)
    return seen


def check_structured(kernel):
    operations = list(walk(kernel.regions[0]))
    uses = []
    for op in operations:
        assert not op.successors
        assert op.name != "tt.call"
        assert all(len(region) == 1 for region in op.regions)
        assert op.block.ops[op.index] is op
        uses += [(operand, op) for operand in op.operands]
        for operand in op.operands:
            assert op.block.inside(operand.block), "a value is read where it is not known"
    for value in {value for value, _ in uses}:
        assert sorted(map(id, value.uses)) == sorted(id(op) for v, op in uses if v is value)


@pytest.fixture
def draw(request):
    return random.Random(request.config.option.seed)


def test_kernels_do_what_their_jumps_say(draw):
    for _ in range(GRAPHS):
        kernel, functions = parse(function("k", Graph(draw, 0).text(), "public"))
        before = behaviour(kernel, functions)
        structure(kernel, functions, keep=lambda _: False)
        assert len(kernel.regions[0]) == 1
        check_structured(kernel)
        assert behaviour(kernel, functions) == before


CALLING = """\
  ^bb0(%a: i32, %b: i32):
    %c = "arith.cmpi"(%a, %b) <{predicate = 2 : i64}> : (i32, i32) -> i1
    %0:2 = "scf.if"(%c) ({
      %1:2 = "tt.call"(%a, %b) <{callee = @f}> : (i32, i32) -> (i32, i32)
      "test.effect"(%1#1) : (i32) -> ()
      %2:2 = "tt.call"(%1#0, %1#1) <{callee = @f}> : (i32, i32) -> (i32, i32)
      "scf.yield"(%2#1, %1#0) : (i32, i32) -> ()
    }, {
      %3:2 = "tt.call"(%b, %a) <{callee = @g}> : (i32, i32) -> (i32, i32)
      "scf.yield"(%3#0, %3#1) : (i32, i32) -> ()
    }) : (i1) -> (i32, i32)
    "test.effect"(%0#0) : (i32) -> ()
    "test.effect"(%0#1) : (i32) -> ()
    "tt.return"() : () -> ()"""
TWICE = """\
  ^bb0(%a: i32, %b: i32):
    %0:2 = "tt.call"(%b, %a) <{callee = @f}> : (i32, i32) -> (i32, i32)
    "tt.return"(%0#1, %a) : (i32, i32) -> ()"""


def test_functions_in_branches_do_what_their_jumps_say(draw):
    for _ in range(GRAPHS):
        kernel, functions = parse(
            function("k", CALLING, "public"),
            function("f", Graph(draw, 2).text(), "private"),
            function("g", TWICE, "private"),
        )
        before = behaviour(kernel, functions)
        structure(kernel, functions, keep=lambda _: False)
        check_structured(kernel)
        assert behaviour(kernel, functions) == before


def test_a_hundred_early_returns_are_no_deeper_than_one():
    """What follows on an early return of a program stays beside it, and is not written twice."""
    blocks = "\n".join(
        f'  ^bb{n}:\n    "test.effect"(%a) : (i32) -> ()\n'
        f'    %c{n} = "arith.cmpi"(%a, %b) <{{predicate = 2 : i64}}> : (i32, i32) -> i1\n'
        f'    "cf.cond_br"(%c{n})[^bb999, ^bb{n + 1}] : (i1) -> ()'
        for n in range(1, 100)
    )
    text = f'  ^bb0(%a: i32, %b: i32):\n    "cf.br"()[^bb1] : () -> ()\n{blocks}\n'
    text += '  ^bb100:\n    "tt.return"() : () -> ()\n  ^bb999:\n    "tt.return"() : () -> ()'
    kernel, functions = parse(function("k", text, "public"))
    structure(kernel, functions, keep=lambda _: False)
    names = [op.name for op in walk(kernel.regions[0])]
    assert names.count("test.effect") == names.count(RETURN_IF) == 99
    assert "scf.if" not in names


BACK = """\
  ^bb0(%a: i32, %b: i32):
    "cf.br"()[^bb1] : () -> ()
  ^bb1:
    %c = "arith.cmpi"(%a, %b) <{predicate = 2 : i64}> : (i32, i32) -> i1
    "cf.cond_br"(%c)[^bb1, ^bb2] : (i1) -> ()
  ^bb2:
    "tt.return"() : () -> ()"""
CALL = """\
  ^bb0(%a: i32, %b: i32):
    %0:2 = "tt.call"(%a, %b) <{callee = @f}> : (i32, i32) -> (i32, i32)
    "tt.return"() : () -> ()"""


@pytest.mark.parametrize(
    ("why", "functions"),
    [
        ("it jumps back", [function("k", BACK, "public")]),
        ("`f` is not known", [function("k", CALL, "public")]),
        ("`f` calls itself", [function("k", CALL, "public"), function("f", TWICE, "private")]),
    ],
    ids=["a loop of jumps", "an unknown function", "recursion"],
)
def test_what_cannot_be_structured_is_refused_by_name(why, functions):
    kernel, known = parse(*functions)
    with pytest.raises(UnsupportedOperation, match=why):
        structure(kernel, known, keep=lambda _: False)


def test_calls_that_are_to_stay_stay():
    kernel, functions = parse(function("k", CALL, "public"))
    structure(kernel, functions, keep=lambda name: name == "f")
    assert [op.name for op in walk(kernel.regions[0])] == ["tt.call", "tt.return"]
