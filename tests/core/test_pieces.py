"""A checkpoint in pieces from elsewhere: what torch wrote is loaded, code in it is refused and does not run."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.load import _METADATA_FILENAME

from core.checkpoint import load, load_beside_weights
from core.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def save(folder: Path, **entries: Any) -> None:
    linear = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    dcp.save(
        {"state_dict": linear.state_dict(), "optimizer_0": optimizer.state_dict(), **entries}, checkpoint_id=folder
    )
    torch.save({"global_step": 7}, folder / _METADATA_FILENAME)


def test_what_torch_wrote_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt")
    content = load(tmp_path / "last.ckpt")
    assert content["global_step"] == load_beside_weights(tmp_path / "last.ckpt")["global_step"] == 7
    assert content["state_dict"]["weight"].shape == (2, 3)
    assert content["optimizer_0"]["param_groups"][0]["lr"] == 1e-3


@pytest.mark.parametrize("read", [load, load_beside_weights])
def test_code_in_an_entry_is_refused_and_does_not_run(tmp_path: Path, read: Any) -> None:
    save(tmp_path / "last.ckpt", extra=Payload(tmp_path / "ran"))
    with pytest.raises(ConfigError, match="a checkpoint that torch alone has written"):
        read(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()
    dcp.load({"extra": None}, checkpoint_id=tmp_path / "last.ckpt")
    assert (tmp_path / "ran").exists(), "torch alone would have run it"


@pytest.mark.parametrize("read", [load, load_beside_weights])
def test_code_in_the_metadata_is_refused_and_does_not_run(tmp_path: Path, read: Any) -> None:
    save(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt/.metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=r"it names \w+\.mkdir, which no checkpoint needs"):
        read(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_piece_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt")
    with (tmp_path / "last.ckpt/.metadata").open("rb") as file:
        metadata = pickle.load(file)
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"
    (tmp_path / "last.ckpt/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=r"a piece lies outside of it: \.\./elsewhere"):
        load(tmp_path / "last.ckpt")
