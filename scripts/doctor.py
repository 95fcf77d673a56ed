"""python scripts/doctor.py is vibechat doctor."""

from vibechat.programs.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
