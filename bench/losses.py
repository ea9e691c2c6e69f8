"""Time and memory of the loss, forward and backward, beside its peers.

    python bench/losses.py                      # sizes for this machine
    python bench/losses.py --sizes 8192x2560x151936 --only "ours" --chunk 4096

Every implementation starts from the same hidden states and LM heads of student and teacher, and ends with the gradients
of the student's hidden states and head. Each runs in its own process, and one run of all makes the table. Peers that
are not installed, or do not run on the device, are listed with the reason.

Needs torch alone; `pip install trl==1.16.0 liger-kernel==0.8.5` adds those peers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from mopd_nemo.losses.logits import Head, Tokens, TopK
from mopd_nemo.losses.objectives import Divergence, Objective
from mopd_nemo.losses.reference import token_divergence
from mopd_nemo.losses.token_loss import token_loss

SIZES = {
    "cuda": ["8192x2560x151936", "2048x2560x151936", "8192x1024x32768"],
    "cpu": ["2048x128x8192", "1024x512x32768", "256x2560x151936"],
}
FLOOR, PLAIN = "four matrix products", "PyTorch: JSD"


@dataclass
class Inputs:
    """Student and teacher: hidden states [T, H] and heads [V, H]; the student's want gradients."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    ids: Tensor
    chunk: int | None

    @staticmethod
    def make(tokens: int, hidden: int, vocab: int, device: str, dtype: torch.dtype, chunk: int | None) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(*shape, device=device, dtype=dtype).normal_(0.0, scale, generator=generator)

        student, teacher = normal(tokens, hidden), normal(tokens, hidden)
        student_head, teacher_head = (normal(vocab, hidden, scale=2.0 * hidden**-0.5) for _ in range(2))
        ids = torch.randint(0, vocab, (tokens,), device=device, generator=generator)
        return Inputs(student.requires_grad_(), student_head.requires_grad_(), teacher, teacher_head, ids, chunk)


Step = Callable[[], None]
"""One forward and backward pass."""


def four_products(x: Inputs) -> Step:
    """Student logits, teacher logits, gradients of hidden states and of the head: the work that every form needs."""

    def step() -> None:
        with torch.no_grad():
            student = x.student @ x.student_head.T
            teacher = x.teacher @ x.teacher_head.T
            x.student.grad = student @ x.student_head
            x.student_head.grad = teacher.T @ x.student

    return step


def ours(objective: Objective, teacher_topk: bool = False, fused: bool = True, watch: int | None = None):
    def build(x: Inputs) -> Step:
        weights = torch.full((len(x.ids),), 1.0 / len(x.ids), device=x.ids.device)
        teacher: Head | TopK = Head(x.teacher, x.teacher_head)
        if teacher_topk:
            logprobs = [(h @ x.teacher_head.T).float().log_softmax(-1).topk(100) for h in x.teacher.split(256)]
            teacher = TopK(torch.cat([t.indices for t in logprobs]), torch.cat([t.values for t in logprobs]))

        def step() -> None:
            result = token_loss(
                objective,
                Head(x.student, x.student_head),
                Tokens(x.ids, sampler_logprobs_T=weights),
                teacher,
                weights_T=weights if fused else None,
                chunk_size=x.chunk,
                watch=watch,
            )
            (result.total if fused else result.loss_T.mean()).backward()

        return step

    return build


def plain(**arguments):
    def build(x: Inputs) -> Step:
        def step() -> None:
            student = x.student @ x.student_head.T
            with torch.no_grad():
                teacher = x.teacher @ x.teacher_head.T
            token_divergence(student, teacher, **arguments).mean().backward()

        return step

    return build


def trl_gkd(x: Inputs) -> Step:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def step() -> None:
        student = x.student @ x.student_head.T
        with torch.no_grad():
            teacher = x.teacher @ x.teacher_head.T
        GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.5, reduction="batchmean").backward()

    return step


