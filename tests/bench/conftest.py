"""The benchmarks are no part of the wheel: find them in the checkout that is tested."""

import sys
from pathlib import Path

CHECKOUT = str(Path(__file__).parents[2])
if CHECKOUT not in sys.path:
    sys.path.insert(0, CHECKOUT)
