"""A folder of transformers becomes a run that the tools open, and goes back to the same folder."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from core.checkpoint import load
from core.open_run import open_run
from datamodules.preparation.prepare import PrepareConfig, prepare
from tests.support.exports import exported
from tests.support.pretrained import ODD, OF_FAMILY, add_tokenizer, saved
from tests.support.runs import TEXT, Finished, run, tiny_job, train
from tests.support.tool_runs import byte_run
from tools import evaluate, export, generate, importing, plan, propagation, runs
from tools.evaluation.corpora import losses_of, open_corpus

import_tool: Any = importlib.import_module("tools.import")  # which is no name for a statement
SIZE = 300
WIDE = {"vocab_size": SIZE + 7}


def call(main: Any, *arguments: object, capsys: pytest.CaptureFixture[str]) -> Finished:
    """A tool's main function as the command line calls it."""
    capsys.readouterr()
    code: Any = 0
    try:
        import_tool.cli.run(lambda: main([str(argument) for argument in arguments]))
    except SystemExit as leaving:
        code = leaving.code
    return Finished(code, *capsys.readouterr())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    saved(folder, "Llama", **WIDE)
    add_tokenizer(folder, SIZE)
    return folder


@pytest.fixture(scope="module")
def corpus(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared with that tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts").mkdir()
    for n in range(40):
        (folder / f"texts/{n}.txt").write_bytes(TEXT[n * 1500 : (n + 1) * 1500])
    prepare(PrepareConfig(str(folder / "texts"), str(folder / "data"), str(llama), validation=0.3, processes=1))
    return folder / "data"


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in OF_FAMILY), *((f, torch.bfloat16) for f in ("Llama", "Qwen2", "Mixtral"))],
    ids=str,
)
def test_there_and_back_the_tensors_are_the_same(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tied = family in ("Qwen2", "Olmoe")
    theirs = saved(tmp_path / "theirs", family, dtype, tie_word_embeddings=tied)
    importing.make_run(tmp_path / "theirs", tmp_path / "run")
    kind: Any = str(dtype).removeprefix("torch.")
    said = export.export(export.ExportConfig(tmp_path / "run", tmp_path / "back", dtype=kind))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype
        assert torch.equal(tensor, after[name]), name
    written = "LlamaForCausalLM" if family == "Mistral" else f"{family}ForCausalLM"
    assert f"{written}, step 0" in said
    again = LlamaForCausalLM if family == "Mistral" else type(theirs)
    model = again.from_pretrained(
        tmp_path / "back", dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    batch = torch.randint(ODD["vocab_size"], (2, 9))
    with torch.no_grad():
        close = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
        torch.testing.assert_close(model.eval()(batch).logits, theirs(batch).logits, **close)


def test_the_configuration_comes_back_too(tmp_path: Path) -> None:
    """But for what has no effect: the beginning of a text is its end here."""
    saved(tmp_path / "theirs", "Qwen3Moe", norm_topk_prob=True, mlp_only_layers=[0], router_aux_loss_coef=0.0625)
    importing.make_run(tmp_path / "theirs", tmp_path / "run")
    exported(tmp_path / "run", tmp_path / "back")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    without = {"attention_bias", "attention_dropout", "initializer_range", "sliding_window", "use_sliding_window"}
    without |= {"bos_token_id", "eos_token_id", "output_router_logits", "transformers_version"}
    before["num_experts"] = before.pop("num_local_experts")
    assert {name: after.get(name) for name in before if name not in without} == {
        name: value for name, value in before.items() if name not in without
    }


def test_every_tool_takes_it(llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = call(import_tool.main, llama, f"output={tmp_path}/made", capsys=capsys)
    assert made.code == 0, made.err
    parameters = sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    assert made.out == f"{tmp_path}/made: LlamaForCausalLM, {parameters:,} parameters in float32\n"
    folder = (tmp_path / "made").rename(tmp_path / "elsewhere")  # it goes wherever it is moved

    opened = open_run(folder)
    assert opened.datamodule.tokenizer.content == (llama / "tokenizer.json").read_bytes()
    vocabulary = json.loads((llama / "tokenizer.json").read_text())["model"]["vocab"]
    assert opened.datamodule.tokenizer.end_of_document == vocabulary["</s>"]
    assert (opened.datamodule.seq_len, opened.step) == (ODD["max_position_embeddings"], 0)

    found = call(evaluate.main, folder, f"data={corpus}", "batches=1", capsys=capsys)
    assert found.code == 0, found.err
    measured = json.loads((folder / "evaluation/step_0/loss_data.json").read_text())
    assert 3 < measured["loss"] < 30
    own = call(evaluate.main, folder, capsys=capsys)
    assert own.code == 2
    assert "data=None is not valid: expected a prepared corpus: an imported model has no data" in own.err

    written = call(generate.main, folder, "prompt=def ", "num_tokens=8", capsys=capsys)
    assert written.code == 0, written.err
    assert written.out.startswith("def ")
    assert len(written.out) > len("def \n")

    measured_signals = propagation.report([f"init_from={folder}"])
    assert len(measured_signals.signals) == ODD["num_hidden_layers"]
    assert measured_signals.predictions is None
    drawn = propagation.report([f"init_from={folder}", "seed=1"])
    ratio = measured_signals.signals[0].variance / drawn.signals[0].variance
    assert 0.8 < ratio < 1.25, "the weights are the folder's, whatever the seed"

    config = plan.compose_config([f"init_from={folder}", "trainer.accelerator=cpu", "data=shards"])
    assert plan.plan(config, SIZE).parameters == parameters

    listed = call(runs.main, tmp_path, capsys=capsys)
    assert "imported from" in listed.out


def test_the_loss_is_what_transformers_has(llama: Path, corpus: Path, tmp_path: Path) -> None:
    importing.make_run(llama, tmp_path / "made", seq_len=48)
    opened = open_run(tmp_path / "made")
    (loss,) = losses_of(opened, [str(corpus)], batches=1)
    data = open_corpus(opened, str(corpus))
    tokens = torch.from_numpy(data.samples("val").read(np.arange(data.batch_size))["tokens"])
    theirs = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        logits = theirs(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.loss == pytest.approx(float(expected), rel=1e-5)


def test_without_a_tokenizer_its_tokens_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "theirs", "Llama")
    said = importing.make_run(tmp_path / "theirs", tmp_path / "run")
    assert said.endswith("; no tokenizer.json, so its tokens are numbers")
    done = call(generate.main, tmp_path / "run", "prompt=3 1 4", "num_tokens=4", capsys=capsys)
    assert done.code == 0, done.err
    assert all(int(word) < ODD["vocab_size"] for word in done.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{llama}"], "output=None is not valid: expected a value"),
        (["{llama}", "output={llama}"], "output='{llama}' is not valid: expected a new folder: this one is there"),
        (["{tmp}", "output={tmp}/new"], "FOLDER='{tmp}' is not valid: expected a folder of transformers"),
        (["{tmp}/none", "output={tmp}/new"], "FOLDER='{tmp}/none' is not valid: expected a folder of transformers"),
        (["{llama}/config.json", "output={tmp}/new"], "is not valid: expected a folder of transformers"),
        (["{llama}", "output={llama}/config.json/x"], "is not valid: expected a folder that can be written to"),
        (["{llama}", "output={tmp}/new", "seq_len=0"], "seq_len=0 is not valid: expected an integer >= 1 or null"),
        (
            ["{llama}", "output={tmp}/new", "end_of_document=<none>"],
            "end_of_document='<none>' is not valid: expected a",
        ),
        (["{llama}", "output={tmp}/new", "seqlen=4"], "did you mean seq_len?"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(llama.iterdir())
    filled = [argument.format(llama=llama, tmp=tmp_path) for argument in arguments]
    done = call(import_tool.main, *filled, capsys=capsys)
    assert done.code == 2
    assert message.format(llama=llama, tmp=tmp_path) in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert sorted(llama.iterdir()) == before


def test_what_fails_while_it_is_written_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "save", full)
    with pytest.raises(KeyboardInterrupt):
        importing.make_run(llama, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def job(*overrides: str) -> list[str]:
    """A tiny job without sizes of its model, which come from the folder."""
    return [item for item in tiny_job(*overrides) if not item.startswith(("model.", "data.root"))]


def test_from_a_folder_to_a_run_to_a_folder_that_writes_text(llama: Path, corpus: Path, tmp_path: Path) -> None:
    """The chain: train.py takes the architecture, tools.export gives it back, transformers generates."""
    start = [f"init_from={llama}", "data=shards", f"data.path={corpus}", "run_dir=run"]
    done = train(tmp_path, *job(*start))
    assert done.code == 0, done.err
    assert f"The model of {llama}: placement=prenorm, norm_eps=0.001, num_layers=3, dim=40, " in done.out
    content = load(tmp_path / "run/checkpoints/last.ckpt")
    model = content["hyper_parameters"]["model"]
    assert (model["placement"], model["num_layers"], model["head_dim"], model["rope_theta"]) == ("prenorm", 3, 6, 500.0)
    moved = (
        content["state_dict"]["model.embedding.weight"]
        - load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    )
    assert 0 < moved.abs().max() < 0.1, "two steps from where it began"
    exported(tmp_path / "run", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    batch = tokenizer("def f(", return_tensors="pt")
    new = theirs.generate(**batch, max_new_tokens=6, do_sample=False)
    ours = open_run(tmp_path / "run").module.generate(batch["input_ids"][0].tolist(), 6, 0.0, 0, 32)
    assert new[0].tolist() == ours[: new.size(1)]


def test_a_run_from_a_folder_is_resumed_without_it(llama: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "gone")
    start = job("init_from=gone", "data=shards", f"data.path={corpus}", "run_dir=run", "optim.schedule=constant")
    assert train(tmp_path, *start).code == 0
    shutil.rmtree(tmp_path / "gone")
    done = train(tmp_path, *start, "trainer.max_steps=3", "ckpt_path=last")
    assert done.code == 0, done.err
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 3


def test_it_is_started_from_and_not_resumed(llama: Path, corpus: Path, tmp_path: Path) -> None:
    importing.make_run(llama, tmp_path / "made")
    before = sorted((tmp_path / "made").rglob("*"))
    start = job("data=shards", f"data.path={corpus}")
    done = train(tmp_path, *start, "run_dir=made", "ckpt_path=last")
    assert done.code == 2
    last = "made/checkpoints/last.ckpt"
    assert f"ckpt_path='{last}' is not valid: expected a checkpoint of training: this one has weights" in done.err
    assert f"; init_from={last} starts a new run_dir from them" in done.err
    assert sorted((tmp_path / "made").rglob("*")) == before
    done = train(tmp_path, *start, "run_dir=new", f"init_from={last}")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_layers=2"], "model.num_layers=2 is not valid: expected 3, as in {llama}/config.json"),
        (["model.num_layers=4"], "model.num_layers=4 is not valid: expected 3"),  # which a run has by default
        (["model=moe"], "model.ffn='moe' is not valid: expected 'dense'"),
        (["experiment=moe_spannorm"], "model.ffn='moe' is not valid: expected 'dense'"),
        (["data=python_stdlib"], "init_from='{llama}' is not valid: expected weights for the data's tokens, byte"),
        (["data=synthetic"], "weights for the data's tokens, numbers"),
        (["data=mixture", "data.paths=[{corpus}]", "data.weights=[1]", "model.dim=64"], "model.dim=64 is not valid"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_folder_is_one_line(
    overrides: list[str], message: str, llama: Path, corpus: Path, tmp_path: Path
) -> None:
    data = ["data=shards", f"data.path={corpus}"] if not any("data=" in item for item in overrides) else []
    if "data=python_stdlib" in overrides:
        data = [item for item in tiny_job() if item.startswith("data.root")]
    if any("data=" in item for item in overrides) and "data=synthetic" in overrides:
        data = ["data.seq_len=31"]
    given = [item.format(corpus=corpus) for item in overrides]
    done = train(tmp_path, *job(f"init_from={llama}", "run_dir=new"), *given, *data)
    assert done.code == 2, done.out
    assert message.format(llama=llama) in done.err
    assert not (tmp_path / "new").exists()


def test_an_experiments_placement_stands_around_its_matrices(llama: Path, corpus: Path, tmp_path: Path) -> None:
    """That is set, though a run has it by default; the sizes are not, and come from the folder."""
    start = [f"init_from={llama}", "data=shards", f"data.path={corpus}", "run_dir=run"]
    done = train(tmp_path, *job("experiment=dense_spannorm", *start))
    assert done.code == 0, done.err
    model = load(tmp_path / "run/checkpoints/last.ckpt")["hyper_parameters"]["model"]
    assert (model["placement"], model["num_layers"]) == ("spannorm", 3)
    assert "as the init says: blocks.0.placement." in done.err + done.out


def test_a_run_of_ours_gives_its_architecture_too(tmp_path: Path) -> None:
    options = ["model.placement=mixln", "model.placement_options={post_fraction: 0.4}"]
    first = run(tmp_path, "first", *options, "model.rope_theta=77", "model.num_layers=3")
    sizes = [item for item in tiny_job() if not item.startswith("model.")]
    done = train(tmp_path, *sizes, f"init_from={first}", "run_dir=second")
    assert done.code == 0, done.err
    model = load(tmp_path / "second/checkpoints/last.ckpt")["hyper_parameters"]["model"]
    assert (model["placement"], model["rope_theta"], model["num_layers"]) == ("mixln", 77.0, 3)
    assert model["placement_options"] == {"post_fraction": 0.4}
    other = ["model.placement=prenorm", f"init_from={first}", "run_dir=other"]
    assert train(tmp_path, *sizes, *other).code == 0, "options of its placement are none of another one"
    refused = train(tmp_path, *sizes, "model.num_heads=1", f"init_from={first}", "run_dir=third")
    assert f"model.num_heads=1 is not valid: expected 2, as in {first}" in refused.err


def test_bytes_of_an_exported_run_are_the_datas_tokens(tmp_path: Path) -> None:
    first = byte_run(tmp_path, "experiment=dense_prenorm")
    exported(first, tmp_path / "out")
    sizes = [item for item in tiny_job() if not item.startswith("model.")]
    done = train(tmp_path, *sizes, f"init_from={tmp_path}/out", "run_dir=second")
    assert done.code == 0, done.err


def test_code_that_a_strangers_run_names_is_not_run(tmp_path: Path) -> None:
    first = run(tmp_path, "first")
    path = first / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["model"]["placement"] = "evil.Placement"
    torch.save(content, path)
    done = train(tmp_path, *tiny_job(f"init_from={first}", "run_dir=second"))
    assert done.code == 2
    assert "model.placement='evil.Placement' is not valid: " in done.err
    assert "names code that is not this project's" in done.err
