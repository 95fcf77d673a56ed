"""Checkpoints: atomic save, verified load, find, prune.

    <base>/{base,mid,sft,rl}_checkpoints/<tag>/      one model; `.lock` is held by the run that trains it
        step_000123/                                 the state after 123 updates
            model.safetensors
            optimizer_00000.safetensors              "<parameter name>/<state>"; one file for each rank that saved
            meta.json  loader.json
            manifest.json                            size and sha256 of each of the above

A step is written under a temporary name (`.tmp-*`), flushed to disk file by file, and renamed: a kill at any instant
leaves the steps that were there, and the new one either whole or not at all. A step is never overwritten. A removal
renames first (`.trash-*`), so that nothing half-deleted bears a step's name. What a dead run left under those two
names is removed by the next save. Loading checks every file that it reads against the manifest. Nothing is pickled.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vibechat.common import UserError, compute_dtype, get_base_dir
from vibechat.gpt import GPT, GPTConfig
from vibechat.tokenizer import RustBPETokenizer, get_tokenizer

FORMAT_VERSION = 1
SOURCES = ("base", "mid", "sft", "rl")
MODEL, META, LOADER, MANIFEST = "model.safetensors", "meta.json", "loader.json", "manifest.json"
FREE_MARGIN_BYTES = 64 << 20  # what a save leaves free for metrics, reports and everybody else

OptimizerData = dict[str, dict[str, torch.Tensor]]  # {parameter name: {state: tensor}}


class CorruptCheckpointError(UserError):
    """A checkpoint whose files are not what its manifest says."""


# ---------------------------------------------------------------------------------------------------------------------
# names


def checkpoints_dir(source: str, model_tag: str | None = None) -> Path:
    """`<base>/<source>_checkpoints`, or a tag's directory in it. Nothing is created.

    Raises UserError for an unknown source or a tag that could not be one directory's name.
    """
    if source not in SOURCES:
        raise UserError(f"unknown model source {source!r}: one of {', '.join(SOURCES)}")
    directory = Path(get_base_dir()) / f"{source}_checkpoints"
    if model_tag is None:
        return directory
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", model_tag):
        raise UserError(
            f"model tag {model_tag!r}: use letters, digits, '.', '_' and '-', and start with a letter or digit"
        )
    return directory / model_tag


def step_dir(checkpoint_dir: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return Path(checkpoint_dir) / f"step_{step:06d}"


def list_steps(checkpoint_dir: str | Path) -> list[int]:
    """The steps that are saved in `checkpoint_dir`, ascending; empty where there is no such directory. Unverified."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        matches = (re.fullmatch(r"step_(\d{6,})", path.name) for path in Path(checkpoint_dir).iterdir())
        return sorted(int(match[1]) for match in matches if match)
    return []


def find_last_step(checkpoint_dir: str) -> int:
    """The newest step saved in `checkpoint_dir` (unverified: `load_last_checkpoint` finds the newest that is whole).

    Raises UserError if there is none.
    """
    steps = list_steps(checkpoint_dir)
    if not steps:
        raise UserError(f"no checkpoint in {checkpoint_dir}: train a model first, or name another --model-tag")
    return steps[-1]


def find_largest_model(checkpoint_dir: str) -> str:
    """The tag in `checkpoint_dir` (a `*_checkpoints` directory) whose last step has the most bytes of weights.

    Of two that are equal the one saved later is taken. Raises UserError if there is none.
    """
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(Path(checkpoint_dir).iterdir()):
            for step in list_steps(path)[-1:]:
                weights = step_dir(path, step) / MODEL
                if weights.exists():
                    found.append((weights.stat().st_size, weights.stat().st_mtime_ns, path.name))
    if not found:
        raise UserError(f"no model in {checkpoint_dir}: train one first (make demo trains a small one)")
    return max(found)[2]


# ---------------------------------------------------------------------------------------------------------------------
# one writer for each tag


