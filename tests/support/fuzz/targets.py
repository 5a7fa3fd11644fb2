"""Every kind of file that is read: where one lies, who reads it, and what is done to it."""

from typing import NamedTuple

from tests.support.fuzz import mutations

GENERATE = ("tools.generate", "{}", "num_tokens=1")
GENERATE_NUMBERS = (*GENERATE, "prompt=3 1 4")
"""Of a run whose data are no text."""
CONSOLIDATE = ("tools.consolidate", "{}")
RESUME = ("train.py", "{}")
"""Its arguments are the run's own, and those that resume it."""
RUNS = ("tools.runs", ".")
COMPARE = ("tools.compare", "{}")
REPLAY = ("tools.replay", "{}")
EXPORT = ("tools.export", "{}", "output=new")
EVALUATE = ("tools.evaluate", "{}", "batches=1")
INSPECT = ("tools.prepare", "inspect", "{}")
TRAIN = ("train.py", "data=shards", "data.path={}")
REMOTE = ("train.py", "data=shards", "data.path={address}", "data.cache_dir={cache}")
"""From a server on this machine, which does to a file what one of ANSWERS says, or what has been done to the file."""
ANSWERS = (*([None] * 4), "zipping", "shifted", "endless", "truncating", "failing", "elsewhere")
"""Attributes of tests.support.servers.Server; None: it does nothing to it."""
REPORT = ("studies.report", "{}")
PREPARE = ("tools.prepare", "input={}", "output=new", "validation=0.4", "processes=1")
TOKENIZE = ("tools.prepare", "input=texts", "output=new", "validation=0.4", "tokenizer={}/tokenizer.json")
LOAD = ("tests.support.fuzz.load_export", "{}")
READ_ONLY = ("tools.runs", "tools.generate", "tools.replay", "tests.support.fuzz.load_export")
"""What changes nothing in its working folder, however it ends."""


class Target(NamedTuple):
    """A kind of file.

    Attributes:
        kind: what it is called.
        folder: that of seeds.make in which it lies, or the file itself.
        files: which of the folder's, as a glob; empty: the seed is a file.
        readers: programs and their arguments; {} is the folder.
        how: what is done to it, beside any_bytes.
        anything: what else may lie in its place; nothing where a pipe may be meant, and is waited for.
    """

    kind: str
    folder: str
    files: str
    readers: tuple[tuple[str, ...], ...]
    how: tuple[object, ...] = ()
    anything: tuple[object, ...] = (mutations.another_kind,)


TARGETS = (
    Target("index", "corpus", "index.json", (INSPECT, TRAIN), (mutations.json_values,)),
    Target("shard", "corpus", "*.npy", (INSPECT, TRAIN)),
    Target(
        "tokenizer",
        "corpus",
        "tokenizer.json",
        (INSPECT, TOKENIZE),
        (mutations.json_values,),
    ),
    Target(
        "checkpoint",
        "run",
        "checkpoints/last.ckpt",
        (GENERATE, CONSOLIDATE, RESUME, EXPORT, REPLAY),
        (mutations.torch_values,),
    ),
    Target("resumed checkpoint", "run", "checkpoints/last.ckpt", (RESUME,), (mutations.torch_values,)),
    Target("pieces", "pieces", "checkpoints/last.ckpt/*", (GENERATE, CONSOLIDATE, RESUME)),
    Target("pieces' index", "pieces", "checkpoints/last.ckpt/index.json", (GENERATE, RESUME), (mutations.json_values,)),
    Target("pieces' values", "pieces", "checkpoints/last.ckpt/*.pt", (GENERATE, RESUME), (mutations.torch_values,)),
    Target("old pieces", "old_pieces", "checkpoints/last.ckpt/*", (GENERATE_NUMBERS, CONSOLIDATE)),
    Target(
        "old index", "old_pieces", "checkpoints/last.ckpt/.metadata", (GENERATE_NUMBERS,), (mutations.pickle_values,)
    ),
    Target("config", "run", "config.yaml", (GENERATE, EVALUATE, REPLAY, EXPORT, RUNS), (mutations.yaml_values,)),
    Target("overrides", "run", "overrides.yaml", (RUNS, RESUME), (mutations.yaml_values,)),
    Target("status", "run", "status.json", (RUNS, RESUME), (mutations.json_values,)),
    Target("summary", "run", "summary.json", (RUNS, COMPARE), (mutations.json_values,)),
    Target("provenance", "run", "provenance.json", (RUNS,), (mutations.json_values,)),
    Target("event file", "run", "events.out.tfevents.*", (COMPARE,)),
    Target("table", "run", "csv/version_0/metrics.csv", (COMPARE,), (mutations.table_values,)),
    Target("events", "run", "events.jsonl", (REPLAY, RESUME), (mutations.json_values,)),
    Target("flight record", "run", "flight_recorder/*.pt", (REPLAY,), (mutations.torch_values,)),
    Target("previous checkpoint", "run", "checkpoints/previous.ckpt", (REPLAY,), (mutations.torch_values,)),
    Target("snapshot", "run", "checkpoints/step_*/*", (RESUME,), (mutations.torch_values,)),
    Target("record", "study", "*.json", (REPORT,), (mutations.json_values,)),
    Target("study", "study", "study.yaml", (REPORT,), (mutations.yaml_values,)),
    Target("exported weights", "exported", "*.safetensors", (LOAD,)),
    Target("exported folder", "exported", "*.json", (LOAD,), (mutations.json_values,)),
    Target("text", "texts", "1.txt", (PREPARE,), (mutations.line_values,), ()),
    Target("JSON lines", "texts.jsonl", "", (PREPARE,), (mutations.json_values, mutations.line_values), ()),
    Target("compressed text", "texts.jsonl.gz", "", (PREPARE,), (), ()),
    Target("parquet", "texts.parquet", "", (PREPARE,), (), ()),
    Target("remote index", "corpus", "index.json", (REMOTE,), (mutations.json_values,), ()),
    Target("remote files", "corpus", "*.*", (REMOTE,), (), ()),
)
