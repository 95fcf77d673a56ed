"""python scripts/report.py is vibechat report."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, installed or not

from vibechat.programs.report import main

if __name__ == "__main__":
    raise SystemExit(main())
