"""The command: losses against sums written here, tasks as the harness reports them, figures in TensorBoard."""

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from core import cli
from core.open_run import open_run
from tests.support.runs import TEXT, events, run_on, scalars
from tests.support.tool_runs import SMALL, bpe_corpus, bpe_run, byte_run
from tools import evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_run(tmp_path_factory.mktemp("bytes"), "experiment=moe_spannorm")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one tokenizer: a vocabulary of 300, trained on the first; they are of different texts and lengths."""
    folder = tmp_path_factory.mktemp("corpora")
    first = bpe_corpus(folder / "code")
    second = bpe_corpus(folder / "prose", TEXT.upper()[:30000], tokenizer=str(first / "tokenizer.json"))
    return [first.rename(folder / "lower"), second.rename(folder / "upper")]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    evaluate.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def written(folder: Path, name: str) -> dict:
    return json.loads((folder / f"evaluation/step_3/{name}.json").read_text())


def test_its_own_data_gives_the_loss_of_its_summary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, run)
    summary, loss = json.loads((run / "summary.json").read_text()), written(run, "loss_val")
    assert loss["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert loss["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-5)
    assert f"{summary['val_loss']:.4f}" in out
    assert scalars(run, "eval/val/loss") == {3: pytest.approx(loss["loss"])}
    assert scalars(run, "eval/val/perplexity") == {3: pytest.approx(math.exp(loss["loss"]))}


def test_a_corpus_is_read_whole_and_by_position(
    corpora: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bpe_run(tmp_path, corpora[0])
    out = call(capsys, folder, f"data={corpora[0]},{corpora[1]}")
    opened = open_run(folder)
    for corpus in corpora:
        index, found = json.loads((corpus / "index.json").read_text()), written(folder, f"loss_{corpus.name}")
        tokens = torch.from_numpy(opened.datamodule.__class__(str(corpus), 48, 4).split("val").tokens.astype("int64"))
        rows = [tokens[start : start + 49] for start in range(0, len(tokens) - 48, 48)]
        with torch.no_grad():
            logs = torch.stack([opened.module(row[None, :-1])[0][0].log_softmax(-1) for row in rows])
        losses = -logs.gather(2, torch.stack(rows)[:, 1:, None])[:, :, 0]
        assert found["tokens"] == losses.numel()
        assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert found["by_position"] == pytest.approx(losses.mean(0).tolist(), rel=1e-4)
        val = index["splits"]["val"]
        bits = found["loss"] / math.log(2) * val["num_tokens"] / val["num_bytes"]
        assert found["bits_per_byte"] == pytest.approx(bits)
        assert f"{float(losses[:, 32:].mean()):.4f}" in out, "positions 33-48"
    call(capsys, folder, f"data={corpora[0]}", "batches=1")
    assert written(folder, "loss_lower")["tokens"] == 4 * 48


def test_a_mixture_is_told_apart(corpora: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["data=mixture", f"data.paths=[{corpora[0]},{corpora[1]}]", "data.weights=[3,1]", "data.val_batches=4"]
    folder = run_on(tmp_path, *SMALL, *data, "data.document_mask=true")
    call(capsys, folder)
    parts = [written(folder, f"loss_{name}") for name in ("val", "lower", "upper")]
    for key, part in zip(("val/loss", "val/loss/lower", "val/loss/upper"), parts, strict=True):
        assert part["loss"] == pytest.approx(list(scalars(folder, key).values())[-1], rel=1e-5)
    assert parts[0]["tokens"] == parts[1]["tokens"] + parts[2]["tokens"]
    assert scalars(folder, "eval/upper/loss")[3] == pytest.approx(parts[2]["loss"])


def test_tasks_are_reported_as_the_harness_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, run, "tasks=offline", "batch_size=5")
    for name in ("offline_choice", "offline_text", "offline_continue"):
        assert name in out
        assert list((run / "evaluation/step_3").glob(f"samples_{name}_*.jsonl"))
    (results,) = (run / "evaluation/step_3").glob("results_*.json")
    found = json.loads(results.read_text())["results"]
    assert 0 <= found["offline_choice"]["acc,none"] <= 1
    assert found["offline_text"]["bits_per_byte,none"] < 9
    tags = {tag for tag in events(run).Tags()["scalars"] if tag.startswith("eval/offline")}
    assert tags == {
        "eval/offline_choice/acc",
        "eval/offline_choice/acc_norm",
        "eval/offline_continue/exact_match",
        *(f"eval/offline_text/{name}" for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")),
    }
    assert scalars(run, "eval/offline_text/bits_per_byte")[3] == pytest.approx(
        found["offline_text"]["bits_per_byte,none"]
    )


class WouldRead(Exception):
    """The harness would read its thousands of task files."""


@pytest.mark.parametrize(
    ("group", "tasks", "reads"),
    [
        (None, ["offline"], False),
        (None, ["offline_text", "offline", "offline_choice"], False),
        (None, ["paper"], True),
        (None, ["offline", "hellaswag"], True),
        (None, ["ofline"], True),
        ("offline_text", ["mine"], False),
        ("[offline, mine]", ["mine"], False),
        ("[offline, paper]", ["mine"], True),
        ("[offline_text, {task: hellaswag, num_fewshot: 1}]", ["mine"], True),
    ],
)
def test_the_harness_own_tasks_are_read_where_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str | None, tasks: list[str], reads: bool
) -> None:
    from lm_eval.tasks import TaskManager

    from tools.evaluation import harness

    ours = shutil.copytree(harness.TASKS, tmp_path / "tasks")
    if group is not None:
        (ours / "mine.yaml").write_text(f"group: mine\ntask: {group}\n")
    monkeypatch.setattr(harness, "TASKS", ours)
    index = TaskManager.__init__

    def watched(manager: TaskManager, include_defaults: bool = True, **options: object) -> None:
        if include_defaults:
            raise WouldRead
        index(manager, include_defaults=False, **options)

    monkeypatch.setattr(TaskManager, "__init__", watched)
    with pytest.raises(WouldRead) if reads else nullcontext():
        assert set(tasks) <= set(harness.manager_of(tasks).all_tasks)


@pytest.mark.slow
def test_the_papers_tasks_are_the_harness_own() -> None:
    from lm_eval.tasks import TaskManager

    from tools.evaluation.harness import TASKS

    manager = TaskManager(include_path=str(TASKS))
    named = (TASKS / "paper.yaml").read_text().split("task:\n")[1].split("metadata")[0]
    tasks = [line.strip("- ") for line in named.splitlines() if line.strip()]
    assert tasks == ["hellaswag", "piqa", "arc_challenge", "winogrande", "sciq", "lambada_openai", "wikitext"]
    assert {"paper", "offline", *tasks} <= set(manager.all_tasks)


@pytest.fixture
def few_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness with one folder of its tasks: all of them take many seconds to read."""
    from lm_eval.tasks import manager

    shutil.copytree(Path(manager.__file__).parent / "hellaswag", tmp_path / "harness/hellaswag")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "harness/manager.py"))


