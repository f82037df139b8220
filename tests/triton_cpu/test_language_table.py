"""docs/triton-language.md says what the tests of the language say."""

import importlib.util
import sys
from pathlib import Path

import triton.language as tl

HERE = Path(__file__).parent


def load(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)
    specification.loader.exec_module(module)
    return module


table = load(HERE / "language_table.py")


def test_the_page_is_what_the_cases_say():
    page = table.DOCUMENT.read_text()
    assert page == table.document(table.collect()), "run language_table.py --write"


def test_every_public_name_of_the_language_has_a_row():
    rows = {name for names in table.REFERENCE.values() for name in names.split()}
    assert set(tl.__all__) - rows - table.NOT_OPERATIONS == set()


def test_every_row_has_a_case():
    entries = table.collect()
    rows = {name for names in table.REFERENCE.values() for name in names.split()}
    rows |= {*table.DTYPES.split(), *table.FEATURES}
    assert rows - set(entries) == set()
    assert set(entries) - rows == set(), "a mark names what is no row of the table"


def test_nearly_all_operations_run():
    entries = table.collect()
    rows = [name for names in table.REFERENCE.values() for name in names.split()]
    running = [name for name in rows if entries[name].status == "yes"]
    assert len(running) >= 0.95 * len(rows)
