"""python scripts/base_loss.py is vibechat base-loss."""

from vibechat.programs.base_loss import main

if __name__ == "__main__":
    raise SystemExit(main())
