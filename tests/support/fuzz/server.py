"""Forks a process for each command line that it is sent, with everything imported, so that one costs milliseconds.

Started by `sandbox.Sandbox`; speaks lines of JSON: a case comes in on stdin, and how it ended goes out on stdout.
"""

import atexit
import copy
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

ROOT = Path(__file__).resolve().parents[3]
PRELOADED = (
    "lightning",
    "hydra",
    "tensorboard",
    "torch.utils.tensorboard",
    "torch.distributed.checkpoint",
    "matplotlib.pyplot",
    "hydra._internal.hydra",
    "hydra._internal.callbacks",
    "hydra._internal.core_plugins.basic_sweeper",
    "hydra._internal.core_plugins.basic_launcher",
    "hydra.utils",
    "core.interruption",
    "core.open_run",
    "lightning_modules.language_module",
    "lightning_modules.strategy",
    "rich.progress",
    "safetensors.torch",
    "transformers",
    "tokenizers",
    "pyarrow.parquet",
    "tools.exporting.native",
    "tools.exporting.remote_code",
    "tools.evaluation.corpora",
)
CHANGES = {  # audit events of calls that change the file system: which of their arguments are paths
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), (0,)),
    **dict.fromkeys(("os.rename", "os.link", "shutil.move"), (0, 1)),
    **dict.fromkeys(("shutil.copyfile", "shutil.copytree", "os.symlink"), (1,)),
    "shutil.rmtree": (0,),
}
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "pty.spawn")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
GIVEN_AWAY = ("/dev/null", "/dev/tty", "/proc/self")


def watch(report: int, inside: list[str], port: int | None) -> None:
    """Report, a line each, what Python changes outside of the given folders, and every process and connection.

    A connection to the port on this machine is the case's own.
    """

    def complain(event: str, what: object) -> None:
        os.write(report, f"{event}: {what}\n".encode("utf-8", "backslashreplace"))

    def check_path(event: str, path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        real = os.path.realpath(os.fsdecode(path))
        if not any(real == place or real.startswith(f"{place}/") for place in (*inside, *GIVEN_AWAY)):
            complain(event, real)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if (isinstance(flags, int) and flags & WRITING) or (isinstance(mode, str) and set(mode) & set("wax+")):
                check_path(event, path)
        elif event in CHANGES:
            for number in CHANGES[event]:
                check_path(event, arguments[number])
        elif event == "socket.connect" and arguments[1][:2] == ("127.0.0.1", port):
            pass
        elif event == "subprocess.Popen" and list(arguments[1])[:3] == ["git", "-C", str(ROOT)]:
            pass  # core/provenance.py asks of this checkout, whatever the case
        elif event in STARTS:
            complain(event, arguments[:2])

    sys.addaudithook(hook)


def become(case: dict[str, Any]) -> Callable[[], object]:
    """Turn this process into the one that the case describes; returns the program that is to run in it."""
    os.setsid()
    for number, path in ((0, os.devnull), (1, case["out"]), (2, case["err"])):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    report = os.open(case["report"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.chdir(case["cwd"])
    os.environ.update(case["environment"])
    tempfile.tempdir = None  # it remembers the server's
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + case["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (case["file_size"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + case["cpu_seconds"]) + 1,) * 2)
    signal.setitimer(signal.ITIMER_REAL, case["seconds"])
    program = case["program"]
    script = ROOT / program if program.endswith(".py") else None
    sys.argv = [str(script or program), *(os.fsdecode(bytes.fromhex(argument)) for argument in case["arguments"])]
    Path(case["memory_before"]).write_text(str(resident()))
    watch(report, case["inside"], case["port"])
    if script is not None:
        sys.path[0] = str(script.parent)
        return lambda: runpy.run_path(str(script), run_name="__main__")
    return lambda: runpy.run_module(program, run_name="__main__", alter_sys=True)


def resident() -> int:
    """Return the bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def ended(group: int, seconds: float = 5.0) -> bool:
    """Whether all processes of a group end by themselves, as multiprocessing's trackers do a moment after their parent.

    What is left after so many seconds is killed.
    """
    last = time.monotonic() + seconds
    try:
        while time.monotonic() < last:
            os.killpg(group, 0)
            time.sleep(0.01)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return True
    return False


def serve(answers: TextIO) -> Callable[[], object]:
    """Answer cases until stdin ends; in each child, return its program instead."""
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        case = json.loads(line)
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            return become(case)
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - begun
        left = not ended(child)
        answer = {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "left": left}
        answer["cpu_seconds"] = usage.ru_utime + usage.ru_stime
        answer["most_memory"] = usage.ru_maxrss * 1024
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return lambda: None


def leave(program: Callable[[], object]) -> NoReturn:
    """Run it and end as the interpreter does, threads that never end included, but for taking the modules down."""
    code: Any = 0
    try:
        program()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def warm_up() -> None:
    """Do once what is slow only once: Hydra's grammar, torch's shapes without weights, a step of training."""
    import lightning as L
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from core.build import build
    from lightning_modules.composing import register_schemas

    register_schemas()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", ["data=synthetic", "data.seq_len=15", "data.batch_size=2", "+model.moe={top_k: 1}"])
    GlobalHydra.instance().clear()
    datamodule = build(config, "data")
    module = build(config, "module", vocab_size=datamodule.vocab_size)
    quiet = {name: False for name in ("enable_progress_bar", "enable_checkpointing", "enable_model_summary", "logger")}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, log_every_n_steps=1, **quiet)
    trainer.fit(module, datamodule=datamodule)
    torch.manual_seed(0)


def keep_parsed_configs() -> None:
    """Parse each of the project's configuration files once for all: a third of the time to compose one."""
    import yaml

    load = yaml.load
    kept: dict[str, Any] = {}

    def load_once(stream: Any, *arguments: Any, **options: Any) -> Any:
        name = getattr(stream, "name", None)
        if not isinstance(name, str) or not name.startswith(f"{ROOT}/configs/"):
            return load(stream, *arguments, **options)
        if name not in kept:
            kept[name] = load(stream, *arguments, **options)
        return copy.deepcopy(kept[name])

    yaml.load = load_once


def forget_exits() -> None:
    """Leave out what libraries do at an interpreter's end about what is from before the cases: half of a case's time.

    torch imports a package to print how long it compiled, and 200 objects that were made for all are finalized.
    """
    import torch._dynamo.utils

    atexit.unregister(torch._dynamo.utils.dump_compile_times)
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.dont_write_bytecode = True
    sys.path[0] = str(ROOT)
    own = [
        f"{folder}.{path.stem}"
        for folder in ("callbacks", "datamodules", "core")
        for path in (ROOT / folder).glob("*.py")
    ]
    tools = [
        f"{folder}.{path.stem}" for folder in ("tools", "studies") for path in sorted((ROOT / folder).glob("*.py"))
    ]
    for name in (*PRELOADED, *own, *tools):
        importlib.import_module(name)
    for name in tools:  # runpy does not like to run what is imported already
        sys.modules.pop(name)
    import torch

    torch.set_num_threads(1)
    keep_parsed_configs()
    warm_up()
    forget_exits()
    gc.collect()
    gc.freeze()
    program = serve(answers)
    leave(program)


if __name__ == "__main__":
    main()
