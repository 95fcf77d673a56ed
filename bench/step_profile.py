"""`python -m bench.step_profile`: where the device's time goes in one training step, op by op.

Three forms of the same step, each in turn: `eager` and `compiled` with plain PyTorch only, `fused` compiled with every
kernel that there is. For each the seconds of a step (after a warm-up, profiler off), MFU with causal attention, and
the device's time by kernel; written to profile.json as each is known.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import device_name, provenance, results_directory
from vibechat.common import compute_dtype, peak_flops
from vibechat.gpt import GPT
from vibechat.kernels import backend_table, set_backend
from vibechat.scaling import plan
from vibechat.train_step import TrainStep
from vibechat.trainer import measure_matmul_flops

FORMS = {"eager": (False, "torch"), "compiled": (True, "torch"), "fused": (True, "triton")}


def by_kernel(events: Any, on_gpu: bool) -> list[dict[str, Any]]:
    """Calls and seconds of every kernel (every operator on a CPU), the longest first."""
    rows = []
    for event in events:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            rows.append({"name": event.key, "calls": event.count, "seconds": microseconds / 1e6})
    return sorted(rows, key=lambda row: -row["seconds"])


def measure(form: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One form: seconds a step, MFU, memory, and the profile of one step."""
    compiled, kernels = FORMS[form]
    set_backend(kernels if device.type == "cuda" else "torch")
    dtype = compute_dtype(device)
    tokens = args.batch * args.length
    run = plan(
        args.depth, sequence_len=args.length, vocab_size=args.vocab, total_batch_size=tokens, num_iterations=10**6
    )
    torch.manual_seed(0)
    model = GPT(run.model_config).to(device)
    model.init_weights()
    step = TrainStep(model, model.setup_optimizers(), compile=compiled, say=print)
    batches = [torch.randint(args.vocab, (args.batch, args.length + 1), device=device) for _ in range(4)]

    def one(index: int) -> float:
        batch = batches[index % len(batches)]
        start = time.perf_counter()
        step([(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for index in range(args.warmup):
        one(index)
    seconds = statistics.median([one(index) for index in range(args.steps)])
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        one(0)
    peak = (peak_flops(device_name(device)) if on_gpu else None) or measure_matmul_flops(device, dtype)
    return {
        "form": form,
        "kernels": [list(choice) for choice in backend_table(device, dtype)],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": tokens / seconds * model.estimate_flops(causal=True) / peak,
        "mfu_full": tokens / seconds * model.estimate_flops() / peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "profile": by_kernel(profiler.key_averages(), on_gpu),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure each form, print its longest kernels, write profile.json."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="one training step, kernel by kernel")
    parser.add_argument("--depth", type=int, default=26 if gpu else 2)
    parser.add_argument("--batch", type=int, default=16 if gpu else 2)
    parser.add_argument("--length", type=int, default=2048 if gpu else 64)
    parser.add_argument("--vocab", type=int, default=65_536 if gpu else 512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    args = parser.parse_args(argv)
    device = torch.device("cuda" if gpu else "cpu")
    path = results_directory(device) / "profile.json"
    content: dict[str, Any] = {**provenance(device), "forms": []}
    for form in args.forms:
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        result = measure(form, args, device)
        content["forms"].append(result)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{form}: {1e3 * result['seconds']:.1f} ms a step, {100 * result['mfu']:.1f}% MFU", flush=True)
        for row in result["profile"][:15]:
            print(f"  {1e3 * row['seconds']:9.3f} ms {row['calls']:5d}x {row['name'][:90]}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
