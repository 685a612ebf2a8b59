"""Puts the checkout on the path for tests of `bench`, which is not installed: last, behind the installed package."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
