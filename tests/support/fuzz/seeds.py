"""One good folder of every kind that is read, made by the project itself; the cases damage copies of them."""

import gzip
import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

from studies.grid import Study
from studies.record import FINISHED, Record
from tests.support.fuzz.sandbox import Sandbox
from tests.support.runs import ROOT, TEXT, tiny_job

SNAPSHOTS = (
    "callbacks.divergence.policy=rollback",
    "callbacks.divergence.policy_options={every: 1, margin: 1}",
    "callbacks.last_checkpoint.every_n_train_steps=1",
)
"""Overrides with which a run keeps more than its last checkpoint."""
OLD_PIECES = ROOT / "tests/fixtures/checkpoints/in_pieces"
STUDY = Study("rates", "laptop", "Which?", "little", {"optim.lr": {"1e-3": ["optim.lr=1e-3"]}}, None, (0, 1), ())


def make(sandbox: Sandbox, folder: Path) -> Path:
    """Fill a folder with one of each.

    | name | what |
    |---|---|
    | run, llama | runs with both loggers: with snapshots and a flight record, and one that is exported |
    | pieces, old_pieces | runs with a checkpoint in pieces: as of today, and as of version 0.1 |
    | corpus | a prepared one with a tokenizer of its own |
    | texts, texts.jsonl, texts.jsonl.gz, texts.parquet | texts for one |
    | study, exported | the records of a study; a run as transformers reads it |
    """
    with sandbox.world() as world:
        (world.work / "texts").mkdir()
        for number in range(40):
            (world.work / f"texts/{number}.txt").write_bytes(TEXT[number * 1500 : (number + 1) * 1500])
        lines = "".join(json.dumps({"text": f"{number} {TEXT[:300].decode()}"}) + "\n" for number in range(40))
        (world.work / "texts.jsonl").write_text(lines)
        (world.work / "texts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        table = pyarrow.table({"text": [json.loads(line)["text"] for line in lines.splitlines()]})
        pyarrow.parquet.write_table(table, world.work / "texts.parquet", row_group_size=10)
        small = ("trainer.max_steps=3", "trainer.val_check_interval=3", "logger=[tensorboard,csv]")
        for program, *arguments in (
            ("train.py", *tiny_job(*small), *SNAPSHOTS, "run_dir=run"),
            ("train.py", *tiny_job(*small), "trainer=fsdp", "trainer.devices=1", "run_dir=pieces"),
            ("tools.prepare", "input=texts", "tokenizer=bpe:300", "output=corpus", "validation=0.3", "processes=1"),
            ("train.py", *tiny_job(*small), "model.placement=prenorm", "model.init=megatron", "run_dir=llama"),
            ("tools.export", "llama", "output=exported"),
        ):
            ended = sandbox.run(world, program, *arguments)
            assert ended.code == 0, ended.err
        shutil.copytree(OLD_PIECES, world.work / "old_pieces")
        record_flight(world.work / "run")
        record_study(world.work / "study")
        shutil.copytree(world.work, folder)
    return folder


def record_flight(run: Path) -> None:
    """As callbacks.flight_recorder does when a step goes wrong."""
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    steps = [{"step": 2, "samples": [4, 7], "losses": [5.5], "grad_norm": 1.0, "norms": [1.0], "nonfinite": [0.0]}]
    record = {"reason": "a spike", "step": 2, "samples": [4, 7], "world_size": 1, "batches": [{"tokens": tokens}]}
    (run / "flight_recorder").mkdir()
    torch.save({**record, "steps": steps, "groups": [[1, "attn"]]}, run / "flight_recorder/step_2_rank_0.pt")
    (run / "events.jsonl").write_text('{"step": 2, "kind": "spike", "done": "nothing", "why": "a spike"}\n')


def record_study(folder: Path) -> None:
    """As studies.run does."""
    folder.mkdir()
    STUDY.save(folder / "study.yaml")
    for run in STUDY.runs():
        record = Record(
            **{"name": run.name, "point": dict(run.point), "seed": run.seed, "overrides": list(run.overrides)},
            **{"status": FINISHED, "folder": "runs/rates", "val_loss": 2.0, "bigram_loss": 2.6, "seconds": 10.0},
            train_loss=([0, 5], [3.0, 2.0]),
            by_block={"signal/block_{}/variance": {"0": {"1": 1.0, "2": 2.0}, "5": {"1": 1.5, "2": 2.5}}},
        )
        record.save(folder / f"{run.name}.json")
