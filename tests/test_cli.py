"""The command line: a mistake is said in one line, with field, value and choices, and nothing is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core import cli
from tests.support.runs import EXPERIMENTS, ROOT, TRAIN, tiny_job, train

PLACEMENTS = ("postnorm", "prenorm", "spannorm")
SAMPLE = "callbacks.text_sample={_target_: callbacks.console.text_sample.TextSample"
BAD = [  # (arguments, what the message must hold)
    (["experiment=moe_spannrom"], ("experiment='moe_spannrom'", *EXPERIMENTS, "did you mean moe_spannorm?")),
    (["model=huge"], ("model='huge'", "dense", "moe")),
    (["optm.lr=1"], ("optm='1'", "no such field", "did you mean optim?")),
    (["model.dmi=64"], ("model.dmi='64'", "no such field", "num_heads", "did you mean dim?")),
    (["+model.moe.topk=1"], ("model.moe.topk=1", "no such field", "num_experts", "did you mean top_k?")),
    (["model.placement=prenrom"], ("model.placement='prenrom'", *PLACEMENTS, "did you mean prenorm?")),
    (["model.placement_options={first: 1}"], ("model.placement_options.first=1", "no such field", "first_norm")),
    (["model.init_options.factor=2"], ("model.init_options.factor=2", "'blocks', 'sublayers'")),
    (["model.dim=wide"], ("model.dim='wide'", "an integer")),
    (["model.dim=null"], ("model.dim='null'", "an integer")),
    (["model.compile=maybe"], ("model.compile='maybe'", "true or false")),
    (["model.moe=8"], ("model.moe='8'", "a group of fields")),
    (["optim.betas=0.9"], ("optim.betas='0.9'", "[a number, a number]")),
    (["model.dim=30"], ("model.dim=30", "a multiple of 2 x model.num_heads=2")),
    (["model.num_kv_heads=3"], ("model.num_kv_heads=3", "a divisor of model.num_heads=2, or null")),
    (["model.ffn=moe", "model.moe.top_k=9"], ("model.moe.top_k=9", "from 1 to model.moe.num_experts=4")),
    (["model.ffn=moe", "model.moe.backend=gpu"], ("model.moe.backend='gpu'", "auto", "grouped", "loop")),
    (["data.seq_len=abc"], ("data.seq_len='abc'", "an integer")),
    (["data.seq_len=1000000"], ("data.seq_len=1000000", "at most", "the train split's tokens - 1")),
    (["data.batch_size=0"], ("data.batch_size=0", "an integer >= 1")),
    (["data.batch_size=1000000"], ("data.batch_size=1000000", "at most", "train samples")),
    (["~data.seq_len"], ("data.seq_len=None", "it has no default")),
    (["optim.lr=-1"], ("optim.lr=-1.0", "a number >= 0")),
    (["optim.schedule=linear"], ("optim.schedule='linear'", "constant", "cosine", "wsd")),
    (["trainer.max_steps=abc"], ("trainer.max_steps='abc'", "an integer")),
    (["trainer.max_steps=0"], ("trainer.max_steps=0", "an integer >= 1")),
    (["trainer.max_steps=-1"], ("trainer.max_steps=-1", "an integer >= 1")),
    (["trainer.max_epochs=2"], ("trainer.max_epochs=2", "give trainer.max_steps instead")),
    (["trainer.accumulate_grad_batches=0"], ("trainer.accumulate_grad_batches=0", "an integer >= 1")),
    (["trainer.accumulate_grad_batches=3"], ("trainer.val_check_interval=200", "accumulate_grad_batches=3")),
    (["trainer.val_check_interval=0.5"], ("trainer.val_check_interval=0.5", "an integer")),
    (["+trainer.max_step=3"], ("trainer.max_step=3", "no such field", "precision", "did you mean max_steps?")),
    (["+trainer.limit_train_batches=5"], ("trainer.limit_train_batches=5", "give trainer.max_steps instead")),
    (["trainer.accelerator=nonsense"], ("trainer.accelerator='nonsense'", "auto", "cpu", "cuda")),
    (["trainer.devices=0"], ("trainer.devices=0",)),
    (["trainer.precision=12"], ("trainer.precision=12", "bf16-mixed", "32-true")),
    (["+callbacks.mine._target_=my.Callback"], ("callbacks.mine._target_='my.Callback'", "can be imported")),
    (["+callbacks.mine._target_=broken.Callback"], ("callbacks.mine._target_='broken.Callback'", "division by zero")),
    (["+callbacks.mine=5"], ("callbacks.mine=5", "a group with a _target_")),
    (["callbacks.best_checkpoint.save_top_k=all"], ("callbacks.best_checkpoint.save_top_k='all'", "an integer")),
    (["callbacks.progress.colour=red"], ("callbacks.progress.colour='red'", "no such field", "line_seconds")),
    (["callbacks.progress.refresh=1"], ("callbacks.progress.refresh='1'", "no such field", "mean refresh_seconds?")),
    (["trainer.fast_dev_run=1"], ("trainer.fast_dev_run='1'", "+trainer.fast_dev_run=1 hands it on")),
    (["trainer.gradient_clip_val=-1"], ("trainer.gradient_clip_val=-1", "a number >= 0, or null")),
    (["trainer.log_every_n_steps=-1"], ("trainer.log_every_n_steps=-1", "an integer >= 0")),
    (["optim.eps=inf"], ("optim.eps=inf", "a number > 0")),
    (["model.rope_theta=inf"], ("model.rope_theta=inf", "a number > 0")),
    ([f"{SAMPLE}, prompt: '', num_tokens: 1}}"], ("callbacks.text_sample.prompt=''", "at least one character")),
    ([f"{SAMPLE}, prompt: a, num_tokens: 0}}"], ("callbacks.text_sample.num_tokens=0", "an integer >= 1")),
    (["run_dir=[1]"], ("run_dir=[1]", "the name of a folder")),
    (["run_dir="], ("run_dir=''", "the name of a folder", "empty")),
    (["run_dir=' '"], ("run_dir=' '", "the name of a folder")),
    ([f"run_dir={'a/' * 2048}b"], ("run_dir='a/a/", "or all of it 4095")),
    ([f"run_dir={'a' * 300}"], (f"run_dir='{'a' * 300}'", "more than 255 bytes")),
    ([f"ckpt_path={'a' * 300}"], ("ckpt_path='aaa", "more than 255 bytes")),
    ([f"data.root={'a' * 300}"], ("data.root='aaa", "more than 255 bytes")),
    (["run_dir=a\0b"], ("argument='run_dir=a\\x00b'", "FIELD=VALUE")),
    (["run_dir='a\0b'"], ("run_dir='a\\x00b'", "null character")),
    ([f"run_dir=a/{'a' * 300}"], ("run_dir='a/aaa", "more than 255 bytes")),
    ([f"callbacks.best_checkpoint.filename={'a' * 300}"], ("callbacks.best_checkpoint.filename='aaa", "more than 255")),
    ([f"+logger.tensorboard.version={'a' * 300}"], ("logger.tensorboard.version='aaa", "more than 255 bytes")),
    (["ckpt_path="], ("ckpt_path=''", "last, or the path of a checkpoint")),
    (["ckpt_path=[]"], ("ckpt_path=[]", "last, or the path of a checkpoint")),
    (["data.root="], ("data.root=''", "the path of a folder")),
    (["callbacks.run_summary.run_dir="], ("callbacks.run_summary.run_dir=''", "the path of a folder")),
    (["callbacks=null"], ("callbacks='null'", "one of anatomy, checkpointing, console", "~callbacks")),
    (["model=0"], ("model='0'", "one of dense, moe, moe_1b")),
    (["model="], ("model=''", "one of dense, moe, moe_1b")),
    (["model=[0]"], ("model='[0]'", "one of dense, moe, moe_1b")),
    (["model=[huge]"], ("model='huge'", "one of dense, moe, moe_1b")),
    (["model=../x"], ("model='../x'", "one of dense, moe, moe_1b")),
    (["logger=null"], ("logger='null'", "one of comet, csv, mlflow, tensorboard, wandb", "~logger")),
    (["logger=[csv,[]]"], ("logger='[csv,[]]'", "comet, csv, mlflow, tensorboard, wandb")),
    (["experiment=[0.9]"], ("experiment='[0.9]'", "dense_7b")),
    (["experiment={a: 1}"], ("experiment='{a: 1}'", "dense_7b")),
    (["data=[]"], ("data=", "python_stdlib")),
    (["hydra=0"], ("hydra='0'", "the name")),
    (["@model.dim=8"], ("argument='@model.dim=8'", "FIELD=VALUE")),
    (["callbacks.flight_recorder={a: 1}"], ("callbacks.flight_recorder.a=1", "no such field")),
    (["callbacks.flight_recorder=[]"], ("callbacks.flight_recorder='[]'", "a group of fields")),
    (["data._target_=builtins.dict"], ("data._target_='dict'", "says what it takes")),
    (["trainer.accelerator=[1,2]"], ("trainer.accelerator=[1, 2]", "text or Accelerator")),
    (["trainer.devices=1_000"], ("trainer.devices=1000", "at most 4 data-parallel processes", "data.batch_size=4")),
    (
        ["model.ffn=moe", "model.moe.top_k=1", "model.moe.normalize_weights=true"],
        ("model.moe.normalize_weights=True", "the router learns nothing"),
    ),
    (
        ["model.ffn=moe", "model.moe.balancing=bias", "model.moe.bias_update_rate=0"],
        ("model.moe.bias_update_rate=0.0", "a number > 0", "model.moe.balancing=none"),
    ),
    (["optim.schedule=wsd", "optim.warmup_steps=9"], ("optim.warmup_steps=9", "wsd decays over the last")),
    (["trainer.devices=[a]"], ("trainer.devices=['a']", "an integer")),
    (["logger.tensorboard.save_dir=[]"], ("logger.tensorboard.save_dir=[]", "text or Path")),
    (["logger=wandbb"], ("logger='wandbb'", "comet, csv, mlflow, tensorboard, wandb", "did you mean wandb")),
    (["ckpt_path=last"], ("ckpt_path='last'", "checkpoints/last.ckpt in runs/default")),
    (["ckpt_path=no.ckpt"], ("ckpt_path='no.ckpt'", "last, or the path of a checkpoint")),
    (["run_dir=broken.py/run"], ("run_dir='broken.py/run'", "a folder that can be written to")),
    (["data.root=broken.py/data"], ("data.root='broken.py/data'", "a folder that can be written to")),
    (["seed=-1"], ("seed=-1", "an integer in [0, 2**32)")),
    (["seed=abc"], ("seed='abc'", "an integer")),
    (["run_dir=${nothing}"], ("Error: run_dir='${nothing}' is not valid", "'nothing' not found")),
    (["seed=${oc.env:NOPE}"], ("Error: seed='${oc.env:NOPE}' is not valid", "NOPE")),
    (["~seed"], ("Error: argument='~seed' is not valid: data.seed refers to it",)),
    (["+foo=${nothing}"], ("foo='${nothing}' is not valid: no such field",)),
    (["trainer.max_steps=${steps}"], ("trainer.max_steps='${steps}'", "'steps' not found")),
    (["model.dim=${data.width}"], ("'data.width' not found",)),
    (["model"], ("'model'", "FIELD=VALUE")),
    (["model.dim=[1"], ("[1", "FIELD=VALUE")),
    (["+experiment=dense_prenorm"], ("experiment", "override")),
]


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """A working folder with one module that cannot be imported, and nothing else."""
    (tmp_path / "broken.py").write_text("1 / 0\n")
    return tmp_path


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=lambda value: " ".join(value))
def test_a_mistake_is_one_clear_line(cwd: Path, arguments: list[str], parts: tuple[str, ...]) -> None:
    finished = train(cwd, *tiny_job(*arguments))
    assert finished.code == 2
    assert finished.out == ""
    assert finished.err.startswith("Error: ")
    assert finished.err.count("\n") == 1, "one line"
    for part in parts:
        assert part in finished.err
    assert [path.name for path in cwd.iterdir()] == ["broken.py"]


def test_what_a_callback_refuses_leaves_no_folder(cwd: Path) -> None:
    """It sees the data only when training is set up, when the run has its folder."""
    finished = train(cwd, *tiny_job("data.seq_len=1"))
    assert finished.code == 2
    assert finished.err.startswith("Error: data.seq_len=1 is not valid: expected an integer >= 2")
    assert finished.err.count("\n") == 1
    assert [path.name for path in cwd.iterdir()] == ["broken.py"]


def test_a_path_that_the_file_system_refuses_leaves_no_folder(cwd: Path) -> None:
    """Which is found when training is set up, and the run has its folder."""
    finished = train(cwd, *tiny_job("logger=csv", f"logger.csv.save_dir={cwd}/broken.py/logs", "run_dir=run"))
    assert finished.code == 2
    assert finished.err.startswith("Error: logger.csv.save_dir=")
    assert finished.err.count("\n") == 1
    assert [path.name for path in cwd.iterdir()] == ["broken.py"]


def test_of_a_damaged_corpus_the_file_is_named(cwd: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("data")
    source = Path(tiny_job()[0].removeprefix("data.root="))
    folder = root / next(source.iterdir()).name
    folder.mkdir()
    (folder / "index.json").write_text("{}")
    finished = train(cwd, *tiny_job(), f"data.root={root}")
    assert finished.code == 2
    assert f"{folder}/index.json has version None" in finished.err


def call(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, str(TRAIN), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.dim=30"], "model.dim=30 is not valid: expected a multiple of 2 x model.num_heads=2"),
        (["model.dmi=30"], "model.dmi='30' is not valid: no such field; one of"),
    ],
)
def test_a_process_of_its_own_says_the_same(
    cwd: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that a run started, which has set HYDRA_FULL_ERROR for its own sake."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR_IS_OURS", "1")
    finished = call(cwd, *tiny_job(*arguments))
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith(f"Error: {message}")
    assert finished.stderr.count("\n") == 1
    assert [path.name for path in cwd.iterdir()] == ["broken.py"]


def test_help_explains_the_groups_and_the_usual_overrides(cwd: Path) -> None:
    finished = call(cwd, "--help")
    assert finished.returncode == 0
    for group in ("model", "module", "data", "optim", "trainer", "callbacks", "logger", "experiment"):
        names = sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))
        assert f"\n{group}: {', '.join(names)}\n" in finished.stdout
    assert "\neval" not in finished.stdout, "nor what else lies in configs/, which train.py does not take"
    for field in (
        "model.placement",
        "model.init",
        "model.norm",
        "model.num_layers",
        "model.dim",
        "model.num_heads",
        "model.num_kv_heads",
        "model.ffn",
        "model.moe.num_experts",
        "model.moe.top_k",
        "model.moe.backend",
        "data.seq_len",
        "data.batch_size",
        "optim.lr",
        "trainer.max_steps",
        "seed",
        "ckpt_path",
        "run_dir",
    ):
        assert field in finished.stdout
    assert "python train.py experiment=moe_spannorm" in finished.stdout
    assert [path.name for path in cwd.iterdir()] == ["broken.py"]


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=200).returncode == 0


NOTED = """
import os, runpy, sys

