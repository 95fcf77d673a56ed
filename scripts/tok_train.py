"""python scripts/tok_train.py is vibechat tok_train."""

from vibechat.programs.tok_train import main

if __name__ == "__main__":
    raise SystemExit(main())
