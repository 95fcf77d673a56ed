"""Baselines of the training step, and the gate that holds a run against them.

`bench/baselines/<device>.json` holds one baseline for each combination of device, instruction set, threads, versions
and workload. A run fails where it is below (1 - tolerance) of its baseline: the ratio to eager, measured in the same
run in interleaved pairs, on every device; MFU on a GPU alone, since a CPU's clock belongs to its neighbours. The
tolerance is 5%, or how far the pairs of the two runs spread if that is more; a run that spreads past a quarter says
nothing and is refused.

A baseline changes by `record` alone, which keeps who changed it, why, and from what to what.
"""

import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import device_name, publish, triton_version
from vibechat.common import UserError, cpu_flags
from vibechat.kernels.tuning import device_slug

DIRECTORY = Path(__file__).parent / "baselines"
LEAST_TOLERANCE = 0.05
WIDEST_SPREAD = 0.25
WORKLOAD = (
    *("depth", "max_seq_len", "vocab_size", "micro_batch", "total_batch_size", "data"),
    *("activation_checkpointing", "cuda_graphs"),
)
GATED = {"ratio_to_eager": "every device", "mfu": "a GPU"}


def machine(device: torch.device) -> dict[str, Any]:
    """What a speed depends on beside the code: the keys that a baseline must share with a run."""
    if device.type == "cuda":
        instruction_set = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        extras = sorted({"amx_bf16", "avx512_bf16"} & cpu_flags())
        instruction_set = "+".join([torch.backends.cpu.get_cpu_capability(), *extras])
    return {
        "device": device_name(device),
        "device_type": device.type,
        "instruction_set": instruction_set,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def spread(values: Sequence[float]) -> float:
    """How far the middle half of some values lies apart (all of them, where they are few), by their median."""
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.75))
    return (high - low) / statistics.median(ordered)


def file_of(run: dict[str, Any]) -> Path:
    """Where the baselines of a run's device stand."""
    return DIRECTORY / f"{device_slug(run['machine']['device'])}.json"


def _key(run: dict[str, Any]) -> dict[str, Any]:
    return {**run["machine"], **{name: run["workload"][name] for name in WORKLOAD}}


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["baselines"] if path.is_file() else []


def find(run: dict[str, Any], command: str) -> dict[str, Any]:
    """The baseline of a run's machine and workload.

    Raises UserError, naming what differs from the nearest one and the command that makes one.
    """
    key, path = _key(run), file_of(run)
    found = _read(path)
    for entry in found:
        if entry["key"] == key:
            return entry
    differences = [[name for name in key if entry["key"].get(name) != key[name]] for entry in found]
    nearest = min(differences, key=len, default=None)
    why = f"the nearest differs in {', '.join(nearest)}" if nearest else "this device has none"
    raise UserError(f"no baseline in {path.parent.name}/{path.name} for this run ({why}): make one with `{command}`")


def numbers(run: dict[str, Any]) -> dict[str, float]:
    """What a baseline keeps of a run."""
    row = run["rows"]["vibechat"]
    kept = {name: row[name] for name in ("ratio_to_eager", "ratio_to_plain", "mfu", "mfu_full") if name in row}
    return {**kept, "tokens_per_second": row["tokens_per_second"], "spread": row["pair_spread"]}


def tolerance(run: dict[str, Any], baseline: dict[str, Any]) -> float:
    """How far below its baseline a run may be. Raises UserError if it spreads too far to say anything."""
    here, there = run["rows"]["vibechat"]["pair_spread"], baseline["numbers"]["spread"]
    if here > WIDEST_SPREAD:
        raise UserError(
            f"the pairs of this run spread by {100 * here:.0f}%, which says nothing: end what else runs here, or take "
            "more --rounds"
        )
    return max(LEAST_TOLERANCE, here, there)


def check(run: dict[str, Any], baseline: dict[str, Any]) -> tuple[bool, list[str]]:
    """(whether a run holds its baseline, a line for each number that is held)."""
    allowed, fine, lines = tolerance(run, baseline), True, []
    measured, recorded = numbers(run), baseline["numbers"]
    for name in GATED:
        if name == "mfu" and run["machine"]["device_type"] != "cuda":
            continue
        share = measured[name] / recorded[name]
        held = share >= 1 - allowed
        fine &= held
        verdict = "holds" if held else "FAILS"
        lines.append(
            f"{name}: {measured[name]:.3f} is {share:.3f} of its baseline {recorded[name]:.3f} "
            f"({verdict}: at least {1 - allowed:.3f})"
        )
    return fine, lines


def record(run: dict[str, Any], who: str, why: str) -> str:
    """Make a run the baseline of its machine and workload; returns a line that says what changed.

    Raises UserError if nobody says who and why, or the run spreads too far.
    """
    if not who.strip() or not why.strip():
        raise UserError("a baseline needs --who NAME and --why TEXT")
    if "ratio_to_eager" not in run["rows"].get("vibechat", {}):
        raise UserError("a baseline needs a run of vibechat and eager")
    new = numbers(run)
    if new["spread"] > WIDEST_SPREAD:
        raise UserError(f"the pairs of this run spread by {100 * new['spread']:.0f}%: a baseline needs a quiet machine")
    key, path = _key(run), file_of(run)
    entries = _read(path)
    entry = next((entry for entry in entries if entry["key"] == key), None)
    if entry is None:
        entry = {"key": key, "numbers": {}, "history": []}
        entries.append(entry)
    old = entry["numbers"] or None
    entry["numbers"] = new
    entry["history"].append(
        {
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "who": who,
            "why": why,
            "commit": run["environment"]["commit"],
            "command": run["environment"]["command"],
            "from": old,
            "to": new,
        }
    )
    publish(path, {"baselines": entries})
    before = f"{old['ratio_to_eager']:.3f}" if old else "none"
    return f"{path.name}: ratio to eager {before} -> {new['ratio_to_eager']:.3f}, by {who}: {why}"
