"""Train a base model: one dial, --depth, and everything else follows."""

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

from vibechat.configurator import run_program


@dataclass(frozen=True)
class Config:
    """What `vibechat train` takes. None stands for the default of this machine (see DEFAULTS)."""

    # --- Model
    depth: int | None = None
    """layers; every other size follows from it (20 with a GPU, 4 without)"""
    max_seq_len: int | None = None
    """tokens in a row (2048 with a GPU, 512 without)"""
    vocab_size: int | None = None
    """of the tokenizer, which is trained if there is none (65536 with a GPU, 8192 without)"""
    # --- Length of the run; the first that is positive counts
    num_iterations: int | None = None
    """updates (1000 without a GPU)"""
    target_flops: float = -1.0
    """training FLOPs to spend"""
    target_param_data_ratio: float | None = None
    """training tokens for each parameter (20 with a GPU)"""
    # --- Batch
    device_batch_size: int | Literal["auto"] | None = None
    """rows in a micro-batch; auto takes the largest that fits (auto with a GPU, 8 without)"""
    total_batch_size: int | None = None
    """tokens in an update (524288 with a GPU, 4096 without)"""
    activation_checkpointing: bool = False
    """keep only the inputs of each block and compute the rest again in the backward: less memory, slower steps"""
    # --- Optimization
    embedding_lr: float | None = None
    """learning rate of the token embedding, AdamW"""
    unembedding_lr: float | None = None
    """learning rate of the head, AdamW"""
    matrix_lr: float | None = None
    """learning rate of the matrices"""
    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    """optimizer of the matrices; adamw needs a --matrix-lr of its own, some 0.003"""
    weight_decay: float | None = None
    """weight decay of AdamW"""
    matrix_weight_decay: float | None = None
    """weight decay of Muon, where its update makes a weight smaller anyway (0.1)"""
    normuon: bool | None = None
    """Muon with every row of an update at the same running size (on)"""
    grad_clip: float = 0.0
    """largest gradient norm; 0 clips nothing"""
    seed: int = 42
    """of the weights and of the order of the data"""
    # --- Data
    data: str | None = None
    """builtin, fineweb-edu, climbmix, or globs of parquet, jsonl or txt (fineweb-edu with a GPU, builtin without)"""
    val_data: str | None = None
    """globs of files to validate on"""
    text_column: str = "text"
    """the column or field of --data that holds the text"""
    num_shards: int | None = None
    """of fineweb-edu or climbmix: training shards to use, downloaded where missing (as many as the run's tokens need);
    -1 takes those that are here"""
    # --- Between steps; -1 turns a thing off
    eval_every: int | None = None
    """steps between measurements of validation bits per byte (250)"""
    eval_tokens: int | None = None
    """tokens to score, always the same ones (10485760 with a GPU, 65536 without)"""
    sample_every: int | None = None
    """steps between samples (500)"""
    save_every: int | None = None
    """steps between checkpoints (250); the end is always saved"""
    keep: int | None = None
    """checkpoints to keep (2); -1 keeps all"""
    # --- Run
    resume: str = "never"
    """never, auto (the newest whole checkpoint, if there is one) or a step"""
    model_tag: str | None = None
    """name of the model's directory of checkpoints; d and the depth if not given"""
    run: str = dataclasses.field(default_factory=lambda: os.environ.get("WANDB_RUN", "dummy"))
    """name of the run's directory; dummy takes the tag and the time"""
    wandb: bool = dataclasses.field(default_factory=lambda: os.environ.get("WANDB_RUN", "dummy") != "dummy")
    """log to wandb too, where it is installed (WANDB_RUN=name asks for it and names the run)"""
    demo: bool = False
    """the run of `make demo`: small, with the built-in corpus, and continued if it was broken off"""
    profile: bool = False
    """write a torch profiler trace of a few steps into the run's directory"""
    # --- Machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to train"""
    compile: bool | None = None
    """compile the model with torch.compile (on, where there is a compiler)"""
    cuda_graphs: bool = False
    """replay compiled steps as CUDA graphs: for small models on a GPU, whose kernels are shorter than their launch"""
    kernels: str = dataclasses.field(default_factory=lambda: os.environ.get("VIBECHAT_KERNELS") or "auto")
    """which kernels run: auto, triton or torch, with exceptions like auto,relu2_mlp=torch (VIBECHAT_KERNELS=choice
    asks for it too)"""
    attention: str = dataclasses.field(default_factory=lambda: os.environ.get("VIBECHAT_ATTENTION") or "auto")
    """what attends: auto (cuDNN on Hopper and later), cudnn, flash, efficient, flex, math or sdpa (PyTorch's own
    choice); what is not there is refused (VIBECHAT_ATTENTION=way asks for it too)"""
    fp8: bool = False
    """the blocks' matmuls in fp8 in training (Hopper and later); master weights, head, loss and evaluation as ever"""
    deterministic: bool | None = None
    """bitwise reproducible steps (always on a CPU; on a GPU at a cost in speed)"""

    def __post_init__(self) -> None:
        """Raise ValueError for a number that no run can be made of, before anything is done about it."""
        for name, value in vars(self).items():
            least, bound = SMALLEST.get(name, -math.inf), math.inf if isinstance(value, float) else 2**63
            if isinstance(value, int | float) and not least <= value < bound:
                wanted = f"at least {least}" if value < least else "a usable number"
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be {wanted}")
        if self.matrix_optimizer == "adamw" and self.matrix_lr is None:
            raise ValueError("--matrix-optimizer adamw: also needs --matrix-lr (Muon's is far too large; try 0.003)")
        of_muon = [f"--{name.replace('_', '-')}" for name in OF_MUON if getattr(self, name)]
        if self.matrix_optimizer == "adamw" and of_muon:
            raise ValueError(f"--matrix-optimizer adamw: leave out {' and '.join(of_muon)}, which Muon alone has")


