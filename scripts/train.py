"""python scripts/train.py is vibechat train."""

from vibechat.programs.train import main

if __name__ == "__main__":
    raise SystemExit(main())
