"""Arguments of the tools that once ended in a traceback, or blamed another one: each is refused in one line."""

import pytest

from tests.support.fuzz.judge import faults
from tests.support.fuzz.sandbox import Sandbox, tree

LONG = "a" * 300
CASES = [  # module, arguments, what the line must hold
    *(
        (module, [LONG, *more], LONG[:255])
        for module, more in {
            **dict.fromkeys(("tools.runs", "tools.compare", "tools.replay", "tools.consolidate", "tools.generate"), ()),
            **dict.fromkeys(("tools.evaluate", "studies.report"), ()),
            "tools.export": ("output=x",),
        }.items()
    ),
    ("tools.export", [".", f"output={LONG}"], "output='aaa"),
    ("tools.plan", ["model.num_layers=1000000000"], "model.num_layers=1000000000 is not valid: expected at most 4,096"),
    ("tools.plan", ["data.batch_size=1000000000000"], "data.batch_size=1000000000000 is not valid: expected at most"),
    ("tools.plan", ["assumed_vocab_size=99999999999999999999"], "assumed_vocab_size=99999999999999999999 is not valid"),
    ("tools.prepare", ["inspect", ""], "PATH='' is not valid: expected the path of a folder: empty"),
    ("tools.plan", ["trainer.max_steps=abc"], "trainer.max_steps='abc' is not valid: expected an integer"),
    ("tools.plan", ["trainer.max_steps=null"], "trainer.max_steps=None is not valid: expected an integer"),
    ("tools.plan", ["trainer.accumulate_grad_batches=abc"], "trainer.accumulate_grad_batches='abc' is not valid"),
    ("tools.plan", ["model=0"], "model='0' is not valid: expected one of dense, moe, moe_1b"),
    ("tools.plan", ["experiment=[0.9]"], "experiment='[0.9]' is not valid: expected one of dense_7b"),
    ("tools.propagation", ["seed=abc"], "seed='abc' is not valid: expected an integer in [0, 2**32)"),
    ("tools.propagation", ["seed=99999999999999999999"], "seed=99999999999999999999 is not valid"),
    (
        "tools.propagation",
        ["output=x.abc"],
        "output='x.abc' is not valid: expected a name that ends in one of .png",
    ),
    ("tools.propagation", [f"output={LONG}.png"], "output='aaa"),
    ("tools.propagation", ["output=texts.png"], "output='texts.png' is not valid: expected the name of a file"),
    ("tools.coordinate_check", ["output=x.abc"], "output='x.abc' is not valid"),
    ("tools.coordinate_check", ["lr=nan"], "lr=nan is not valid: expected a number >= 0"),
    ("tools.propagation", ["--output", "x.png", "--all-rows"], "--output x.png is now output=x.png; --all-rows is"),
    ("tools.compare", ["a", "--tags", "b", "c", "--output=d.png"], "--tags b c is now tags=b,c; --output=d.png is"),
    ("tools.replay", ["a", "--allow", "b.C", "--allow", "d.E"], "--allow b.C --allow d.E is now allow=b.C,d.E"),
    ("tools.plan", ["--vocab-size", "5"], "--vocab-size 5 is now assumed_vocab_size=5"),
    ("tools.plan", ["mfuu=0.4"], "mfuu='0.4' is not valid: no such field; one of assumed_vocab_size, blocks"),
    ("tools.runs", ["--sort"], "--sort is now sort=VALUE"),
    ("tools.runs", ["--frobnicate"], "--frobnicate=None is not valid: no such field; one of columns, output, sort"),
    ("tools.consolidate", [".", "checkpoint=first"], "checkpoint='first' is not valid: expected one of last, best"),
    ("studies.report", ["."], "RUNS='.' is not valid"),
    ("studies.status", ["study=0"], "study='0' is not valid: expected one of depth"),
    ("studies.status", ["study=[depth]"], "study="),
    ("studies.status", ["study=depth", "seeds=0"], "seeds=0 is not valid: expected a list of integers"),
    ("studies.status", ["study=depth", "scale=0"], "scale=0 is not valid: expected one of day, gpu, laptop"),
    ("studies.status", ["study=depth", "results_dir=5"], "results_dir=5 is not valid: expected the path of a folder"),
    ("studies.status", ["study=depth", "study.axes=0"], "study.axes=0 is not valid"),
    ("studies.status", ["study=depth", "study.scales.laptop=0"], "study.scales.laptop=0 is not valid"),
    ("studies.run", ["study=depth", "seeds=5"], "seeds=5 is not valid: expected a list of integers"),
    ("studies.run", ["study=depth", "run=x"], "run='x' is not valid: expected null"),
    ("studies.run", ["study=depth", "threads=-1"], "threads=-1 is not valid: expected an integer from 1"),
]


@pytest.mark.parametrize(("module", "arguments", "part"), CASES, ids=lambda value: str(value)[:60])
def test_it_is_refused_in_one_line(sandbox: Sandbox, module: str, arguments: list[str], part: str) -> None:
    with sandbox.world() as world:
        (world.work / "texts.png").mkdir()
        before = tree(world.work)
        outcome = sandbox.run(world, module, *arguments)
        assert outcome.code == 2, outcome.err
        assert faults(outcome, before, world) == []
        assert outcome.message.count("Error: ") == outcome.err.count("\n") == 1, outcome.err
        assert part in outcome.message
