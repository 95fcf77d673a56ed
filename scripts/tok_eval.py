"""python scripts/tok_eval.py is vibechat tok_eval."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, installed or not

from vibechat.programs.tok_eval import main

if __name__ == "__main__":
    raise SystemExit(main())
