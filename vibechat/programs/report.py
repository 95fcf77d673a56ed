"""Write the report of a training run again, from what the run left behind.

A run writes its own report when it ends. This program is for the run that was killed, or is still going: it reads
`runs/<id>` under the base directory and writes report.md and its plots there.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from vibechat.common import UserError, get_base_dir
from vibechat.configurator import run_program
from vibechat.report import write_run_report


@dataclass(frozen=True)
class Config:
    """What `vibechat report` takes."""

    run: str = "latest"
    """which run: its id, a path to its directory, or latest"""


def find_run(name: str) -> Path:
    """The directory of a run by id, path or `latest` (the one whose metrics were written last)."""
    if (Path(name) / "metrics.jsonl").exists():
        return Path(name)
    runs = Path(get_base_dir()) / "runs"
    written = {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
    if not written:
        raise UserError(f"no run has left metrics under {runs}; train something first: vibechat train")
    if name == "latest":
        return runs / max(written, key=lambda run: (written[run], run))
    if name not in written:
        close = difflib.get_close_matches(name, written, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(written)[-5:])}"
        raise UserError(f"--run {name}: no such run under {runs}; {hint}")
    return runs / name


def report(config: Config) -> None:
    """Write the report and say where it is."""
    print(write_run_report(find_run(config.run)))


def main(argv: list[str] | None = None) -> int:
    """Read the command line, write the report, return the exit status."""
    return run_program(report, Config, argv, prog="vibechat report", description=(__doc__ or "").partition("\n")[0])


if __name__ == "__main__":
    raise SystemExit(main())
