"""The example of attention modes runs, and its windows hold less than full attention."""

import importlib.util
import re
from pathlib import Path

import bitnet_triton as bt

SCRIPT = Path(__file__).parents[2] / "examples" / "attention_modes.py"


def test_it_shows_what_each_mode_costs(capsys):
    spec = importlib.util.spec_from_file_location("attention_modes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with bt.use_backend("reference"):
        module.main()
    printed = capsys.readouterr().out
    full, sliding, streaming, swaa = map(int, re.findall(r"cache: (\d+) KB", printed))
    assert full == swaa > 2 * sliding
    assert sliding == streaming
    assert printed.count("% visible") == 3
