"""python scripts/report.py is vibechat report."""

from vibechat.programs.report import main

if __name__ == "__main__":
    raise SystemExit(main())
