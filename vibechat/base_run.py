"""A run of base training, put together: data, tokenizer, model, loaders, checkpoints, and what is said on the way.

The loop itself is `vibechat.trainer`; the flags and their defaults are `vibechat.programs.train`.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from vibechat.attention import attention_backend, set_attention
from vibechat.checkpoint_manager import (
    check_free_disk,
    checkpoint_bytes,
    last_whole_step,
    list_steps,
    load_checkpoint,
    load_documents,
    save_checkpoint,
    set_aside,
    step_dir,
    verify_checkpoint,
)
from vibechat.common import (
    DummyWandb,
    UserError,
    compile_obstacle,
    compute_dtype,
    get_dist_info,
    keep_freed_memory,
    print0,
    seed_everything,
)
from vibechat.dataloader import Loader
from vibechat.dataset import open_dataset
from vibechat.evaluation import Broken, FixedRows, comparison, prompts_for, write_samples
from vibechat.fp8 import LEFT_TO_COMPILER, fp8_obstacle
from vibechat.gpt import GPT
from vibechat.kernels import backend_table, set_backend, tuning_advice
from vibechat.micro_batch import check_memory, is_out_of_memory, largest_micro_batch, out_of_memory, plan_of
from vibechat.report import write_run_report
from vibechat.run_directory import Display, RunDirectory, environment, new_run_name, open_wandb, versions
from vibechat.run_tokenizer import find_tokenizer, first_tokenizer, tokenizer_characters
from vibechat.scaling import Plan, plan
from vibechat.sources.hub import SOURCES
from vibechat.tokenizer import default_vocab_size, get_tokenizer
from vibechat.train_step import (
    TrainingOptimizer,
    TrainStep,
    load_optimizer_data,
    optimizer_data,
    use_deterministic_algorithms,
)
from vibechat.trainer import Every, Hooks, Rates, Trainer, make_profiler, peak_rate

if TYPE_CHECKING:
    from vibechat.programs.train import Config


@dataclass(frozen=True)
class Start:
    """The beginning of a run: nothing, or a checkpoint."""

    step: int = 0
    meta: dict[str, Any] | None = None
    loader: dict[str, Any] | None = None


def find_start(resume: str, directory: Path) -> Start:
    """What `--resume` asks for in a tag's directory.

    Raises UserError for a tag that holds steps (never), nothing whole (auto), or no such whole step (a number).
    """
    steps = list_steps(directory)
    if resume == "never":
        if steps:
            raise UserError(
                f"{directory} already holds steps (the last is {steps[-1]}): continue it with --resume auto, "
                "or choose another --model-tag"
            )
        return Start()
    if resume == "auto":
        step = last_whole_step(directory)
        if step is None and steps:
            raise UserError(f"no checkpoint in {directory} is whole: choose another --model-tag to begin anew")
    elif resume.isdecimal():
        step = int(resume)
        verify_checkpoint(directory, step)
    else:
        raise UserError(f"--resume {resume}: must be never, auto or a step")
    return Start() if step is None else Start(step, *load_documents(directory, step))


class BaseRun:
    """Everything that a run of base training is made of; `train()` runs it.

    Args:
        settings: with no default left open.
        device: where to train.
        directory: the tag's checkpoints, locked.
        start: where to begin.
        stack: closes what the run opens.
    """

    def __init__(
        self, settings: "Config", device: torch.device, directory: Path, start: Start, stack: contextlib.ExitStack
    ) -> None:
        self.settings, self.device, self.directory, self.start = settings, device, directory, start
        self.val_bpb: float | None = None
        self.samples: list[str] = []
        self._stack = stack
        self._prepare_machine()
        self._open_data()
        self._build_model()
        self._make_step()
        self._open_loaders()
        self._open_run()
        self.trainer = self._make_trainer()

    # -- putting it together

    def _prepare_machine(self) -> None:
        keep_freed_memory()
        if self.settings.deterministic or self.device.type == "cpu":
            use_deterministic_algorithms()
        seed_everything(self.settings.seed)
        self.compile = bool(self.settings.compile)
        if self.compile and (obstacle := compile_obstacle(self.device)):
            print0(f"torch.compile cannot be used here: {obstacle}; training without it is slower")
            self.compile = False
        if self.settings.cuda_graphs and (self.device.type != "cuda" or not self.compile):
            raise UserError("--cuda-graphs needs a CUDA GPU and --compile: leave it out")
        dtype = compute_dtype(self.device)
        try:
            fused = LEFT_TO_COMPILER if self.settings.fp8 and self.compile else None
            set_backend(str(self.settings.kernels), left_to_compiler=fused)
            table = backend_table(self.device, dtype)
        except ValueError as error:
            raise UserError(f"--kernels {self.settings.kernels}: {error}") from error
        set_attention(self.settings.attention)
        attending = attention_backend(self.device, dtype)  # refuses what cannot be had
        if self.settings.fp8 and (obstacle := fp8_obstacle(self.device, dtype)):
            raise UserError(f"--fp8: {obstacle}; leave it out")
        print0(f"device {self.device}, compute dtype {str(dtype).removeprefix('torch.')}; kernels:")
        for choice in table:
            print0(f"  {choice.op:<21} {choice.backend:<7} {choice.reason}")
        print0(f"  {'attention':<21} torch   {attending}")
        if self.settings.fp8:
            print0(f"  {'linear layers':<21} torch   fp8, tensorwise scaling; the head and evaluation without it")
        if advice := tuning_advice(table):
            print0(f"  {advice}")

    def _open_data(self) -> None:
        settings, meta = self.settings, self.start.meta
        if meta is None:
            tokenizer = find_tokenizer(settings.vocab_size)
        else:
            tokenizer = get_tokenizer()
            self._same("the tokenizer", meta["tokenizer"], tokenizer.fingerprint())
        size = tokenizer.get_vocab_size() if tokenizer else settings.vocab_size or default_vocab_size(settings.demo)
        tokens = self._plan(size).tokens  # first: flags that make no run are refused before any work is done
        self.num_shards = settings.num_shards
        if self.num_shards is None and settings.data in SOURCES:
            self.num_shards = SOURCES[settings.data].shards_for(tokens, 0 if tokenizer else tokenizer_characters(size))
            print0(f"{settings.data}: {tokens:,} tokens are read from {self.num_shards:,} training shards")
        self.dataset = open_dataset(
            str(settings.data),
            val_data=settings.val_data,
            text_column=settings.text_column,
            num_shards=-1 if self.num_shards is None else self.num_shards,
        )
        if meta is not None:
            self._same("the data", meta["data"], self.dataset.fingerprint)
        self.tokenizer = tokenizer or first_tokenizer(size, self.dataset)

    def _same(self, what: str, before: str, now: str) -> None:
        if before != now:
            raise UserError(
                f"cannot continue {self.directory}: {what} is not what it was trained with (hash {now[:12]}, then "
                f"{before[:12]}); bring the old one back, or choose another --model-tag"
            )

    def _plan(self, vocab_size: int) -> Plan:
        settings, T = self.settings, self.settings.max_seq_len
        assert settings.depth is not None and T is not None and settings.total_batch_size is not None  # noqa: PT018
        try:
            return plan(
                settings.depth,
                sequence_len=T,
                vocab_size=vocab_size,
                total_batch_size=settings.total_batch_size,
                num_iterations=settings.num_iterations or -1,
                target_flops=settings.target_flops,
                target_param_data_ratio=settings.target_param_data_ratio or -1,
                matrix_optimizer=settings.matrix_optimizer,
                **self._rates(),
            )
        except ValueError as error:
            raise UserError(f"these flags make no run: {error}") from error

    def _rates(self) -> dict[str, float]:
        """The rates that a person said."""
        names = ("embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay")
        return {name: value for name in names if (value := getattr(self.settings, name)) is not None}

    def _build_model(self) -> None:
        self.plan = self._plan(self.tokenizer.get_vocab_size())
        print0(self.plan)
        check_memory(self.plan.num_params, self.device)
        self.model = GPT(self.plan.model_config).to(self.device)
        self.model.activation_checkpointing = self.settings.activation_checkpointing
        self.model.init_weights()
        self.model.set_fp8(self.settings.fp8)
        settings = self.settings
        optimizers = self.model.setup_optimizers(
            **self._rates(),
            matrix_optimizer=settings.matrix_optimizer,
            matrix_weight_decay=settings.matrix_weight_decay or 0.0,
            normuon=bool(settings.normuon),
        )
        self.optimizers = cast(list[TrainingOptimizer], optimizers)
        if self.start.meta is not None:
            if self.start.meta["model_config"] != dataclasses.asdict(self.model.config):
                raise UserError(f"cannot continue {self.directory}: this version derives another model from its flags")
            if (before := self.start.meta["versions"]) != versions():
                print0(f"warning: trained with {before}, continued with {versions()}: not bitwise the same any more")
            weights, states, _ = load_checkpoint(str(self.directory), self.start.step, self.device, load_optimizer=True)
            self.model.load_state_dict(weights)
            load_optimizer_data(self.model, self.optimizers, states or {})
        needed = checkpoint_bytes(self.model.state_dict(), optimizer_data(self.model, self.optimizers))
        check_free_disk(self.directory, needed)

    def _make_step(self) -> None:
        self.train_step = TrainStep(
            self.model,
            self.optimizers,
            compile=self.compile,
            cuda_graphs=self.settings.cuda_graphs,
            grad_clip=self.settings.grad_clip,
            say=self.say,
        )

    def _open_loaders(self) -> None:
        settings, T = self.settings, self.model.config.sequence_len
        rows = self.plan.total_batch_size // T
        wanted = settings.device_batch_size
        self.B = (
            min(rows, wanted) if isinstance(wanted, int) else largest_micro_batch(self.model, self.train_step, rows)
        )
        self.rank, self.world_size = get_dist_info()[1], get_dist_info()[3]
        self.loader = Loader(
            self.dataset,
            self.tokenizer,
            self.B,
            T,
            "train",
            rows_per_step=rows,
            rank=self.rank,
            world_size=self.world_size,
            seed=settings.seed,
            device=self.device,
            state=self.start.loader,
        )
        self._stack.callback(self.loader.close)
        print0(f"{rows} rows of {T} tokens a step, in {self.loader.micro_batches_per_step} micro-batches of {self.B}")
        print0(plan_of(self.model, self.train_step, self.B))
        self.validation: FixedRows | None = None
        if (settings.eval_every or -1) > 0:
            with Loader(self.dataset, self.tokenizer, self.B, T, "val", device=self.device) as batches:
                self.validation = FixedRows(batches, settings.eval_tokens or 1, self.tokenizer, self.device)

    def _open_run(self) -> None:
        for step in list_steps(self.directory):
            if step > self.start.step:  # corrupt, or a --resume STEP goes back before it
                print0(f"step {step} is set aside as {set_aside(self.directory, step)}")
        tag, name = self.directory.name, self.settings.run
        if self.start.meta is not None:
            self.run = RunDirectory.reopen(self.start.meta["run"], self.start.step)
        else:
            self.run = RunDirectory.create(new_run_name(tag) if name in ("", "dummy") else name)
        self._stack.callback(self.run.close)
        derived = {name: value for name, value, _ in self.plan.rows()}
        self.run.write("config.json", self._settled() | {"derived": derived})
        self.run.write("env.json", environment(self.device))
        print0(f"run {self.run.path}, checkpoints {self.directory}")
        self.wandb = open_wandb(self.run.run_id, self._settled()) if self.settings.wandb else DummyWandb()
        self._stack.callback(self.wandb.finish)
        self.display = Display(self.plan.num_iterations, self.start.step)
        self._stack.callback(self.display.close)

    def _make_trainer(self) -> Trainer:
        settings = self.settings
        peak, convention = peak_rate(self.device)
        print0(
            f"MFU is of {peak / 1e12:.4g} TFLOP/s, {convention}; train/mfu counts what causal attention needs, "
            "train/mfu_full all of T x T, as nanochat does"
        )
        return Trainer(
            self.train_step,
            self.loader,
            micro_batches=self.loader.micro_batches_per_step,
            num_iterations=self.plan.num_iterations,
            rates=Rates(
                self.plan.total_batch_size,
                self.model.estimate_flops(causal=True),
                self.model.estimate_flops(),
                peak * self.world_size,
            ),
            lr_multiplier=self.plan.lr_multiplier,
            momentum=self.plan.muon_momentum,
            start=self.start.step,
            every=Every(settings.eval_every or -1, settings.sample_every or -1, settings.save_every or -1),
            hooks=Hooks(self._log, self._evaluate, self._sample, self._save, self.say),
            last_checkpoint=step_dir(self.directory, self.start.step) if self.start.meta else None,
            profiler=make_profiler(self.run.path / "trace.json", self.device) if settings.profile else None,
        )

    def _settled(self) -> dict[str, Any]:
        """The configuration with everything that this machine decided."""
        return dataclasses.asdict(self.settings) | {
            "device_batch_size": self.B,
            "vocab_size": self.model.config.vocab_size,
            "num_shards": self.num_shards,
            "compile": self.train_step.compiled,
        }

    # -- between steps

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the progress bar if there is one."""
        if get_dist_info()[1] == 0:
            display = getattr(self, "display", None)
            (display.say if display else print0)(text)

    def _log(self, record: dict[str, Any]) -> None:
        self.run.append(record)
        self.display.step(record)
        self.wandb.log(record, step=record["step"])

    def _evaluate(self, step: int) -> float | None:
        assert self.validation is not None
        try:
            bits_per_byte = self.validation.bits_per_byte(self.model, lambda: self.trainer.stop_signal is not None)
        except Broken:
            return None
        self.val_bpb = bits_per_byte
        self.say(f"step {step}: validation {bits_per_byte:.4f} bits per byte")
        return bits_per_byte

    def _sample(self, step: int) -> None:
        self.samples = write_samples(self.model, self.tokenizer, prompts_for(str(self.settings.data)))
        self.say(f"step {step}: samples")
        for text in self.samples:
            self.say("  " + " ".join(text.split()))

    def _save(self, step: int) -> Path:
        self.run.sync()
        meta = {
            "step": step,
            "model_config": dataclasses.asdict(self.model.config),
            "train_config": self._settled(),
            "num_iterations": self.plan.num_iterations,
            "val_bpb": self.val_bpb,
            "tokenizer": self.tokenizer.fingerprint(),
            "data": self.dataset.fingerprint,
            "run": self.run.run_id,
            "versions": versions(),
        }
        path = save_checkpoint(
            str(self.directory),
            step,
            self.model.state_dict(),
            optimizer_data(self.model, self.optimizers),
            meta,
            loader_data=self.loader.state_dict(),
            keep=-1 if self.settings.keep is None else self.settings.keep,
        )
        self.say(f"step {step}: saved {path}")
        return path

    # -- the whole

    def train(self) -> int:
        """Train to the end or until a signal; returns the exit status: 130 after Ctrl-C, else 0."""
        try:
            status = self.trainer.train()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(self.model, self.train_step, self.B) from error
        self.display.close()
        if self.trainer.stop_signal is None:
            self._conclude()
        return status

    def _conclude(self) -> None:
        """The table of compressors, and the report."""
        sections: dict[str, list[Any]] = {}
        if self.validation is not None and self.val_bpb is not None:
            compressors, scored = self.validation.compressors()
            lines = comparison(self.val_bpb, compressors, scored)
            print0("\n".join(lines))
            sections["Bits per byte"] = [
                {"this model": self.val_bpb, **compressors},
                lines[-1] + f", on {scored:,} bytes",
            ]
        if self.samples:
            sections["Samples"] = [f"> {' '.join(text.split())}" for text in self.samples]
        print0(f"report: {write_run_report(self.run.path, sections=sections)}")
