"""Install MegaBlocks beside the project's own torch: built for this machine's GPU, or its Python files alone.

    python -m tools.megablocks                     # make megablocks: compiled, for training on a GPU
    python -m tools.megablocks compiled=false      # what the tests need, on any machine

Its requirements contradict ours and its setup.py compiles wherever it sees a CUDA toolkit, with a header that CUDA 13
does not take. So its sources, pinned and checksummed in requirements-megablocks.txt, are mended before they are
installed: docs/megablocks.md.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from core import cli
from core.errors import UserError, require

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "requirements-megablocks.txt"
PYTHON_ONLY = ("megablocks", "stanford-stk")
ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"
LEAST_CAPABILITY = (8, 0)
"""The first with bf16 products, the only ones that grouped_gemm has."""
IMPORTED = "import megablocks.layers.dmoe, grouped_gemm"


@dataclass(frozen=True)
class MegaBlocksConfig:
    """Holds the fields that `python -m tools.megablocks` takes.

    Attributes:
        compiled: build it for the GPU of this machine, or for those that TORCH_CUDA_ARCH_LIST names; false: install its
            Python files, and compile nothing.
    """

    compiled: bool = True


def pins() -> dict[str, str]:
    """Return {package: its line of requirements-megablocks.txt, with version and checksum}."""
    lines = PINS.read_text().splitlines()
    return {re.split("==", line)[0]: line for line in lines if line and not line.startswith("#")}


def versions() -> dict[str, str]:
    """Return {package: the version that is pinned}."""
    return {name: re.split(r"==|\s", line)[1] for name, line in pins().items()}


def installed(names: tuple[str, ...]) -> bool:
    """Return whether these packages are here, in the versions that are pinned."""
    wanted = versions()
    try:
        return all(importlib.metadata.version(name) == wanted[name] for name in names)
    except importlib.metadata.PackageNotFoundError:
        return False


def capability() -> str:
    """Return the compute capabilities to build for, as TORCH_CUDA_ARCH_LIST has them.

    Raises:
        UserError: this machine cannot build, and what it lacks.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    cuda = torch.version.cuda
    if cuda is None:
        raise UserError(f"MegaBlocks needs a CUDA build of torch, and torch {torch.__version__} is none")
    nvcc = Path(CUDA_HOME or "/usr/local/cuda") / "bin/nvcc"
    if CUDA_HOME is None or not nvcc.is_file():
        raise UserError(f"MegaBlocks needs nvcc of CUDA {cuda}, and {nvcc} is not there; CUDA_HOME says where it is")
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or release[1] != cuda.partition(".")[0]:
        found = "no version" if release is None else f"{release[1]}.{release[2]}"
        raise UserError(f"MegaBlocks needs nvcc of CUDA {cuda}, torch's, and {nvcc} is of {found}")
    asked = os.environ.get(ARCHITECTURES, "")
    if not asked:
        if not torch.cuda.is_available():
            reason = f"and no GPU is here; {ARCHITECTURES}=9.0 names it (8.0: A100, 9.0: H100 and H200, 10.0: B200)"
            raise UserError(f"MegaBlocks is built for a compute capability, {reason}")
        asked = "{}.{}".format(*torch.cuda.get_device_capability())
    numbers = [tuple(map(int, found)) for found in re.findall(r"(\d+)\.(\d+)", asked)]
    valid = "a list of compute capabilities from 8.0 on, the first with bf16 products"
    require(bool(numbers) and min(numbers) >= LEAST_CAPABILITY, ARCHITECTURES, asked, valid)
    return asked


def fetch(name: str, folder: Path) -> Path:
    """Download the sources of a package, hold them against their checksum, and return the folder they are unpacked in.

    Raises:
        UserError: pip cannot get them, or they are not those that are pinned.
    """
    wanted = folder / f"{name}.txt"
    wanted.write_text(f"{pins()[name]}\n")
    command = ["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--require-hashes"]
    # setup.py is asked for its name, and would ask the GPU for its capability: nothing is built here.
    _pip([*command, "--dest", str(folder), "--requirement", str(wanted)], {ARCHITECTURES: "9.0"})
    (archive,) = (path for path in folder.glob("*.tar.gz") if path.name.startswith(name.replace("-", "_")))
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def mend(sources: Path, compiled: bool) -> None:
    """Change what keeps MegaBlocks' sources from being installed.

    Args:
        sources: megablocks, unpacked.
        compiled: false: setup.py is not to compile, whatever it sees.

    Raises:
        UserError: they are not those that this was written for.
    """
    header, setup = sources / "csrc/cumsum.h", sources / "setup.py"
    _replace(header, r"stream,\s*debug_synchronous", "stream", times=2)  # CUDA 13's CUB has lost the argument
    if not compiled:
        _replace(setup, r"if 'cu' in torch\.__version__ and CUDA_HOME is not None:", "if False:", times=1)


def _replace(path: Path, pattern: str, new: str, times: int) -> None:
    text, found = re.subn(pattern, new, path.read_text())
    if found != times:
        raise UserError(f"{path.name} of MegaBlocks is not the one that is to be mended: {found} places, not {times}")
    path.write_text(text)


def _pip(arguments: list[str], variables: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *arguments]
    ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        said = [line for line in (ended.stderr or ended.stdout).splitlines() if re.search("error|Error|ERROR", line)]
        raise UserError(f"pip {arguments[0]} failed: {(said or ['it did not say why'])[-1].strip()}")


def install(names: tuple[str, ...], compiled: bool, variables: dict[str, str]) -> None:
    """Fetch, mend and install these packages, without what they require and with the build tools that are here."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            sources = fetch(name, Path(folder))
            if name == "megablocks":
                mend(sources, compiled)
            _pip(["install", "--no-deps", "--no-build-isolation", str(sources)], variables)


def build_variables(architectures: str) -> dict[str, str]:
    """Return the environment in which nvcc finds what it needs."""
    variables = {ARCHITECTURES: architectures, "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))}
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        headers = Path(place) / "cu13/include"  # torch's own, which grouped_gemm does not find
        if headers.is_dir():
            variables["CPATH"] = os.pathsep.join(filter(None, [str(headers), os.environ.get("CPATH", "")]))
    return variables


@cli.tool
def main(config: MegaBlocksConfig) -> None:
    names = tuple(versions()) if config.compiled else PYTHON_ONLY
    described = ", ".join(f"{name} {versions()[name]}" for name in names)
    check = [sys.executable, "-c", IMPORTED]
    importable = not config.compiled or subprocess.run(check, capture_output=True, check=False).returncode == 0
    if installed(names) and importable:
        print(f"{described}: here already")
        return
    if not config.compiled:
        install(names, compiled=False, variables={ARCHITECTURES: "9.0"})
        print(f"{described}: Python files installed, nothing compiled")
        return
    architectures, began = capability(), time.monotonic()
    install(names, compiled=True, variables=build_variables(architectures))
    ended = subprocess.run(check, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise UserError(f"{described} were built, and cannot be imported: {ended.stderr.strip().splitlines()[-1]}")
    seconds = time.monotonic() - began
    print(
        f"{described}: built for {architectures} in {seconds:.0f} s, csrc/cumsum.h mended; "
        "model.moe.backend=auto takes them on a GPU in bf16"
    )


if __name__ == "__main__":
    cli.run(main)
