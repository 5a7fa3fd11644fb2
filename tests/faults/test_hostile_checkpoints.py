"""A checkpoint from a stranger, opened by all that open one: it runs nothing, writes nothing and takes little."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, StorageMeta

from core.errors import ConfigError, UserError
from core.open_run import open_data, open_run
from core.run_folder import read_overrides
from core.saved_config import load_config
from tests.support.forked import started
from tests.support.old_checkpoints import FIXTURES
from tests.support.runs import ROOT, corpus_root, train

EVIL = "__9_0.distcp"


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def fragment(value: Any) -> bytes:
    """Its pickle, to stand amid another one."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 2)
    pickler.fast = True
    pickler.dump(value)
    return buffer.getvalue()[2:-1]


def set_attribute(of: type, name: str, value: Any) -> bytes:
    """Opcodes that set an attribute of a class: BUILD with a state for slots, then POP."""
    return fragment(of) + fragment((None, {name: value})) + b"b0"


def renamed(harmless: Metadata, evil: Metadata) -> bytes:
    """The class of entries that are no tensors no longer has the name by which a look knows it."""
    return b"\x80\x02" + set_attribute(BytesStorageMetadata, "__name__", "u") + fragment(evil) + b"."


def two_faced(harmless: Metadata, evil: Metadata) -> bytes:
    """Made as one, then given the state of another; but the second time it is loaded, no state is taken any more."""
    made = fragment(Metadata) + fragment((evil.state_dict_metadata, None, evil.storage_data)) + b"R"
    built = made + fragment(vars(harmless)) + b"b"
    return b"\x80\x02" + built + set_attribute(Metadata, "__setstate__", StorageMeta) + b"."


FORMS = {"renamed": renamed, "two-faced": two_faced}


def arm(folder: Path, form: Callable[[Metadata, Metadata], bytes], canary: Path) -> None:
    """Put a pickle that makes the canary among the pieces of a checkpoint of torch.distributed.checkpoint."""
    harmless, evil = (pickle.loads((folder / ".metadata").read_bytes()) for _ in range(2))
    torch.save(Payload(canary), folder / EVIL)
    evil.state_dict_metadata["extra"] = BytesStorageMetadata()
    piece = _StorageInfo(EVIL, 0, (folder / EVIL).stat().st_size)
    evil.storage_data[MetadataIndex("extra")] = piece
    evil.planner_data["extra"] = ("extra",)
    (folder / ".metadata").write_bytes(form(harmless, evil))
    (folder / "metadata.crc32").unlink()


READERS = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from core.checkpoint import load, load_beside_weights
from core.open_run import open_run
from core.run_folder import newest_whole
from core.atomic_write import damage_of
from tools.consolidate import consolidate
for run in map(Path, sys.argv[1:]):
    path = run / "checkpoints/last.ckpt"
    for read in (
        lambda: load(path), lambda: load(path), lambda: damage_of(path, True), lambda: load_beside_weights(path),
        lambda: consolidate(path, run.parent / "weights.safetensors"), lambda: open_run(run), lambda: newest_whole(run),
    ):
        try:
            print("read", type(read()).__name__)
        except Exception as error:
            print("refused", type(error).__name__, " ".join(str(error).split())[:300])
"""


def opened_by_all(*runs: Path, seconds: float = 200) -> list[list[str]]:
    """What each reader says of each run's last checkpoint, in one process, which may take 8 GB of addresses."""
    with started(ROOT, "-c", READERS, *map(str, runs)) as reading:
        ended = reading.finish(seconds)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    lines = ended.out.splitlines()
    assert len(lines) == 7 * len(runs)
    return [lines[7 * n : 7 * n + 7] for n in range(len(runs))]


def test_no_reader_runs_what_is_among_the_pieces(tmp_path: Path) -> None:
    runs = []
    for name, form in FORMS.items():
        runs.append(Path(shutil.copytree(FIXTURES / "in_pieces", tmp_path / name / "run")))
        arm(runs[-1] / "checkpoints/last.ckpt", form, tmp_path / name / "ran")
    opened_by_all(*runs)
    for name in FORMS:
        assert not (tmp_path / name / "ran").exists(), name
    torch.load(runs[0] / "checkpoints/last.ckpt" / EVIL, weights_only=False)
    assert (tmp_path / "renamed/ran").exists(), "torch alone would have run it"


