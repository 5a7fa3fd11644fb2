"""One process for each contender, all alive at once, that take one training step each in turn."""

import ctypes
import multiprocessing
import os
import tempfile
import time
import traceback
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contenders import Sizes
from benchmarks.spending import Spending, spending
from core.idle_threads import SPINS

RATE, SIDE = "GEMM", {"cpu": 1024, "cuda": 8192}
"""The contender that only multiplies square matrices of that side: what the machine can do."""

PROFILED_STEPS = 3
SMALL = {"vocab_size": 64, "num_layers": 2, "dim": 32, "num_heads": 2, "hidden": 48, "seq_len": 64}


class Contender(NamedTuple):
    """Says what a process runs.

    Attributes:
        name: ours..., a peer of contenders.PEERS, or RATE.
        overrides: of the model's configuration, for ours.
        spin: how often an idle thread of OpenMP looks for work before it sleeps (GOMP_SPINCOUNT).
    """

    name: str
    sizes: Sizes
    compiled: bool
    device: str
    threads: int
    overrides: dict[str, Any] | None = None
    spin: int = SPINS


class Result(NamedTuple):
    """Says what a contender is like.

    Attributes:
        parameters: how many.
        flops: of a step; with the causal mask not credited.
        first_step: seconds from the finished model to the end of its first step, compilation included.
        memory: most bytes at a time in later steps; on a CPU, of the process beyond its imports.
    """

    parameters: int
    flops: float
    first_step: float
    memory: int


class Worker:
    """A process with a contender, for which it imports at once."""

    def __init__(self, contender: Contender) -> None:
        # Set before the child imports torch, as train.py has it: docs/decisions.md.
        os.environ.update(OMP_NUM_THREADS=str(contender.threads), GOMP_SPINCOUNT=str(contender.spin))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compile_cache().name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contender), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self) -> None:
        """Let it build the model and take its first steps."""
        self._connection.send("begin")

    def failure(self) -> str | None:
        """Wait until it has imported, and again until it has begun: what went wrong in it, if anything did."""
        answer = self._answer()
        if isinstance(answer, str):
            self._process.join()
            return answer
        return None

    def _ask(self, question: str) -> Any:
        self._connection.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            return f"ended with exit code {self._process.exitcode}"

    def step(self) -> float:
        """Return the seconds of one training step."""
        seconds = self._ask("step")
        assert isinstance(seconds, float), seconds
        return seconds

    def profile(self) -> Spending:
        """Return where the time of PROFILED_STEPS steps goes on the device."""
        spent = self._ask("profile")
        assert isinstance(spent, Spending), spent
        return spent

    def end(self) -> Result:
        result = self._ask("end")
        assert isinstance(result, Result), result
        self._process.join()
        return result


def start(contenders: dict[str, Contender], in_turn: bool) -> tuple[dict[str, Worker], dict[str, str]]:
    """Return a process for each; all import side by side, and none begins before all have.

    Args:
        contenders: by name.
        in_turn: whether they begin one after another, as they must where their first steps are timed, or all at once.

    Returns:
        (those that have begun, what went wrong in the others).
    """
    workers, failures = {name: Worker(contender) for name, contender in contenders.items()}, dict[str, str]()

    def wait(name: str) -> None:
        if (failure := workers[name].failure()) is not None:
            failures[name] = failure
            del workers[name]

    for name in contenders:
        wait(name)
    begun = list(workers)
    for names in [[name] for name in begun] if in_turn else [begun]:
        for name in names:
            workers[name].begin()
        for name in names:
            wait(name)
    return workers, failures


@cache
def _compile_cache() -> "tempfile.TemporaryDirectory[str]":
    """Give a compile cache that is empty, or a benchmark's second run would find its first one's kernels."""
    return tempfile.TemporaryDirectory(prefix="inductor-", ignore_cleanup_errors=True)


def _serve(connection: Connection, contender: Contender) -> None:
    try:
        build = _import(contender)
        connection.send(None)
        connection.recv()
        step, result = _prepare(contender, build)
        _rest(contender.device)
        connection.send(None)
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}")
        return
    memory = _memory(contender.device)
    while (question := connection.recv()) != "end":
        if contender.device == "cuda":
            step()  # takes the memory again that it gave back, which is not timed
        if question == "step":
            answer: float | Spending = step()
            memory = _memory(contender.device)  # of steps alone: the profiler takes some for itself
        else:
            answer = spending(lambda: [step() for _ in range(PROFILED_STEPS)], contender.device)
        _rest(contender.device)
        connection.send(answer)
    connection.send(result._replace(memory=memory - result.memory))


def _import(contender: Contender) -> Any:
    """Return a function of (sizes, whether it is compiled) that builds the contender's (module, loss)."""
    import torch

    from benchmarks.contenders import ours, peer

    device, sizes = contender.device, contender.sizes
    torch.set_num_threads(contender.threads)
    from lightning_modules.layers.cpu_kernels.allocator import keep_freed_memory

    # What train.py does for its user, for all: models are compared, not what malloc does with what they free.
    keep_freed_memory()

    def build(sizes: Sizes, compiled: bool) -> Any:
        with torch.device(device), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if contender.name.startswith("ours"):
                return ours(sizes, compiled, **(contender.overrides or {}))
            return peer(contender.name, sizes, compiled)

    if contender.name != RATE:
        build(sizes._replace(**SMALL, num_experts=min(sizes.num_experts, 4)), False)  # imports what it needs
        if contender.compiled:  # what the first compilation on a machine makes once, and a process imports
            torch.compile(torch.sin)(torch.ones(8, device=device))
    return build


def _prepare(contender: Contender, build: Any) -> tuple[Any, Result]:
    """Return (a function that takes a step and returns its seconds, Result with the memory before the model)."""
    import torch

    device, sizes = contender.device, contender.sizes
    torch.manual_seed(0)
    if contender.name == RATE:
        return _gemm(device)
    _forget_peak(device)
    before = _memory(device)
    model, loss = build(sizes, contender.compiled)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(sizes.vocab_size, (sizes.batch_size, sizes.seq_len + 1), generator=generator).to(device)

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = loss(tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    first = step()
    step()  # what is allocated late, and compiled again where sizes turned out to vary
    _forget_peak(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    idle = max(sizes.num_experts - sizes.top_k, 0) * sizes.num_layers * 3 * sizes.dim * sizes.hidden
    multiplying = parameters - idle - sizes.vocab_size * sizes.dim  # the embedding only looks up
    per_token = 6 * multiplying + 12 * sizes.num_layers * sizes.dim * sizes.seq_len
    return step, Result(parameters, per_token * sizes.batch_size * sizes.seq_len, first, before)


def _rest(device: str) -> None:
    """Leave the device's memory to the others but for parameters and optimizer: steps of all at once do not fit."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def _gemm(device: str) -> tuple[Any, Result]:
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(SIDE[device], SIDE[device], device=device, dtype=dtype) for _ in range(2))

    def step() -> float:
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step, Result(0, 10 * 2 * SIDE[device] ** 3, step(), 0)


def _memory(device: str) -> int:
    """Return the most bytes in use since _forget_peak."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _forget_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what compiling left behind is no part of a step
    Path("/proc/self/clear_refs").write_text("5")
