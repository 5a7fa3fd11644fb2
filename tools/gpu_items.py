"""Holds what `python -m tools.check_gpu` looks at: each item in a process of its own, at the size of its device.

On a CPU everything is as small as can be, and shows that the item works and not what a GPU does.
"""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import one_line

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
TOY: tuple[str, ...] = (
    "data=synthetic",
    "data.batch_size=4",
    "model.dim=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.ffn_dim=48",
    "model.moe.num_experts=4",
    "model.moe.expert_dim=24",
    "model.compile=false",
    "trainer.accelerator=cpu",
    "optim.warmup_steps=2",
    "callbacks.text_sample=null",
)


MONITORS = ("gradient_health", "signal_propagation", "representation_collapse", "stream_mixing", "source_weights")
UNWATCHED = tuple(f"callbacks.{name}=null" for name in (*MONITORS, "gate_means"))
"""Without what only measures: a plan leaves it out, and a model's FLOPs do not count it."""
UNSAVED = tuple(f"callbacks.{name}=null" for name in ("last_checkpoint", "best_checkpoint", "text_sample"))
"""Without writing gigabytes, which nobody reads."""


class Finding(NamedTuple):
    """Says what was found of one thing.

    Attributes:
        what: was looked at.
        held: whether it is as it should be; None: a figure without a goal, or nothing that could be looked at.
        figure: what was measured, or why it was not.
    """

    what: str
    held: bool | None
    figure: str


