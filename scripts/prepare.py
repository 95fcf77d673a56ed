"""python scripts/prepare.py is vibechat prepare."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, installed or not

from vibechat.programs.prepare import main

if __name__ == "__main__":
    raise SystemExit(main())
