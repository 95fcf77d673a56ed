"""Score a base model in bits per byte beside zlib, bzip2 and xz, and sample it."""

from dataclasses import dataclass
from typing import Literal

from vibechat.configurator import run_program


@dataclass(frozen=True)
class Config:
    """What `vibechat base-loss` takes."""

    # --- Model
    model_tag: str | None = None
    """which model; the largest if not given"""
    step: int | None = None
    """which of its checkpoints; the newest if not given"""
    # --- Data
    data: str | None = None
    """what to score: builtin, fineweb-edu, climbmix or globs; what it was trained on if not given"""
    val_data: str | None = None
    """globs of files to validate on"""
    text_column: str = "text"
    """the column or field of --data that holds the text"""
    eval_tokens: int = 65_536
    """tokens to score of each split"""
    device_batch_size: int = 8
    """rows at a time"""
    # --- Samples
    max_tokens: int = 64
    """length of a sample; 0 for none"""
    temperature: float = 0.8
    """0 takes the most likely token each time"""
    seed: int = 42
    """of the samples"""
    # --- Machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to run"""


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run_program(score, Config, argv, prog="vibechat base-loss", description=str(__doc__))


def score(config: Config) -> None:
    """Print the table of each split, then samples."""
    from vibechat.checkpoint_manager import load_model
    from vibechat.common import UserError, compute_init, print0
    from vibechat.dataloader import Loader
    from vibechat.dataset import open_dataset
    from vibechat.evaluation import FixedRows, comparison, prompts_for, write_samples

    if config.eval_tokens < 1 or config.device_batch_size < 1:
        raise UserError("--eval-tokens and --device-batch-size must be at least 1")
    device = compute_init(device_type="" if config.device == "auto" else config.device)[-1]
    model, tokenizer, meta = load_model("base", device, "eval", config.model_tag, config.step)
    trained = meta["train_config"]
    print0(f"{model.num_params():,} parameters after {meta['step']} steps on {trained['data']}")
    if config.data is None:
        dataset = open_dataset(trained["data"], val_data=trained["val_data"], text_column=trained["text_column"])
        if dataset.fingerprint != meta["data"]:
            print0(f"warning: {trained['data']} is no longer what the model was trained on")
    else:
        dataset = open_dataset(config.data, val_data=config.val_data, text_column=config.text_column)
    for split in ("train", "val"):
        with Loader(
            dataset, tokenizer, config.device_batch_size, model.config.sequence_len, split, device=device
        ) as batches:
            rows = FixedRows(batches, config.eval_tokens, tokenizer, device)
        print0(f"\n{split}: " + "\n".join(comparison(rows.bits_per_byte(model), *rows.compressors())))
    if config.max_tokens > 0:
        print0("\nsamples:")
        prompts = prompts_for(dataset.name)
        for text in write_samples(
            model, tokenizer, prompts, max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed
        ):
            print0("  " + " ".join(text.split()))
