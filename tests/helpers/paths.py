"""Where the checkout and the real recordings are."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FSDD = Path(os.environ.get("FSDD", ROOT.parent / "shared" / "data" / "fsdd"))  # the Free Spoken Digit Dataset
GOLDEN = ROOT / "tests" / "data" / "golden"  # numbers computed by the authors' code