def trl_chunked(x: Inputs) -> Step:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def step() -> None:
        loss, _ = ChunkedDivergenceFunction.apply(x.student, x.student_head, None, x.teacher, x.teacher_head, None, 0.5)
        loss.mean().backward()

    return step


def liger_chunked(x: Inputs) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=x.ids.is_cuda)

    def step() -> None:
        loss(x.student, x.student_head, x.teacher, x.teacher_head, x.ids).backward()

    return step


def liger_triton(x: Inputs) -> Step:
    from liger_kernel.transformers import LigerFusedLinearJSD

    if not x.ids.is_cuda:
        raise RuntimeError("needs a GPU")
    loss = LigerFusedLinearJSD(jsd_beta=0.5)

    def step() -> None:
        loss(x.student, x.student_head, x.teacher, x.teacher_head).backward()

    return step


CONTESTANTS: dict[str, Callable[[Inputs], Step]] = {
    FLOOR: four_products,
    "ours: JSD": ours(Divergence("jsd", support="full")),
    "ours: reverse KL": ours(Divergence("reverse_kl", support="full")),
    "ours: JSD, student's top 100": ours(Divergence("jsd")),
    "ours: JSD, teacher's top 100": ours(Divergence("jsd", support="teacher_topk")),
    "ours: JSD, top 100 given": ours(Divergence("jsd", support="teacher_topk"), teacher_topk=True),
    "ours: JSD, weights unknown": ours(Divergence("jsd", support="full"), fused=False),
    "ours: JSD, top 100 and signals": ours(Divergence("jsd"), watch=100),
    PLAIN: plain(kind="jsd", support="full"),
    "PyTorch: JSD, student's top 100": plain(kind="jsd", support="student_topk"),
    "TRL: generalized_jsd_loss": trl_gkd,
    "TRL: ChunkedDivergence": trl_chunked,
    "Liger: chunked JSD": liger_chunked,
    "Liger: fused linear JSD": liger_triton,
}


