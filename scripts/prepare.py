"""python scripts/prepare.py is vibechat prepare."""

from vibechat.programs.prepare import main

if __name__ == "__main__":
    raise SystemExit(main())