class WaysOfWaiting:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)

sys.meta_path.insert(0, WaysOfWaiting())
sys.argv[1:] = ["run_dir={folder}"]
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["train", "tools.propagation", "studies.surgery"])
@pytest.mark.parametrize("given", [None, "7"])
def test_how_idle_threads_wait_is_set_before_torch_reads_it(module: str, given: str | None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {} if given is None else {"GOMP_SPINCOUNT": given}
    code = NOTED.format(module=module, folder=tmp_path / "run")
    seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert seen.stdout.strip() == (given or "100000"), seen.stderr


@pytest.mark.parametrize("printed", ["print('a\\n' * 10**6)", "print('a')"], ids=["much", "in the buffer"])
def test_who_reads_only_the_beginning_is_told_no_more(printed: str, tmp_path: Path) -> None:
    """As `| head -1` does."""
    script = tmp_path / "script.py"
    script.write_text(f"import time\nfrom core import cli\ncli.run(lambda: (time.sleep(0.3), {printed}))\n")
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_broken_pipe_to_somebody_else_keeps_its_traceback() -> None:
    def main() -> None:
        raise BrokenPipeError("a worker has gone")

    with pytest.raises(BrokenPipeError, match="a worker has gone"):
        cli.run(main)


def test_a_fault_of_the_project_keeps_its_traceback(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("datamodules.token_datamodule.TokenDataModule.check", faulty)
    with pytest.raises(KeyError, match="a bug"):
        train(cwd, *tiny_job())


@pytest.mark.slow
def test_who_asks_for_tracebacks_gets_them(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.delenv("HYDRA_FULL_ERROR_IS_OURS", raising=False)
    finished = call(cwd, *tiny_job("model.dim=30"))
    assert finished.returncode == 2
    assert "Traceback" in finished.stderr