class Place(NamedTuple):
    """Says where an item works.

    Attributes:
        device: cuda, or cpu for the dry run.
        folder: of its runs.
    """

    device: str
    folder: Path

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS` to its end."""
        environment = {**os.environ, "COLUMNS": "200", **variables}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def overrides(self, name: str, *overrides: str, toy: tuple[str, ...] = ()) -> list[str]:
        """Return those of a run in FOLDER/NAME; `toy` counts in the dry run, in the place of what a GPU gets."""
        small = (*TOY, *toy) if self.dry else ("trainer.accelerator=gpu",)
        return ["trainer.log_every_n_steps=1", *overrides, *small, f"run_dir='{self.folder / name}'"]

    def train(self, name: str, *overrides: str, toy: tuple[str, ...] = (), **variables: str) -> Any:
        """Train in FOLDER/NAME, and return the run and what its process printed.

        Raises:
            RuntimeError: it did not end well; in its own words.
        """
        from tools.compare import Run

        ended = self.python("train.py", *self.overrides(name, *overrides, toy=toy), **variables)
        if ended.returncode != 0:
            raise RuntimeError((ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1])
        return Run(self.folder / name), ended


def steps(number: int, *more: str) -> tuple[str, ...]:
    """Return the overrides of a run of so many steps, validated at its end."""
    return (f"trainer.max_steps={number}", f"trainer.val_check_interval={number}", "data.val_batches=2", *more)


def main_job(place: Place) -> Iterator[Finding]:
    """Look at the main job of a GPU: time of compilation, backend, peak of memory against the plan, tokens a second."""
    from tools.plan import compose_config, plan

    number = 6 if place.dry else 60
    overrides = ("experiment=moe_spannorm_gpu", *UNWATCHED, *UNSAVED, *steps(number))
    run, ended = place.train("main", *overrides, toy=("trainer.precision=bf16-mixed",))
    backend = re.search(r"MoE backend: .*", ended.stdout + ended.stderr)
    yield Finding("backend of the experts", None if backend else False, backend[0] if backend else "not said")
    _, losses = run.curve("train/loss")
    yield Finding(f"loss after {number} steps", losses[-1] < losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}")
    _, medians = run.curve("train/step_seconds_p50")
    yield Finding("first step, compilation included", None, f"{medians[0]:.1f} s, median step {medians[-1]:.3f} s")
    planned = plan(compose_config([*place.overrides("main", *overrides)])).memory / GIB
    peak = run.curve("train/memory_peak")[1][-1]
    fits = None if place.dry else planned / 2 <= peak <= 1.1 * planned
    yield Finding("peak of memory against the plan", fits, f"{peak:.2f} of {planned:.2f} GiB")
    rates = run.curve("train/tokens_per_second")[1][len(losses) // 2 :]
    yield Finding("tokens per second", None, f"{statistics.median(rates):,.0f}")
    yield _mfu("main job", run, place)


def _mfu(name: str, run: Any, place: Place) -> Finding:
    values = run.curve("train/mfu")[1]
    if not values:
        return Finding(f"MFU, {name}", None if place.dry else False, "none: no peak of this device is known")
    share = statistics.median(values[len(values) // 2 :])
    return Finding(f"MFU, {name}", 0 < share < 1, f"{share:.1%}")


def gpu_tests(place: Place) -> Iterator[Finding]:
    """Run the tests that carry the marker gpu; in the dry run, a CPU's cases of one file of them."""
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"mark\.gpu|\bDEVICES\b", path.read_text()) and path.name != "test_devices.py"
    ]
    chosen = ["tests/lightning_modules/layers/test_moe_bf16.py", "-k", "agree"] if place.dry else [*marked, "-m", "gpu"]
    ended = place.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    last = (ended.stdout.strip() or ended.stderr.strip() or "it said nothing").splitlines()[-1]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", ended.stdout, re.MULTILINE)
    held = ended.returncode == 0 and re.search(r"\b[1-9]\d* passed", last) is not None
    yield Finding("pytest -m gpu", held, "; ".join([last, *failed]))


def empty_experts(place: Place) -> Iterator[Finding]:
    """Look at the gradients of experts without tokens, on memory that held NaN: exactly 0."""
    import torch

    from lightning_modules.config import ModelConfig, parse
    from lightning_modules.layers import megablocks
    from lightning_modules.layers.moe import MoE

    device, experts = torch.device(place.device), 8
    for backend in ("loop", "grouped", "megablocks"):
        moe = {"num_experts": experts, "top_k": 1, "expert_dim": 256, "backend": backend}
        config = parse(ModelConfig, "model", {"dim": 256, "num_heads": 4, "ffn": "moe", "moe": moe})
        obstacle = megablocks.obstacle(config, device, torch.bfloat16) if backend == "megablocks" else None
        if obstacle is not None:
            yield Finding("experts without tokens: megablocks", None, obstacle)
            continue
        with device, torch.autocast(place.device, torch.bfloat16):
            layer = MoE(config)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            layer.router.layer.weight[2:] = 0
            layer.router.layer.weight[1] = -layer.router.layer.weight[0]
        wrong = 0
        for _ in range(4):
            held = [torch.full((experts, 256, 256), math.nan, device=device, dtype=torch.bfloat16) for _ in range(16)]
            del held
            x = torch.randn(4, 512, 256, device=device, requires_grad=True)
            with torch.autocast(place.device, torch.bfloat16):
                out, _ = layer(x)
            for gradient in torch.autograd.grad(out.float().square().mean(), list(layer.experts.mlp.parameters())):
                parts = gradient.unflatten(0, (experts, -1))
                wrong += int(parts[2:].count_nonzero()) + int((~parts[:2].isfinite()).sum())
        yield Finding(
            f"experts without tokens: {backend}", wrong == 0, f"{wrong} gradients that are not 0, or not finite"
        )


def document_masks(place: Place) -> Iterator[Finding]:
    """Look at attention that keeps packed documents apart: compiled, and uncompiled at a length of 64 mod 128."""
    import torch

    from lightning_modules.layers.document_mask import attend, document_mask

    device = torch.device(place.device)
    # Logits of -120 are where cuDNN's gradient was NaN (pytorch/pytorch, issue 196678); rounding is large there.
    for length, flex, far in ((256, True, False), (192, False, False), (192, False, True)):
        if flex and place.dry:
            yield Finding("document mask, compiled", None, "FlexAttention has no backward pass on a CPU")
            continue
        positions = torch.cat([torch.arange(100), torch.arange(length - 100)])[None].to(device)
        wide = [torch.randn(1, 4, length, 64, device=device) for _ in range(3)]
        if far:
            wide[0][..., 0], wide[1][..., 0] = 1.0, -120 * 8.0
        results = list[list[torch.Tensor]]()
        for dtype, by_flex in ((torch.float32, False), (torch.bfloat16, flex)):
            inputs = [tensor.to(dtype).detach().requires_grad_() for tensor in wide]
            call: Any = torch.compile(attend) if by_flex else attend
            out = call(*inputs, document_mask(positions, by_flex), False)
            results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)])
        expected, actual = results
        finite = all(bool(tensor.isfinite().all()) for tensor in actual)  # max would pass over a NaN
        off = max(float((a - e).norm() / e.norm()) for e, a in zip(expected, actual, strict=True))
        name = "compiled" if flex else f"uncompiled, length {length}" + (", logits of -120" if far else "")
        figure = ("finite" if far else f"{off:.4f} from fp32") if finite else "not all is finite"
        yield Finding(f"document mask, {name}", finite and (far or off < 0.02), f"{figure}, gradients included")


def sharded(place: Place) -> Iterator[Finding]:
    """Train by FSDP2 on one device in bf16-mixed, with asynchronous checkpoints, and go on from the last one."""
    often = "callbacks.last_checkpoint.every_n_train_steps=3"
    options = ("trainer=fsdp", "trainer.devices=1", "trainer.precision=bf16-mixed", "optim.schedule=constant", often)
    place.train("sharded", *options, *steps(6))
    run, _ = place.train("sharded", *options, *steps(9), "ckpt_path=last")
    numbers, losses = run.curve("train/loss")
    whole = numbers == list(range(9)) and all(map(math.isfinite, losses))
    yield Finding(
        "FSDP2 on one device, saved beside training, resumed", whole, f"{len(numbers)} steps, {losses[-1]:.3f}"
    )


def precisions(place: Place) -> Iterator[Finding]:
    """Compare a run in bf16-true with the same in bf16-mixed: within 1 % of each other's loss."""
    number, found = 10 if place.dry else 60, []
    for precision in ("bf16-mixed", "bf16-true"):
        run, _ = place.train(precision, f"trainer.precision={precision}", *steps(number), "optim.warmup_steps=5")
        found.append(statistics.fmean(run.curve("train/loss")[1][-number // 5 :]))
    off = abs(found[1] / found[0] - 1)
    yield Finding("bf16-true against bf16-mixed", off < 0.01, f"{found[1]:.4f} and {found[0]:.4f}, {off:.2%} apart")


def recompilations(place: Place) -> Iterator[Finding]:
    """Count what torch.compile compiles again while a run trains, validates and ends.

    One that is made to happen is counted first: none at all might be torch saying it in other words.
    """
    forced = "import torch; f = torch.compile(lambda x: x + 1, backend='eager'); f(torch.ones(2)); f(torch.ones(2, 2))"
    seen = _recompilations(place.python("-c", forced, TORCH_LOGS="recompiles"))
    yield Finding("a recompilation that is made to happen", seen == 1, f"{seen}")
    compiled = ("model.compile=true",)
    options = ("experiment=moe_spannorm", "trainer.precision=bf16-mixed", *steps(6), *compiled)
    _, ended = place.train("compiled", *options, toy=compiled, TORCH_LOGS="recompiles")
    number = _recompilations(ended)
    yield Finding("recompilations of a run", number <= 8, f"{number}")


def _recompilations(ended: subprocess.CompletedProcess[str]) -> int:
    return len(re.findall(r"Recompiling function", ended.stderr + ended.stdout))


def synchronizations(place: Place) -> Iterator[Finding]:
    """Count, in steps that are neither the first nor logged, how often torch says that the host waited.

    Without callbacks it has no reason to; in a default run Divergence looks at each step before the optimizer takes it.
    """
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from core.build import build_all
    from lightning_modules.composing import compose_run
    from lightning_modules.language_module import LanguageModule
    from lightning_modules.layers.expert_products import ONE_KERNEL

    class Counting(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if not place.dry:
                torch.cuda.set_sync_debug_mode("warn" if 1 <= trainer.global_step < 8 else "default")

    looped = not place.dry and torch.cuda.get_device_capability()[0] not in ONE_KERNEL
    moe = {"num_experts": 8, "expert_dim": 256, "backend": "grouped"}
    model = {"dim": 128, "num_heads": 4, "num_layers": 2, "ffn": "dense" if looped else "moe", "moe": moe}
    batches: Any = DataLoader([{"tokens": torch.randint(64, (4, 65))}] * 40, batch_size=None)  # type: ignore[arg-type]
    composed = compose_run([f"run_dir='{place.folder / 'default'}'"])
    for name, callbacks, least, most in (
        ("no callbacks", [], 0, 0),
        ("the default ones", build_all(composed, "callbacks"), 1, 7),  # of which one at least shows that they are seen
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = L.Trainer(
                accelerator=place.device if place.dry else "gpu",
                devices=1,
                precision="bf16-mixed",
                max_steps=9,
                accumulate_grad_batches=4,
                log_every_n_steps=10,
                limit_val_batches=0,
                logger=False,
                enable_model_summary=False,
                enable_checkpointing=bool(callbacks),
                enable_progress_bar=bool(callbacks),
                callbacks=[Counting(), *callbacks],
                default_root_dir=place.folder,
            )
            trainer.fit(LanguageModule(model, {"warmup_steps": 0}, vocab_size=64), batches, batches)
        waits = [str(w.message) for w in caught if "synchroniz" in str(w.message) and "called a" in str(w.message)]
        held, figure = (None, "not counted on a CPU") if place.dry else (least <= len(waits) <= most, f"{len(waits)}")
        yield Finding(f"waits for the device in 7 steps, {name}", held, figure)


def a_day_of_use(place: Place) -> Iterator[Finding]:
    """Interrupt a run, resume it, generate from it and evaluate it."""
    long = ("trainer.max_steps=100000", "trainer.val_check_interval=100000", "optim.schedule=constant")
    command = [sys.executable, "train.py", *place.overrides("used", *long)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 120:
        time.sleep(1)
        status = place.folder / "used/status.json"
        if status.is_file() and json.loads(status.read_text()).get("step", 0) >= 3:
            break
    process.send_signal(signal.SIGINT)
    try:
        code: int | str = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        code = "none within a minute"
    saved = (place.folder / "used/checkpoints/last.ckpt").exists()
    yield Finding("SIGINT saves and leaves", code == 130 and saved, f"exit code {code}, checkpoint: {saved}")
    from core.checkpoint import load

    step = load(place.folder / "used/checkpoints/last.ckpt")["global_step"]
    run, _ = place.train("used", *steps(step + 5, "optim.schedule=constant"), "ckpt_path=last")
    yield Finding("it goes on from there", run.summary.get("steps") == step + 5, f"from step {step} to {step + 5}")
    prompt = "1 2" if place.dry else "def "
    ended = place.python("-m", "tools.generate", str(run.folder), f"prompt={prompt}", "num_tokens=16")
    yield Finding("tools.generate", ended.returncode == 0, one_line(ended.stdout or ended.stderr)[-60:])
    ended = place.python("-m", "tools.evaluate", str(run.folder), "batches=2")
    yield Finding("tools.evaluate", ended.returncode == 0, one_line(ended.stdout or ended.stderr)[-60:])


def mixtures(place: Place) -> Iterator[Finding]:
    """Run benchmarks.moe at 8 and 64 experts, and the dense model against the peers where these are installed."""
    report = place.folder / "moe.md"
    sizes = ["tokens=256", "dim=32", "hidden=48", "layers=1", "rounds=1"] if place.dry else ["tokens=16384", "rounds=5"]
    sizes += [] if place.dry else ["dim=1024", "hidden=1408", "layers=2"]
    command = ["-m", "benchmarks.moe", f"device={place.device}", "experts=8,64", *sizes, f"output={report}"]
    ended = place.python(*command)
    yield Finding("benchmarks.moe, 8 and 64 experts", ended.returncode == 0, _contents(report, ended))
    report = place.folder / "compare.md"
    options = ["only=Dense, eager", "layers=1", "rounds=1"] if place.dry else ["only=1B dense", "rounds=5"]
    ended = place.python("-m", "benchmarks.compare", f"device={place.device}", *options, f"output={report}")
    said = _contents(report, ended)
    # A peer that is not installed is left out; in the dry run none need be.
    held = ended.returncode == 0 and (place.dry or "left out:" not in said)
    yield Finding("dense against the peers", held, said)


def _contents(report: Path, ended: subprocess.CompletedProcess[str]) -> str:
    """Return what a benchmark has written, or the last that it said."""
    if report.is_file():
        return f"\n{report.read_text()}\n"
    return (ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}").splitlines()[-1]


def one_billion(place: Place) -> Iterator[Finding]:
    """Train a dense model of 1B parameters at a length of 4096, compiled in bf16: MFU."""
    model = ("model.num_layers=16", "model.dim=2048", "model.num_heads=16", "model.ffn_dim=5632", "model.compile=true")
    data = ("data=synthetic", "data.vocab_size=32768", "data.seq_len=4096", "data.batch_size=8", "micro_batch_size=4")
    silent = ("divergence", "flight_recorder")
    off = (*(f"callbacks.{name}=null" for name in silent), *UNSAVED, *UNWATCHED)
    toy = ("data.vocab_size=64", "data.seq_len=63", "micro_batch_size=2", "model.compile=false")
    options = (*model, *data, *off, "trainer.precision=bf16-mixed", *steps(20))
    run, _ = place.train("1b", *options, "trainer.log_every_n_steps=5", toy=toy)
    rate = statistics.median(run.curve("train/tokens_per_second")[1][1:])
    peak = run.curve("train/memory_peak")[1][-1]
    yield Finding("1B dense at 4096", None, f"{rate:,.0f} tokens/s, peak {peak:.1f} GiB")
    yield _mfu("1B dense", run, place)


ITEMS: dict[str, Callable[[Place], Iterator[Finding]]] = {
    "main_job": main_job,
    "gpu_tests": gpu_tests,
    "empty_experts": empty_experts,
    "document_masks": document_masks,
    "sharded": sharded,
    "precisions": precisions,
    "recompilations": recompilations,
    "synchronizations": synchronizations,
    "a_day_of_use": a_day_of_use,
    "mixtures": mixtures,
    "one_billion": one_billion,
}
"""In the order of their value."""


def look_at(name: str, place: Place, findings: Path) -> None:
    """Write an item's findings into a file, one JSON list a line, as they come; an error is a finding too."""
    with open(findings, "w") as file:
        try:
            for finding in ITEMS[name](place):
                print(json.dumps(finding), file=file, flush=True)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps(Finding(name, False, f"{type(error).__name__}: {one_line(error)}")), file=file)
