"""What was exported, loaded by transformers: the logits and the tokens are those of the run."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.open_run import open_run
from datamodules.tokenizers import Tokenizer
from spannorm import PLACEMENTS
from tests.support.exports import exported, loaded, remade, tokenizer_of
from tests.support.runs import ROOT, run_on
from tests.support.tool_runs import SMALL, bpe_corpus, bpe_run, byte_run
from tools import export

TEXTS = ["def f(x):\n\treturn x", "", "é ß 漢字 🙂 \x00\x7f", "a<|endoftext|>b", "  two  spaces "]
MODELS = [*((name, "moe") for name in PLACEMENTS), ("spannorm", "dense"), ("siamesenorm", "dense"), ("subln", "dense")]

pytestmark = pytest.mark.usefixtures("hub_modules")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_run(tmp_path_factory.mktemp("bytes"), "experiment=dense_prenorm")


def assert_same_logits(folder: Path, output: Path, trusted: bool) -> Any:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=trusted)
    ours = open_run(folder).module
    batch = torch.randint(257, (3, 40))
    with torch.no_grad():
        expected, actual = ours(batch)[0], theirs.eval()(batch).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    return theirs


@pytest.mark.parametrize("placement", ["prenorm", "spannorm"])
def test_whoever_may_read_one_of_its_files_may_read_all(placement: str, first: Path, tmp_path: Path) -> None:
    """safetensors would make the weights for their owner alone."""
    exported(remade(first, tmp_path / "run", placement=placement), tmp_path / "out")
    (tmp_path / "any").touch()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {(tmp_path / "any").stat().st_mode}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"num_kv_heads": 1, "rope_theta": 500.0}, "LlamaForCausalLM"),
        ({"tie_embeddings": True}, "LlamaForCausalLM"),
        ({"ffn": "moe", "num_kv_heads": 1}, "MixtralForCausalLM"),
    ],
    ids=["grouped queries", "tied", "moe"],
)
def test_prenorm_is_loaded_as_llama_or_mixtral(model: dict[str, Any], name: str, first: Path, tmp_path: Path) -> None:
    folder = remade(first, tmp_path / "run", **model)
    assert exported(folder, tmp_path / "out") == f"{tmp_path}/out: {name}, step 7"
    assert not list((tmp_path / "out").glob("*.py"))
    assert type(assert_same_logits(folder, tmp_path / "out", trusted=False)).__name__ == name


@pytest.mark.parametrize(("placement", "ffn"), MODELS)
def test_any_placement_is_loaded_with_its_own_code(placement: str, ffn: str, first: Path, tmp_path: Path) -> None:
    norm = {"norm": "layernorm"} if placement == "prenorm" else {}
    folder = remade(first, tmp_path / "run", placement=placement, ffn=ffn, **norm)
    said = exported(folder, tmp_path / "out")
    assert f"by its own code (trust_remote_code=True): {'norm layernorm' if norm else 'placement ' + placement}" in said
    assert_same_logits(folder, tmp_path / "out", trusted=True)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"norm": "dyt"}, "norm dyt"),
        ({"placement_options": {"final_norm": False}}, "placement_options"),
        ({"ffn": "moe", "moe": {"num_shared_experts": 1}}, "shared experts"),
        ({"ffn": "moe", "moe": {"first_dense_layers": 1}}, "dense layers among the mixtures"),
        ({"ffn": "moe", "moe": {"score": "sigmoid"}}, "router scores by sigmoid"),
        ({"ffn": "moe", "moe": {"balancing": "bias"}}, "a bias in the selection of experts"),
        ({"ffn": "moe", "moe": {"normalize_weights": False}}, "expert weights that are not normalized"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llama_does_not_have_goes_with_its_own_code(
    model: dict[str, Any], reason: str, first: Path, tmp_path: Path
) -> None:
    folder = remade(first, tmp_path / "run", **model)
    assert f": {reason} is in none of Llama, Mistral, Qwen2, " in exported(folder, tmp_path / "out")
    assert_same_logits(folder, tmp_path / "out", trusted=True)


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_rope_is_written_where_each_version_reads_it(ffn: str, first: Path, tmp_path: Path) -> None:
    """transformers 4 reads rope_theta, and by another name of the tokenizer's class than 5 writes."""
    from transformers import AutoConfig

    folder = remade(first, tmp_path / "run", ffn=ffn, rope_theta=500.0)
    exported(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 500.0
    assert config["bos_token_id"] == config["eos_token_id"] == 256
    tokenizer = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("top_k", [2, 3])
def test_a_mixtral_weighs_its_balance_as_the_run(top_k: int, first: Path, tmp_path: Path) -> None:
    """Of one layer, where transformers' loss over all layers together and ours by layer are the same but for top_k."""
    moe = {"top_k": top_k, "load_balancing_weight": 0.3, "z_loss_weight": 0.0, "normalize_weights": True}
    folder = remade(first, tmp_path / "run", ffn="moe", num_layers=1, moe=moe)
    exported(folder, tmp_path / "out")
    theirs, ours = loaded(tmp_path / "out"), open_run(folder).module
    batch = torch.randint(257, (3, 40))
    with torch.no_grad():
        _, (stats,) = ours(batch)
        out = theirs(batch, labels=batch, output_router_logits=True)
        entropy = theirs(batch, labels=batch).loss
    torch.testing.assert_close(out.aux_loss, top_k * stats.load_balancing_loss)
    torch.testing.assert_close(out.loss - entropy, 0.3 * stats.load_balancing_loss)


def test_an_empty_prompt_begins_a_text(first: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    exported(first, tmp_path / "out")
    model, tokenizer = loaded(tmp_path / "out"), tokenizer_of(tmp_path / "out")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    begun = model.generate(torch.tensor([[256]]), attention_mask=torch.ones(1, 1), **options).tolist()
    assert model.generate(**options).tolist() == begun
    (written,) = pipeline("text-generation", model=model, tokenizer=tokenizer)("", **options)
    assert written["generated_text"] == tokenizer.decode(begun[0][1:], skip_special_tokens=True)


@pytest.mark.parametrize("tied", [False, True])
def test_width_scaling_is_kept(tied: bool, tmp_path: Path) -> None:
    """Trained, so that the multiplier comes from the run; in the head's weights, or beside tied ones."""
    scaled = ["optim.width_scaling=mup", "optim.base_width=16", f"model.tie_embeddings={tied}"]
    folder = byte_run(tmp_path, "experiment=dense_prenorm", *scaled)
    assert ("own code" in exported(folder, tmp_path / "out")) == tied
    assert_same_logits(folder, tmp_path / "out", trusted=tied)


def test_without_this_project_it_runs_too(first: Path, tmp_path: Path) -> None:
    """In another process, in which none of it can be imported: logits, a loss, and text."""
    folder = remade(first, tmp_path / "run", placement="lnscaling", ffn="moe")
    exported(folder, tmp_path / "out")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("out", trust_remote_code=True)
batch = tokenizer(["def f(x):"], return_tensors="pt")
out = model(**batch, labels=batch["input_ids"])
tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
assert not {"core", "lightning_modules", "lightning", "spannorm"} & set(sys.modules)
torch.save([out.logits, out.loss.detach(), tokens], "seen.pt")
"""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    logits, loss, tokens = torch.load(tmp_path / "seen.pt")
    opened = open_run(folder)
    batch = torch.tensor([list(b"def f(x):")])
    expected = opened.module(batch)[0].detach()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(expected[0, :-1], batch[0, 1:]))
    ours = opened.module.generate(batch[0].tolist(), 8, 0.0, 0, 64)
    assert tokens[0].tolist() == ours[: tokens.size(1)]
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {"modeling_placement.py", "spannorm.py"}


@pytest.mark.parametrize("placement", ["spannorm", "mixln"])
def test_the_code_is_what_a_person_would_write(placement: str, first: Path, tmp_path: Path) -> None:
    """Two files that the linter and the formatter accept, and that import nothing but torch and transformers."""
    exported(remade(first, tmp_path / "run", placement=placement, ffn="moe"), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.py"))
    assert [path.name for path in files] == ["modeling_placement.py", "spannorm.py"]
    imported = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.partition(".")[0] for name in names}
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}
    settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    for command in (["check", "--ignore", "RUF012"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *settings, *files], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def same_tokens(output: Path, ours: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(output)
    for text in TEXTS:
        ids = ours.encode(text.encode()).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == ours.end_of_document
    assert len(theirs) == ours.vocab_size


def test_bytes_are_tokens_there_too(first: Path, tmp_path: Path) -> None:
    exported(first, tmp_path / "out")
    same_tokens(tmp_path / "out", open_run(first).datamodule.tokenizer)


def test_a_bpe_comes_along(tmp_path: Path) -> None:
    folder = bpe_run(tmp_path, bpe_corpus(tmp_path), "model.placement=postnorm")
    exported(folder, tmp_path / "out")
    same_tokens(tmp_path / "out", open_run(folder).datamodule.tokenizer)


def test_numbers_have_no_tokenizer(tmp_path: Path) -> None:
    folder = run_on(tmp_path, *SMALL[:1], "data=synthetic", "data.seq_len=31", "model.placement=prenorm")
    assert exported(folder, tmp_path / "out").endswith("LlamaForCausalLM, step 3; no tokenizer, as the data is no text")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == 64
    assert config["eos_token_id"] is config["bos_token_id"] is None, "no number ends a text"
    assert not list((tmp_path / "out").glob("tokenizer*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "output=None is not valid: expected a value: it has no default"),
        (["output={run}"], "output='{run}' is not valid: expected a new folder: this one is there already"),
        (["output={run}/config.yaml/x"], "is not valid: expected a folder that can be written to"),
        (["output={tmp}/out", "checkpoint=none"], "checkpoint='none' is not valid: expected last, best, or the path"),
    ],
)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    arguments: list[str], message: str, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(run=first, tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        export.cli.run(lambda: export.main([str(first), *filled]))
    err = capsys.readouterr().err
    assert message.format(run=first) in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