def edited(tmp_path: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a whole run whose checkpoint says something else."""
    run = Path(shutil.copytree(FIXTURES / "one_file", tmp_path / name / "run"))
    path = run / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)
    return run


def at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        *groups, last = path.split("/")
        for group in groups:
            content = content[group]
        content[last] = value

    return edit


def shared(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value, "b": value}
    return value


def best(path: str, **others: Any) -> tuple[str, Any]:
    """What makes Lightning remove a path, as soon as another checkpoint is better."""
    state = {"best_k_models": {path: 1.0}, "kth_best_model_path": path, "best_model_path": "", **others}
    return "callbacks/ModelCheckpoint{}", state


EDITS: dict[str, tuple[str, Any]] = {
    "a step that is a path": ("global_step", "x/../../../PWN"),
    "a step in the loops": ("loops/fit_loop/epoch_loop.batch_progress/total/ready", "../x"),
    "a negative step": ("global_step", -1),
    "a file to remove": best("/x/run/checkpoints/../../victim", dirpath="/x/run/checkpoints"),
    "a folder to remove": best("local:///x/victim", dirpath="/x/run/checkpoints"),
    "a bucket to remove": best("s3://bucket/victim"),
    "a file elsewhere to remove": best("/x/victim"),
    "weights that are none": ("state_dict/model.head.weight", "x"),
    "a vocabulary of 10^15": ("hyper_parameters/vocab_size", 10**15),
    "2^40 values": ("hyper_parameters/x", shared(40)),
    "256 GiB of one": ("state_dict/model.head.weight", torch.zeros(1).expand(1 << 36)),
}


@pytest.mark.slow
def test_what_cannot_be_is_refused_by_all_that_open_a_run(tmp_path: Path) -> None:
    runs = [edited(tmp_path, f"run{n}", at(*edit)) for n, edit in enumerate(EDITS.values())]
    for name, (first, _, _, beside, consolidated, opened, _) in zip(EDITS, opened_by_all(*runs), strict=True):
        if name != "a vocabulary of 10^15":  # which no file contradicts, but the model's weights do
            assert first.startswith("refused Untrusted"), f"{name}: {first}"
            assert beside.startswith("refused Untrusted"), f"{name}: {beside}"
            assert consolidated.startswith("refused UserError"), f"{name}: {consolidated}"
        assert opened.startswith("refused ConfigError checkpoint="), f"{name}: {opened}"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer_states/0/state/0/exp_avg", torch.zeros(3)),
        ("optimizer_states/0/param_groups/0/betas", (0.9,)),
        ("lr_schedulers/0/step", 5),
        ("Synthetic/samples", "x"),
    ],
)
def test_what_an_optimizer_finds_in_its_first_step_is_said_of_the_checkpoint(
    tmp_path: Path, path: str, value: Any
) -> None:
    run = Path(shutil.copytree(FIXTURES / "one_file", tmp_path / "run"))
    checkpoint = run / "checkpoints/last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    node, (*way, last) = content, [int(part) if part.isdecimal() else part for part in path.split("/")]
    for part in way:
        node = node[part]
    node[last] = value
    torch.save(content, checkpoint)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    replaced = ("run_dir=", "trainer.max_steps=")
    overrides = [override for override in read_overrides(run) if not override.startswith(replaced)]
    ended = train(tmp_path, *overrides, "trainer.max_steps=6", "run_dir=run", "ckpt_path=last")
    assert ended.code == 2, ended.err
    assert ended.err.splitlines()[-1].startswith("Error: ckpt_path=")
    after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "lock"}
    assert after == before


CONFIGS = {
    "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]" for n in range(12)),
    "depth": "a: " + "[" * 5000,
    "size": "a: '" + "x" * (2 << 20) + "'",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_unfolds_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.yaml").write_text(CONFIGS[name])
    with pytest.raises(UserError, match="cannot be read as a configuration"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("module.model.num_layers", 4096), ("module.model.dim", 2**18), ("module.model.ffn_dim", 2**21)],
)
def test_a_model_that_the_checkpoint_does_not_have_is_not_made(tmp_path: Path, field: str, value: int) -> None:
    run = Path(shutil.copytree(FIXTURES / "one_file", tmp_path / "run"))
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, field, value)
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(ConfigError, match="a checkpoint of the model that"):
        open_run(run)


ADDRESSES = {
    "path": {"_target_": "datamodules.shard_corpus.ShardCorpus", "path": "http://localhost:9/x"},
    "paths": {
        "_target_": "datamodules.mixture.Mixture",
        "paths": ["corpus", "s3://bucket/x", "filecache::http://localhost:9/y"],
        "weights": [1, 1, 1],
    },
}


@pytest.mark.parametrize("paths", [5, None, "s3://bucket/x", {"a": "s3://bucket/x"}])
def test_paths_that_are_no_list_are_refused_too(paths: Any) -> None:
    config = OmegaConf.create({"data": {**ADDRESSES["paths"], "paths": paths, "seq_len": 32, "batch_size": 4}})
    with pytest.raises(ConfigError, match=r"^data\.paths="):
        open_data(config)


@pytest.mark.parametrize("field", ADDRESSES)
def test_an_address_in_a_saved_configuration_is_not_asked_before_its_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("datamodules.remote.RemoteFolder.__init__", lambda self, address, cache: asked.append(address))
    run = Path(shutil.copytree(FIXTURES / "one_file", tmp_path / "run"))
    config = OmegaConf.load(run / "config.yaml")
    config.data = {**ADDRESSES[field], "seq_len": 32, "batch_size": 4, "val_batches": 1}
    OmegaConf.save(config, run / "config.yaml")
    addresses = [path for path in config.data.get("paths", [config.data.get("path")]) if "://" in path]
    for allow in ([], addresses[:-1]):
        with pytest.raises(
            ConfigError, match=f"data.{field}='.*' is not valid: .* of which nothing is fetched"
        ) as error:
            open_run(run, allow=allow)
        assert error.value.value == addresses[len(allow)]
        assert f"allow={addresses[len(allow)]}" in str(error.value)
    assert not asked
    data = open_run(run, allow=addresses).datamodule
    for corpus in getattr(data, "corpora", [data]):
        assert corpus.storage is not None
    assert asked == addresses


HUB_TEXT = {"_target_": "datamodules.hub_text.HubText", "root": "data", "seq_len": 32, "batch_size": 4}
HUB_IMAGES = {"_target_": "datamodules.images.hf_images.HFImages", "num_classes": 2, "batch_size": 4, "image_size": 8}
ON_HUB = {
    "text": ({**HUB_TEXT, "name": "you/tracker:small", "tokenizer": "byte"}, ["you/tracker:small"]),
    "tokenizer": ({**HUB_TEXT, "name": "you/text", "tokenizer": "hf:you/tok"}, ["you/text", "hf:you/tok"]),
    "a folder": ({**HUB_TEXT, "name": "folder", "tokenizer": "hf:you/tok"}, ["folder", "hf:you/tok"]),
    "images": ({**HUB_IMAGES, "path": "you/pictures"}, ["you/pictures"]),
}


@pytest.mark.parametrize("kind", ON_HUB)
def test_the_hub_is_not_asked_before_its_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Nor for what a folder's README names, as datasets reads it."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    data, names = ON_HUB[kind]
    config = OmegaConf.create({"data": data})
    for number, allow in enumerate([[], names[:-1]][: len(names)]):
        with pytest.raises(ConfigError, match="on the Hugging Face hub, of which nothing is fetched") as error:
            open_data(config, allow)
        assert error.value.value == names[number]
        assert str(error.value).endswith(f"; allow={','.join(names[number:])} asks there")
    open_data(config, names)


def test_a_corpus_that_was_made_of_a_dataset_is_read_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder, its files and the tokenizer are looked at again; pictures in a folder are read."""
    monkeypatch.chdir(tmp_path)
    for kind, asked in (("text", None), ("tokenizer", None), ("a folder", "hf:you/tok")):
        config = OmegaConf.create({"data": ON_HUB[kind][0]})
        data = open_data(config, ON_HUB[kind][1])
        data.folder.mkdir(parents=True)
        (data.folder / "index.json").write_text("{}")
        Path("folder").mkdir(exist_ok=True)
        if asked is None:
            open_data(config)
        else:
            with pytest.raises(ConfigError, match=f"data.tokenizer='{asked}'"):
                open_data(config)
    open_data(OmegaConf.create({"data": {**HUB_IMAGES, "path": "folder"}}))


def test_opening_a_run_writes_nowhere_but_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus that is there is read where it is; one that has to be written goes where a new run would put it."""
    run = Path(shutil.copytree(FIXTURES / "one_file", tmp_path / "run"))
    config = OmegaConf.load(run / "config.yaml")
    data = {"_target_": "datamodules.python_stdlib.PythonStdlib", "root": str(tmp_path / "anywhere")}
    config.data = {**data, "seq_len": 32, "batch_size": 4}
    OmegaConf.save(config, run / "config.yaml")
    assert open_run(run).datamodule.root == Path("data")
    config.data.root = str(corpus_root())
    OmegaConf.save(config, run / "config.yaml")
    assert open_run(run).datamodule.root == corpus_root()
    shards = {"_target_": "datamodules.shard_corpus.ShardCorpus", "path": "x", "cache_dir": str(tmp_path / "anywhere")}
    config.data = {**shards, "seq_len": 32, "batch_size": 4, "val_batches": 1}
    assert open_data(config).hparams["cache_dir"] == "data/cache"
    for asked, kept in ((1e6, 50), (2.5, 2.5)):
        config.data.cache_gb = asked
        assert open_data(config).hparams["cache_gb"] == kept, "nor more than a new run by itself"
    assert not (tmp_path / "anywhere").exists()
