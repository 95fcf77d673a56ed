"""python scripts/tok_eval.py is vibechat tok_eval."""

from vibechat.programs.tok_eval import main

if __name__ == "__main__":
    raise SystemExit(main())