@contextlib.contextmanager
def lock_tag(checkpoint_dir: str | Path) -> Iterator[None]:
    """Hold `checkpoint_dir` for this process; created if missing. The lock of a process that died does not block.

    Within one process it may be entered again (a save inside a run). Raises UserError if another process holds it.
    """
    directory = Path(checkpoint_dir)
    _make_directory(directory)
    lock = FileLock(directory / ".lock", is_singleton=True, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{directory} is locked by a live run: wait until it has ended and continue it with --resume auto, "
            "or choose another --model-tag"
        ) from None
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------------------------------
# saving


def save_checkpoint(
    checkpoint_dir: str,
    step: int,
    model_data: dict[str, torch.Tensor],
    optimizer_data: OptimizerData | None,
    meta_data: dict[str, Any],
    *,
    loader_data: dict[str, Any] | None = None,
    keep: int = -1,
) -> Path:
    """Write the state after `step` updates, whole or not at all, then remove all but the newest `keep` steps.

    Args:
        checkpoint_dir: the tag's directory, created if missing.
        step: updates done so far.
        model_data: {parameter name: tensor}, from any device.
        optimizer_data: {parameter name: {state: tensor}}, or None to save none.
        meta_data, loader_data: anything that JSON can hold.
        keep: how many steps to keep; -1 keeps all.

    Returns:
        The step's directory.

    Raises:
        UserError: if the step is there already, if another process holds the tag, or if the disk has too little room
            or is full. Nothing that was there is touched by a failure.
    """
    directory, final = Path(checkpoint_dir), step_dir(checkpoint_dir, step)
    tensors = {MODEL: model_data}
    if optimizer_data is not None:
        flat = {f"{name}/{key}": value for name, state in optimizer_data.items() for key, value in state.items()}
        tensors["optimizer_00000.safetensors"] = flat
    documents = {META: meta_data, LOADER: loader_data}
    with lock_tag(directory):
        if final.exists():
            raise UserError(
                f"{final} is there already and is never overwritten: remove it, or choose another --model-tag"
            )
        _remove_leftovers(directory)
        check_free_disk(directory, checkpoint_bytes(model_data, optimizer_data))
        temporary = directory / f".tmp-{final.name}-{secrets.token_hex(4)}"
        try:
            _write_step(temporary, step, tensors, documents)
            temporary.rename(final)
            _sync(directory)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(_failed_save(final, error)) from error
        prune_checkpoints(directory, keep)
    return final


def checkpoint_bytes(model_data: dict[str, torch.Tensor], optimizer_data: OptimizerData | None) -> int:
    """How many bytes of tensors a checkpoint of these holds."""
    states = (value for state in (optimizer_data or {}).values() for value in state.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model_data.values(), *states])


def check_free_disk(directory: Path, needed_bytes: int) -> None:
    """Raise UserError unless the disk of `directory` (which must exist) can take `needed_bytes` and a margin."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes + FREE_MARGIN_BYTES:
        raise UserError(
            f"a checkpoint in {directory} needs {(needed_bytes + FREE_MARGIN_BYTES) / 2**20:,.0f} MiB and "
            f"{free / 2**20:,.0f} MiB are free: free some space, or set VIBECHAT_BASE_DIR to another disk"
        )


def _write_step(
    directory: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], documents: dict[str, Any]
) -> None:
    directory.mkdir()
    for name, named in tensors.items():
        save_file({key: value.detach().contiguous() for key, value in named.items()}, directory / name)
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
        for name in [*tensors, *documents]
    }
    # Compact, so that there is no byte in it (white space) that could flip unnoticed.
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")), encoding="utf-8")
    for name in [*files, MANIFEST]:
        _sync(directory / name)
    _sync(directory)


def _failed_save(final: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    reason = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
    steps = list_steps(final.parent)
    kept = f"the last good checkpoint is {step_dir(final.parent, steps[-1])}" if steps else "there is no earlier one"
    return f"could not save {final}: {reason}; {kept}"


def prune_checkpoints(checkpoint_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` steps (-1: none), but never the newest one whose files verify."""
    steps = list_steps(checkpoint_dir)
    doomed = steps[: max(0, len(steps) - keep)] if keep >= 0 else []
    if doomed and not any(_is_whole(checkpoint_dir, step) for step in reversed(steps[len(doomed) :])):
        newest_whole = next((step for step in reversed(doomed) if _is_whole(checkpoint_dir, step)), None)
        doomed = [step for step in doomed if step != newest_whole]
    for step in doomed:
        trash = Path(checkpoint_dir) / f".trash-step_{step:06d}-{secrets.token_hex(4)}"
        try:
            step_dir(checkpoint_dir, step).rename(trash)
        except OSError as error:
            print(f"could not remove {step_dir(checkpoint_dir, step)}: {error.strerror}", flush=True)
            continue
        shutil.rmtree(trash, ignore_errors=True)


