"""The table of SWAA: its recipes are plans of the recall model, and it shows what was measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.training import parse_setting

SCRIPT = Path(__file__).parents[2] / "examples" / "swaa_table.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("swaa_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_recipe_is_what_its_name_says(script):
    plans = {
        name: AttentionPlan.from_config(parse_setting(text).attention, 3)
        for name, text in script.recipes(64, 16).items()
    }
    for name, plan in plans.items():
        prefill, decode = zip(*(plan.modes(layer) for layer in range(3)))
        full = [mode.sees_everything for mode in prefill]
        odd, even = [False, True, False], [True, False, True]
        wanted = odd if "odd" in name else even if "even" in name else [False] * 3
        assert full == ([True] * 3 if name == "full attention" else wanted), name
        assert all(mode.sees_everything for mode in decode) == (
            "full" in name.split(" layers")[0] and name != "odd layers full"
        )
        windows = [mode for mode in prefill if not mode.sees_everything]
        assert {mode.window for mode in windows} <= {64}
        assert {mode.sinks for mode in windows} <= {16 if "first 16" in name else 0}


def test_the_table_and_the_plot_hold_what_was_measured(script, tmp_path):
    pytest.importorskip("matplotlib")
    row = {
        when: {
            "bits_per_byte": bits,
            **{phase: dict.fromkeys(script.EASY, share) for phase in script.PHASES},
        }
        for when, bits, share in (("before", 3.5, 0.25), ("after", 3.25, 0.75))
    }
    text = script.as_markdown({"some recipe": row})
    assert text.count("| some recipe | " + " | ".join(["25 → 75"] * 7)) == 2
    assert text.count("3.500 → 3.250") == 1
    script.draw({"some recipe": row, "another": row}, tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
