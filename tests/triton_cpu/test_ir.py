"""The operations as the emitter sees them."""

from bitnet_triton.triton_cpu.analyse import walk
from bitnet_triton.triton_cpu.parse import parse_module

LINES = 200
CHAIN = "\n".join(
    f'    %{i + 1} = "arith.addi"(%{i}, %{i}) : (i32, i32) -> i32 loc(#loc)' for i in range(LINES)
)
TEXT = f"""#loc = loc("k.py":7:0)
"builtin.module"() ({{
  "tt.func"() <{{function_type = (i32) -> (), sym_name = "k", sym_visibility = "public"}}> ({{
  ^bb0(%0: i32 loc(#loc)):
{CHAIN}
    "tt.return"() : () -> () loc(#loc)
  }}) {{noinline = false}} : () -> () loc(#loc)
}}) : () -> () loc(#loc)
"""


def test_an_operation_is_printed_without_those_around_it():
    """Every operation is reached from every other: a traceback would take minutes to print."""
    module = parse_module(TEXT)
    operations = list(walk(module.regions[0]))
    assert len(operations) == LINES + 2
    for shown in (module, *operations, operations[5].block, operations[5].results[0]):
        assert len(repr(shown)) < 600
    assert "arith.addi" in repr(operations[5])
    assert "k.py:7" in repr(operations[5])
