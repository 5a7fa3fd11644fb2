"""Reads the weights of a folder of transformers as those of a Transformer: all of them, or an error."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from core.errors import ConfigError, InvalidValue, one_line, require
from core.printable import printable
from core.sharded_checkpoint import open_safetensors
from core.untrusted import MIB, Untrusted, read_json
from lightning_modules.config import ModelConfig, parse
from lightning_modules.pretrained.families import Pretrained
from lightning_modules.pretrained.names import Entry, entries
from lightning_modules.transformer import Transformer

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 64 * MIB
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""RoPE's, which files of old have beside the weights; they follow from rope_theta."""


def read_weights(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return a folder's tensors by the names of a Transformer's parameters, as they are stored.

    Raises:
        ConfigError: a tensor is missing, has another shape than config.json says, is in no type of DTYPES, or is one
            that the architecture has not: names it.
    """
    folder = pretrained.folder
    paths = files_of(folder)
    config = parse(ModelConfig, "model", pretrained.model)
    try:
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for path in paths:
                file = stack.enter_context(open_safetensors(path))
                for name in file.keys():  # noqa: SIM118
                    if name in files:
                        raise Untrusted(f"{name} is in two files")
                    files[name] = file
            return _Reader(folder, files, config, pretrained).weights()
    except (SafetensorError, Untrusted, OSError) as error:
        raise InvalidValue("init_from", str(folder), one_line(error)) from error


def files_of(folder: Path) -> list[Path]:
    """Return the files of safetensors that a folder's weights are in: model.safetensors, or what its index names.

    Raises:
        ConfigError: there are none; or others, whose reading could run code.
        Untrusted: the index is none.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    index = folder / INDEX
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    found = f" ({others[0]} is a pickle, whose reading could run code)" if others else ""
    valid = f"a folder with {WHOLE}, or {INDEX}{found}: save_pretrained of transformers writes it"
    require(index.is_file(), "init_from", str(folder), valid)
    content = read_json(index, limit=MAX_INDEX)
    names = content.get("weight_map") if isinstance(content, dict) else None
    files = set(names.values()) if isinstance(names, dict) else set()
    if not files or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in files):
        raise Untrusted(f"{index.name} has no weight_map of names of files beside it")
    return [folder / name for name in sorted(files)]


class _Reader:
    """Reads the tensors of one folder, in the order of the model."""

    def __init__(self, folder: Path, files: dict[str, Any], config: ModelConfig, pretrained: Pretrained) -> None:
        self.folder, self.files, self.config, self.family = folder, files, config, pretrained.family
        enough = config.num_layers <= len(files)  # before a model of any size is described
        require(
            enough, "init_from", str(folder), f"{config.num_layers} layers, as config.json says: it has not so many"
        )
        assert config.vocab_size is not None
        with torch.device("meta"):
            model = Transformer(config, config.vocab_size)
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def weights(self) -> dict[str, Tensor]:
        ours: dict[str, Tensor] = {}
        read: set[str] = set()
        for entry in entries(self.config, self.family):
            is_tied = entry.ours == "head.weight" and self.config.tie_embeddings
            if is_tied and entry.theirs[0] not in self.files:
                continue
            read.update(entry.theirs)
            ours[entry.ours] = self.joined(entry)
            if is_tied:
                valid = "the embedding's values in lm_head.weight, or none: its config.json ties the two"
                same = torch.equal(ours.pop(entry.ours), ours["embedding.weight"])
                require(same, "init_from", str(self.folder), valid)
        extra = sorted(self.files.keys() - read - set(self.frequencies()))
        valid = f"the tensors of a {self.family.architecture}: it has no {', '.join(map(printable, extra[:3]))}"
        require(not extra, "init_from", str(self.folder), valid)
        return ours

    def joined(self, entry: Entry) -> Tensor:
        """Return one of our parameters, of one tensor or of several."""
        shape = self.shapes[entry.ours]
        if len(entry.theirs) == 1 and not entry.transposed:
            return self.tensor(entry.theirs[0], list(shape))
        out: Tensor | None = None
        for number, name in enumerate(entry.theirs):
            part = self.tensor(name, entry.shape_of_theirs(shape))
            part = part.t() if entry.transposed else part
            if out is None:
                out = torch.empty(shape, dtype=part.dtype)
            same = part.dtype == out.dtype
            require(same, "init_from", str(self.folder), f"one type in all experts of a layer: {name} has {part.dtype}")
            out[number * len(part) : (number + 1) * len(part)] = part
        assert out is not None
        return out

    def tensor(self, name: str, shape: list[int]) -> Tensor:
        has = f"the tensors of a {self.family.architecture}, as its config.json describes it"
        if name not in self.files:
            raise ConfigError("init_from", str(self.folder), f"{has}: there is no {name}")
        stored = self.files[name].get_slice(name)
        found = list(stored.get_shape())
        if found != shape:
            raise ConfigError("init_from", str(self.folder), f"{has}: {name} should be {shape}, and is {found}")
        tensor: Tensor = self.files[name].get_tensor(name)
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        require(tensor.dtype in DTYPES, "init_from", str(self.folder), f"{types}: {name} is {tensor.dtype}")
        return tensor

    def frequencies(self) -> Iterator[str]:
        """Yield the names of RoPE's frequencies in the files, which have to be those of rope_theta."""
        width = self.config.head_width
        expected = self.config.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        for name in filter(FREQUENCIES.fullmatch, self.files):
            found = self.tensor(name, [width // 2]).float()
            same = torch.allclose(found, expected, rtol=1e-2)  # bf16's digits
            valid = f"RoPE's frequencies of rope_theta={self.config.rope_theta:g}: {name} has others"
            require(same, "init_from", str(self.folder), valid)
            yield name