# What --matrix-optimizer adamw does without, and so did every version that does not mention it in a checkpoint.
OF_MUON: dict[str, Any] = {"normuon": False, "matrix_weight_decay": 0.0}
# What a number must be at least.
SMALLEST: dict[str, int] = {
    **dict.fromkeys(("depth", "max_seq_len", "device_batch_size", "total_batch_size", "eval_tokens"), 1),
    **dict.fromkeys(("embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay", "matrix_weight_decay"), 0),
    **dict.fromkeys(("grad_clip", "seed"), 0),
}
# Where nothing was said: (with a GPU, without).
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "depth": (20, 4),
    "max_seq_len": (2048, 512),
    "num_iterations": (-1, 1000),
    "target_param_data_ratio": (20.0, -1.0),
    "device_batch_size": ("auto", 8),
    "total_batch_size": (524_288, 4096),
    "data": ("fineweb-edu", "builtin"),
    "eval_every": (250, 250),
    "eval_tokens": (20 * 524_288, 65_536),
    "sample_every": (500, 500),
    "save_every": (250, 250),
    "keep": (2, 2),
    "matrix_weight_decay": (0.1, 0.1),
    "normuon": (True, True),
    "compile": (True, True),
    "deterministic": (False, True),
}
# What --demo says where a person did not.
DEMO: dict[str, Any] = {"model_tag": "demo", "resume": "auto", "eval_every": 100}
# A continued run takes what was not said from its checkpoint. Of these nothing else may be said (of data, their hash
# decides), and what only this process is about is not taken.
IDENTITY = (
    *("depth", "max_seq_len", "vocab_size", "num_iterations", "target_flops", "target_param_data_ratio"),
    *("device_batch_size", "total_batch_size", "activation_checkpointing", "cuda_graphs", "deterministic"),
    *("embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay"),
    *("matrix_optimizer", "matrix_weight_decay", "normuon", "grad_clip", "seed", "compile", "kernels", "attention"),
)
OF_THIS_PROCESS = ("resume", "model_tag", "run", "wandb", "demo", "profile", "device")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run_program(train, Config, argv, prog="vibechat train", description=__doc__)


def train(config: Config) -> int:
    """Train as `config` says; returns the exit status: 130 after Ctrl-C, else 0."""
    from vibechat.base_run import BaseRun, find_start  # late: it loads torch, and --help must not wait for that
    from vibechat.checkpoint_manager import checkpoints_dir, lock_tag
    from vibechat.common import compute_cleanup, compute_init, print0, print_banner
    from vibechat.run_directory import check_run_name

    config = with_demo(config)
    if config.run:
        check_run_name(config.run)
    device = compute_init(device_type="" if config.device == "auto" else config.device)[-1]
    gpu = device.type == "cuda" and not config.demo
    print_banner()
    directory = checkpoints_dir("base", config.model_tag or f"d{config.depth or DEFAULTS['depth'][0 if gpu else 1]}")
    with lock_tag(directory), contextlib.ExitStack() as stack:
        stack.callback(compute_cleanup)
        start = find_start(config.resume, directory)
        settings = settle(config, gpu=gpu, before=start.meta and start.meta["train_config"])
        if start.meta is not None:
            print0(f"continuing {directory} after step {start.step}")
        return BaseRun(settings, device, directory, start, stack).train()


def with_demo(config: Config) -> Config:
    """`config` with what --demo says where a person said nothing."""
    if not config.demo:
        return config
    plain = Config()
    fill = {name: value for name, value in DEMO.items() if getattr(config, name) == getattr(plain, name)}
    return dataclasses.replace(config, **fill)


def settle(config: Config, *, gpu: bool, before: dict[str, Any] | None) -> Config:
    """`config` with every default filled in, or taken from the checkpoint's configuration `before`.

    Raises UserError if what was said is not what the checkpoint was trained with, or rows do not make a batch.
    """
    from vibechat.common import UserError

    values, plain = dataclasses.asdict(config), dataclasses.asdict(Config())
    for name, said in values.items():
        unsaid = said == plain[name]
        if before is not None and name not in OF_THIS_PROCESS:
            trained_with = before.get(name, OF_MUON.get(name, plain[name]))  # if it is older than a flag
            if name in IDENTITY and not unsaid and said not in (trained_with, "auto"):
                raise UserError(
                    f"--{name.replace('_', '-')} {said}: the checkpoint was trained with {trained_with}; "
                    "leave it out, or choose another --model-tag"
                )
            values[name] = trained_with if unsaid or name in IDENTITY else said
        elif said is None and name in DEFAULTS:
            values[name] = DEFAULTS[name][0 if gpu else 1]
    if values["matrix_optimizer"] == "adamw":
        values |= OF_MUON  # some versions recorded others beside it, with which they did nothing
    other_length = config.target_flops > 0 or (config.target_param_data_ratio or -1) > 0
    if before is None and config.num_iterations is None and other_length:
        values["num_iterations"] = -1
    if values["total_batch_size"] % values["max_seq_len"]:
        raise UserError(
            f"--total-batch-size {values['total_batch_size']}: must be a multiple of --max-seq-len "
            f"{values['max_seq_len']}, the tokens of a row"
        )
    return Config(**values)
