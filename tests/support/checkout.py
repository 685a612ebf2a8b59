"""Where the checkout is, and puts it on the path for `bench` and `lab`: last, behind the installed package."""

import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