def set_aside(checkpoint_dir: str | Path, step: int) -> Path:
    """Rename a step so that no program finds it any more, keeping its files; returns where it lies now."""
    with lock_tag(checkpoint_dir):
        aside = Path(checkpoint_dir) / f"aside_step_{step:06d}_{secrets.token_hex(4)}"
        step_dir(checkpoint_dir, step).rename(aside)
        _sync(Path(checkpoint_dir))
    return aside


def _remove_leftovers(directory: Path) -> None:
    """Remove what a dead run left. Only the holder of the tag's lock may call it: nobody else can be writing here."""
    for pattern in (".tmp-*", ".trash-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        _make_directory(directory.parent)
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {directory}: {error.strerror}") from error
        _sync(directory.parent)


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk (Windows can only flush files)."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# loading


def load_checkpoint(
    checkpoint_dir: str, step: int, device: torch.device, load_optimizer: bool = False
) -> tuple[dict[str, torch.Tensor], OptimizerData | None, dict[str, Any]]:
    """Read a step, verifying the checksum of each file that is read and the size of the others.

    Returns:
        (model_data, optimizer_data, meta_data), tensors on `device`; optimizer_data is None unless asked for and
        saved, and holds every rank's parameters.

    Raises:
        CorruptCheckpointError: if a file is missing or is not what the manifest says.
        UserError: if there is no such step.
    """
    directory = step_dir(checkpoint_dir, step)
    files = _read_manifest(directory, step)
    shards = sorted(name for name in files if name.startswith("optimizer_"))
    model_data = load_file(_verified(directory, files, MODEL), device=str(device))
    optimizer_data: OptimizerData | None = None
    if load_optimizer and shards:
        optimizer_data = {}
        for shard in shards:
            for key, value in load_file(_verified(directory, files, shard), device=str(device)).items():
                name, _, state = key.rpartition("/")
                optimizer_data.setdefault(name, {})[state] = value
    return model_data, optimizer_data, json.loads(_verified(directory, files, META).read_bytes())


def load_model(
    source: str, device: torch.device, phase: str, model_tag: str | None = None, step: int | None = None
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """The model that lies in the base directory.

    Args:
        source: "base", "mid", "sft" or "rl".
        device: where to put it.
        phase: "train" or "eval", the mode that the module is set to.
        model_tag: which one; None takes the largest.
        step: which of its checkpoints; None takes the newest that is whole.

    Returns:
        (model, tokenizer, meta_data).

    Raises:
        UserError: if there is none, it is corrupt, or the tokenizer is not the one that it was trained with.
    """
    if phase not in ("train", "eval"):
        raise ValueError(f"phase {phase!r}: one of train, eval")
    directory = checkpoints_dir(source, model_tag or find_largest_model(str(checkpoints_dir(source))))
    if step is None:
        find_last_step(str(directory))  # says so if there is none
        step = last_whole_step(directory)
        if step is None:
            raise CorruptCheckpointError(f"no checkpoint in {directory} is whole: train the model again")
    weights, _, meta = load_checkpoint(str(directory), step, device)
    tokenizer = get_tokenizer()
    before, now = str(meta["tokenizer"]), tokenizer.fingerprint()
    if before != now:
        raise UserError(
            f"{step_dir(directory, step)} was trained with another tokenizer than that in the base directory "
            f"(hash {before[:12]}, not {now[:12]}): bring it back, or train the model again"
        )
    model = GPT(GPTConfig(**meta["model_config"])).to(device)
    model.set_compute_dtype(compute_dtype(device))
    model.load_state_dict(weights)
    return model.train(phase == "train"), tokenizer, meta


def load_documents(checkpoint_dir: str | Path, step: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(meta_data, loader_data) of a step, verified, without its tensors. Raises as `load_checkpoint` does."""
    directory = step_dir(checkpoint_dir, step)
    files = _read_manifest(directory, step)
    meta, loader = (json.loads(_verified(directory, files, name).read_bytes()) for name in (META, LOADER))
    return meta, loader


def verify_checkpoint(checkpoint_dir: str | Path, step: int) -> None:
    """Check every file of a step against its manifest; raises as `load_checkpoint` does."""
    directory = step_dir(checkpoint_dir, step)
    files = _read_manifest(directory, step)
    for name in files:
        _verified(directory, files, name)


def last_whole_step(checkpoint_dir: str | Path, say: Callable[[str], None] = print) -> int | None:
    """The newest step whose files all verify, or None; says one line for each newer one that does not."""
    for step in reversed(list_steps(checkpoint_dir)):
        try:
            verify_checkpoint(checkpoint_dir, step)
        except CorruptCheckpointError as error:
            say(f"{error}; trying the checkpoint before it")
        else:
            return step
    return None


def _is_whole(checkpoint_dir: str | Path, step: int) -> bool:
    try:
        verify_checkpoint(checkpoint_dir, step)
    except UserError:
        return False
    return True


def _read_manifest(directory: Path, step: int) -> dict[str, dict[str, Any]]:
    """The manifest's files, with the sizes of all of them checked."""
    if not directory.is_dir():
        steps = ", ".join(map(str, list_steps(directory.parent))) or "none"
        raise UserError(f"there is no checkpoint {directory}; the steps there: {steps}")
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        files = {
            str(name): {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in manifest["files"].items()
        }
        version, said = manifest["format_version"], manifest["step"]
        sizes = {name: (directory / name).stat().st_size for name in {MODEL, META, LOADER} | files.keys()}
    except FileNotFoundError as error:
        raise CorruptCheckpointError(
            f"checkpoint {directory} is corrupt: {Path(error.filename).name} is missing"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CorruptCheckpointError(f"checkpoint {directory} is corrupt: {MANIFEST} cannot be read") from None
    if version != FORMAT_VERSION or said != step or not {MODEL, META, LOADER} <= files.keys():
        raise CorruptCheckpointError(
            f"checkpoint {directory} is corrupt: {MANIFEST} is of step {said}, format {version} "
            f"(expected {step}, {FORMAT_VERSION})"
        )
    for name, size in sizes.items():
        if size != files[name]["bytes"]:
            raise CorruptCheckpointError(
                f"checkpoint {directory} is corrupt: {name} has {size} bytes, not {files[name]['bytes']}"
            )
    return files


def _verified(directory: Path, files: dict[str, dict[str, Any]], name: str) -> Path:
    try:
        digest = _sha256(directory / name)
    except OSError as error:
        raise CorruptCheckpointError(f"checkpoint {directory} is corrupt: {name}: {error.strerror}") from None
    if digest != files[name]["sha256"]:
        raise CorruptCheckpointError(f"checkpoint {directory} is corrupt: {name} does not have its checksum")
    return directory / name