def measure(name: str, size: str, device: str, dtype: str, chunk: int | None, repeats: int) -> dict[str, float | str]:
    """Minimum seconds of a step after warm-up, and peak bytes beyond the inputs, gradients included."""
    tokens, hidden, vocab = map(int, size.split("x"))
    inputs = Inputs.make(tokens, hidden, vocab, device, getattr(torch, dtype), chunk)
    try:
        step = CONTESTANTS[name](inputs)
    except (ImportError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"}
    seconds, clock = [], clock_of(device)
    peak = 0
    for repeat in range(repeats + (3 if device == "cuda" else 1)):
        inputs.student.grad = inputs.student_head.grad = None
        before = start_memory(device)
        start = clock()
        try:
            step()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"}
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
        if device == "cuda" or repeat == 0:  # a CPU's allocator keeps what was freed: only the first step shows all
            peak = peak_memory(device) - before
    return {"seconds": min(seconds[-repeats:]), "bytes": peak}


def clock_of(device: str) -> Callable[[], float]:
    """Wall-clock time; of one thread on a CPU its own time, which other programs on the machine do not change."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def start_memory(device: str) -> int:
    """Reset the memory peak. Returns the bytes in use now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure_all(
    size: str, names: list[str], device: str, dtype: str, chunk: int | None, repeats: int, seconds: float | None = None
) -> Iterator[tuple[str, dict[str, float | str]]]:
    """What `measure` gives of each, from processes of their own.

    On a GPU, whose allocator knows the peak of each, one process goes on from one to the next, and another takes over
    where it ended on a failure.

    Args:
        seconds: limit of one of them.
    """
    left = list(names)
    while left:
        some = left[: len(left) if device == "cuda" else 1]
        command = [sys.executable, __file__, "--worker", *some, "--sizes", size, "--device", device]
        command += ["--dtype", dtype, "--repeats", str(repeats), *(["--chunk", str(chunk)] if chunk else [])]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            assert process.stdout is not None
            for name in some:
                ended = threading.Timer(seconds, process.kill) if seconds else None
                if ended:
                    ended.start()
                line = process.stdout.readline()
                if ended:
                    ended.cancel()
                left.remove(name)
                if line:
                    yield name, json.loads(line)
                    continue
                process.wait()
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no output"])[-1][:120]
                yield name, {"error": f"after {seconds} s: {last}" if process.returncode == -9 else last}
                break
            process.stdout.close()
            process.wait()


def run_size(size: str, names: list[str], arguments: argparse.Namespace) -> None:
    found: dict[str, dict] = {}
    settings = arguments.device, arguments.dtype, arguments.chunk, arguments.repeats
    for name, row in measure_all(size, names, *settings):
        found[name] = row
        print(f"  {name}: {row}", file=sys.stderr, flush=True)
    tokens, hidden, vocab = map(int, size.split("x"))
    print(f"\n### {tokens:,} tokens, hidden {hidden:,}, vocabulary {vocab:,}, {arguments.dtype}\n")
    print("| | seconds | × four products | × PyTorch | peak GiB | × PyTorch |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        if "error" in row:
            print(f"| {name} | {row['error']} | | | | |")
            continue
        ratios = [
            f"{row[key] / found[base][key]:.2f}" if key in found.get(base, {}) else ""
            for base, key in ((FLOOR, "seconds"), (PLAIN, "seconds"), (PLAIN, "bytes"))
        ]
        gib = row["bytes"] / 2**30
        print(f"| {name} | {row['seconds']:.4f} | {ratios[0]} | {ratios[1]} | {gib:.2f} | {ratios[2]} |", flush=True)


def profile(size: str, names: list[str], arguments: argparse.Namespace) -> None:
    """The most expensive operations of one step of each implementation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    on_gpu = arguments.device == "cuda"
    tokens, hidden, vocab = map(int, size.split("x"))
    dtype = getattr(torch, arguments.dtype)
    inputs = Inputs.make(tokens, hidden, vocab, arguments.device, dtype, arguments.chunk)
    for name in names:
        step = CONTESTANTS[name](inputs)
        for _ in range(3):
            inputs.student.grad = inputs.student_head.grad = None
            step()
        with torch_profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
            inputs.student.grad = inputs.student_head.grad = None
            step()
        print(f"\n### {name}, {size}")
        spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        for row in sorted(found.key_averages(), key=lambda row: -getattr(row, spent))[:18]:
            print(f"{getattr(row, spent) / 1000:9.2f} ms  {row.count:4d} × {row.key[:90]}")


def device_name(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads ({clock_of(device).__name__}), torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", help="TOKENSxHIDDENxVOCABULARY")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, help="default: 10 on a GPU, 3 on a CPU")
    parser.add_argument("--chunk", type=int, help="rows at a time of our forms")
    parser.add_argument("--only", help="contestants whose name contains this, and the two that ratios refer to")
    parser.add_argument("--profile", action="store_true", help="instead print where the time of each contestant goes")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    arguments.repeats = arguments.repeats or (10 if arguments.device == "cuda" else 3)
    arguments.sizes = arguments.sizes or SIZES[arguments.device]
    if arguments.worker:
        settings = arguments.device, arguments.dtype, arguments.chunk, arguments.repeats
        for name in arguments.worker:
            print(json.dumps(measure(name, arguments.sizes[0], *settings)), flush=True)
        return
    names = [n for n in CONTESTANTS if not arguments.only or arguments.only in n or n in (FLOOR, PLAIN)]
    print(f"{device_name(arguments.device)}; bench/losses.py {' '.join(sys.argv[1:])}")
    for size in arguments.sizes:
        if arguments.profile:
            profile(size, names, arguments)
        else:
            run_size(size, names, arguments)


if __name__ == "__main__":
    main()
