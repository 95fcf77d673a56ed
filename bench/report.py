"""Render recorded kernel benchmarks: `python -m bench.report [bench/results/<device>/kernels.json ...]`.

Prints, for each file, a table per pass of microseconds and the share of the ceiling that was measured in the same run,
with ours against eager, compiled and Liger; and writes a plot beside the file as <name>.png, where matplotlib is. The
ceiling is the one that the op's bytes or FLOPs come nearer to: the bandwidth of a copy, or the rate of a large matmul.
"""

import argparse
import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, Any]]


def grouped(rows: Rows) -> dict[tuple[str, str, int, str], dict[str, dict[str, Any]]]:
    """(pass, op, batch, model) -> implementation -> row, in the order of the file. With an `error`, no times."""
    groups: dict[tuple[str, str, int, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        groups[row["direction"], row["op"], row["batch"], row["model"]][row["implementation"]] = row
    return dict(groups)


def share_of_ceiling(row: dict[str, Any]) -> tuple[float, str]:
    """What part of the ceiling that binds it a row reaches, and which one that is."""
    return max((row["bandwidth_share"], "copy"), (row["matmul_share"], "matmul"))


def table(content: dict[str, Any]) -> str:
    """A benchmark file as Markdown."""
    ceilings = content["ceilings"]
    lines = [
        f"## {content['device']}",
        f"`{content['command']}`, commit {content['commit']}, torch {content['torch']}, triton {content['triton']}, "
        f"{content['time']}; ceilings: copy {ceilings['copy_bytes_per_second'] / 1e12:.3f} TB/s, "
        f"matmul {ceilings['matmul_flops_per_second'] / 1e12:.2f} TFLOP/s",
        "",
        "| pass | op | B | model | implementation | us (20% to 80%) | of ceiling | ours is | extra MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (direction, op, batch, model), rows in grouped(content["rows"]).items():
        ours = rows.get("ours")
        for implementation, row in rows.items():
            if "error" in row:
                lines.append(f"| {direction} | {op} | {batch} | {model} | {implementation} | {row['error']} | | | |")
                continue
            ratio = f"{row['median'] / ours['median']:.2f}x" if ours and "error" not in ours else ""
            share, ceiling = share_of_ceiling(row)
            extra = "" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 2**20:.0f}"
            lines.append(
                f"| {direction} | {op} | {batch} | {model} | {implementation} | {1e6 * row['median']:.1f} "
                f"({1e6 * row['low']:.1f} to {1e6 * row['high']:.1f}) | {100 * share:.0f}% of {ceiling} "
                f"| {ratio} | {extra} |"
            )
    return "\n".join(lines)


def plot(content: dict[str, Any], path: Path) -> None:
    """Share of its ceiling that every implementation reaches, forward and backward together, as a PNG."""
    from matplotlib.figure import Figure

    timed = [row for row in content["rows"] if "error" not in row]
    every = grouped(timed)
    alone = {key for key in every if key[0] == "forward" and ("both", *key[1:]) not in every}  # no backward
    groups = {key: rows for key, rows in every.items() if key[0] == "both" or key in alone}
    implementations = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    figure = Figure(figsize=(max(6, 0.9 * len(groups)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(implementations))
    for offset, name in enumerate(implementations):
        places = [i + offset * width for i, rows in enumerate(groups.values()) if name in rows]
        axes.bar(places, [100 * share_of_ceiling(rows[name])[0] for rows in groups.values() if name in rows], width)
    axes.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(groups))],
        [f"{op}\n{model} B{batch}" for _, op, batch, model in groups],
        fontsize=7,
        rotation=45,
        ha="right",
    )
    axes.legend(implementations)
    axes.set_ylabel("% of the measured copy or matmul")
    axes.set_title(f"forward and backward, {content['device']}")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Print the tables and write the plots."""
    parser = argparse.ArgumentParser(description="tables and plots from recorded kernel benchmarks")
    parser.add_argument("files", nargs="*", type=Path, help="default: everything under bench/results")
    args = parser.parse_args(argv)
    files = args.files or sorted(RESULTS.glob("*/kernels.json"))
    if not files:
        print("error: no recorded benchmarks; make some with: pytest bench --benchmark-only", file=sys.stderr)
        return 2
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            print(table(content), end="\n\n")
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {file} is no recorded benchmark: {error!r}", file=sys.stderr)
            return 2
        if importlib.util.find_spec("matplotlib"):
            plot(content, file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