@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data={tmp}"], "{tmp}/index.json cannot be read: No such file or directory"),
        (["data={corpus}"], "expected a corpus of the run's own tokenizer, byte; this one has bpe:300"),
        (
            ["tasks=helaswag"],
            "tasks='helaswag' is not valid: expected tasks of the harness or of tools/evaluation/tasks (did you mean",
        ),
        (["tasks=a", "data=b"], "tasks='a' is not valid: expected none where data is given"),
        (["data=a/x,b/x"], "data='a/x,b/x' is not valid: expected corpora whose folders' names differ, not x, x"),
        (["batches=0"], "batches=0 is not valid: expected an integer >= 1"),
        (["tasks=offline_choice", "window=5"], "window=5 is not valid: expected at least"),
        (["tasks=offline", "batches=3"], "batches=3 is not valid: expected null with tasks"),
        (["limit=3"], "limit=3 is not valid: expected null where there are no tasks"),
        (["batch_size=3"], "batch_size=3 is not valid: expected null where there are no tasks"),
    ],
)
def test_a_mistake_is_one_clear_line(
    arguments: list[str],
    message: str,
    run: Path,
    corpora: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [argument.format(tmp=tmp_path, corpus=corpora[0]) for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        evaluate.cli.run(lambda: evaluate.main([str(run), *filled]))
    assert message.format(tmp=tmp_path) in capsys.readouterr().err


def test_a_run_on_numbers_has_no_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_on(tmp_path, *SMALL[:1], "data=synthetic", "data.seq_len=31")
    with pytest.raises(SystemExit, match="2"):
        evaluate.cli.run(lambda: evaluate.main([str(folder), "tasks=offline"]))
    err = capsys.readouterr().err
    assert f"tasks='offline' is not valid: expected none: they are texts, and what {folder} was trained on is nu" in err
    assert err.count("\n") == 1
    assert not (folder / "evaluation").exists()
    assert "val" in call(capsys, folder)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("num_beams: 4", "generation_kwargs.num_beams=4 is not valid: expected 1: the task asks"),
        ("temperature: abc", "generation_kwargs.temperature='abc' is not valid: expected a number >= 0"),
        ("temperature: null", "generation_kwargs={"),
        ("top_k: [1]", "generation_kwargs.top_k=[1] is not valid: expected an integer >= 0"),
    ],
)
def test_a_task_that_asks_for_what_is_not_there_is_refused(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    message: str,
) -> None:
    """A task file of one's own, as tools/evaluation/tasks has them."""
    from tools.evaluation import harness

    tasks = tmp_path / "eval"
    shutil.copytree(harness.TASKS, tasks)
    task = next(path for path in tasks.rglob("*.yaml") if "task: offline_continue" in path.read_text())
    task.write_text(task.read_text().replace("  max_gen_toks: 8\n", f"  max_gen_toks: 8\n  {option}\n"))
    monkeypatch.setattr(harness, "TASKS", tasks)
    with pytest.raises(SystemExit, match="2"):
        evaluate.cli.run(lambda: evaluate.main([str(run), "tasks=offline_continue"]))
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("place", ["evaluation", "tensorboard"])
def test_figures_are_printed_where_they_cannot_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """A file is where the folder would be, which not even root can write into; or a link leads out of the run."""
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / place, ignore_errors=True)
    (copy / place).touch() if place == "evaluation" else (copy / place).symlink_to(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate", str(copy)])
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: evaluate.main([str(copy)]))
    out, err = capsys.readouterr()
    assert f"{json.loads((run / 'summary.json').read_text())['val_loss']:.4f}" in out
    assert err.startswith("Error: ")
    assert f"{copy}" in err
    assert err.count("\n") == 1
