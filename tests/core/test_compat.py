"""What core/compat.py relies on still holds, and no other module reaches for what is not public."""

import ast
import inspect
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import ModelPruning, WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from core import compat
from core.sharded_checkpoint import META
from tests.support.sources import ROOT, SOURCES, module_name

OF_NAMEDTUPLES = {"_replace", "_asdict", "_fields", "_make"}
OF_LIGHTNINGS_LOOPS = {"fit_loop", "epoch_loop", "batch_progress"}
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}
ALLOWED = {
    ("core.signals", "os._exit"),  # documented
    # Hugging Face's own hooks for initializing, and a file that is exported without core beside it.
    ("tools.exporting.modeling_placement", "_non_persistent_buffers_set"),
    ("tools.exporting.modeling_placement", "getattr(weight, '_is_hf_initialized', False)"),
}


def defined_names() -> set[str]:
    """Every name that the project itself defines."""
    found = set()
    for path in SOURCES:
        if module_name(path).partition(".")[0] in ("tests", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def private_uses(path: Path, own: set[str]) -> Iterator[str]:
    """What a module takes of others that begins with an underscore, and of Lightning's loops; also by `getattr`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                parts = name.split(".")
                if parts[0] in ("torch", "lightning", "torchmetrics") and any(part.startswith("_") for part in parts):
                    yield name
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            owner = ast.unparse(node.value)
            ours = node.attr in own and owner.split(".")[0] != "torch"
            if not ours and node.attr not in OF_NAMEDTUPLES:
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.Attribute) and node.attr in OF_LIGHTNINGS_LOOPS:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME and len(node.args) > 1:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if str(name).startswith("_") and not str(name).endswith("__") and name not in own:
                yield ast.unparse(node)


@pytest.mark.parametrize("stopped", [False, True])
def test_lightning_kills_who_launched_a_process_that_failed_unless_it_is_leaving(stopped: bool) -> None:
    with subprocess.Popen(["sleep", "100"]) as launcher, subprocess.Popen(["sleep", "100"]) as launched:
        observer = _ChildProcessObserver(launcher.pid, [launched], sleep_period=0.2)  # type: ignore[arg-type]
        observer.start()
        if stopped:
            compat.stop_watching_launched()
        launched.kill()
        launched.wait()
        observer.join(30)
        assert launcher.poll() is None or not stopped
        launcher.kill() if stopped else launcher.wait(30)
    assert not observer.is_alive()


def test_no_other_module_uses_what_is_not_public() -> None:
    own, found = defined_names(), set()
    for path in SOURCES:
        name = module_name(path)
        if name.partition(".")[0] not in ("tests", "benchmarks") and name != "core.compat":
            found |= {(name, use) for use in private_uses(path, own)}
    extra = {use for use in found if not any(use[0] == name and use[1].endswith(part) for name, part in ALLOWED)}
    assert not extra
    assert len(list(private_uses(ROOT / "core/compat.py", own))) > 8, "the search finds nothing any more"


def test_an_early_sigterm_is_noted_once() -> None:
    trainer = L.Trainer(logger=False, accelerator="cpu", barebones=True)
    assert not compat.take_early_sigterm(trainer)
    trainer._signal_connector._sigterm_notifier_fn(15, None)
    assert compat.take_early_sigterm(trainer)
    assert not compat.take_early_sigterm(trainer)


class Logs(BoringModel):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("step", float(self.trainer.global_step))
        return super().training_step(batch, batch_idx)


class Watch(L.Callback):
    """Corrects the counters as a resumed run needs it."""

    def __init__(self) -> None:
        self.resuming: list[bool] = []
        self.batches: list[tuple[int, int]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.resuming.append(compat.is_resuming(trainer))
        compat.forget_batch_that_never_began(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = -7  # as wrong as can be
        compat.set_logged_step(trainer)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.batches.append((compat.batch_in_epoch(trainer), compat.total_batch(trainer)))


def fit(folder: Path, steps: int, ckpt: Path | None = None) -> tuple[L.Trainer, Watch]:
    watch = Watch()
    quiet: Any = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        max_steps=steps,
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        callbacks=[watch],
        accelerator="cpu",
        limit_train_batches=4,
        limit_val_batches=0,
        **quiet,
    )
    trainer.fit(Logs(), ckpt_path=ckpt, weights_only=False if ckpt else None)
    return trainer, watch


@pytest.mark.filterwarnings("ignore")
def test_the_loops_counters_are_lightnings(tmp_path: Path) -> None:
    first, new = fit(tmp_path / "first", 3)
    rows = (Path(first.logger.log_dir) / "metrics.csv").read_text().splitlines()[1:]  # type: ignore[union-attr,arg-type]
    assert {float(row.split(",")[-1]) for row in rows} == {0.0, 1.0, 2.0}
    first.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["total"]["ready"] += 1
    torch.save(saved, tmp_path / "a.ckpt")
    second, resumed = fit(tmp_path / "second", 5, tmp_path / "a.ckpt")
    assert (new.resuming, resumed.resuming) == ([False], [True])
    assert (new.batches, resumed.batches) == ([(0, 0), (1, 1), (2, 2)], [(3, 3), (0, 4)])
    total = second.fit_loop.epoch_loop.batch_progress.total
    assert (total.ready, total.processed) == (5, 5)
    compat.set_processed_batches(second, 11)
    assert (total.ready, total.processed, total.completed) == (11, 11, 11)
    assert second.fit_loop.total_batch_idx == 10
    assert compat.is_resuming_within_epoch(second) in (True, False)
    compat.ask_for_no_epoch(second)
    assert second.min_epochs == 0


def test_lightnings_functions_that_restore_are_there() -> None:
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

    assert all(hasattr(_CheckpointConnector, name) for name in compat.RESTORING)

    def restore_loops() -> None:
        raise KeyError("state")

    for function, expected in ((restore_loops, True), (lambda: {}["state"], False)):
        with pytest.raises(KeyError) as caught:
            function()
        assert compat.is_restoring(caught.value) is expected


def test_wandbs_logger_passes_on_what_nobody_has_set(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    assert logger._wandb_init["anonymous"] is None
    kept = {name: value for name, value in logger._wandb_init.items() if name != "anonymous"}
    compat.leave_out_deprecated_settings(logger)
    assert logger._wandb_init == kept


@pytest.mark.parametrize("given", [True, False])
def test_what_lightning_keeps_to_itself_of_what_it_was_told(given: bool) -> None:
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], prune_on_train_epoch_end=given)
    assert compat.prunes_when_an_epoch_ends(pruning) is given
    assert not compat.prunes_when_an_epoch_ends(L.Callback())
    trainer = L.Trainer(
        strategy=ModelParallelStrategy(save_distributed_checkpoint=given), logger=False, accelerator="cpu"
    )
    assert compat.saves_in_pieces(trainer) is given


def test_averages_are_found_as_they_are_kept() -> None:
    average, model = WeightAveraging(), L.LightningModule()
    model.layer = nn.Linear(2, 3)
    trainer = L.Trainer(callbacks=[L.Callback(), average], logger=False, enable_checkpointing=False, accelerator="cpu")
    assert compat.averaged_weights(trainer) == {}, "of a run that has not begun"
    average.setup(trainer, model, "fit")
    found = compat.averaged_weights(trainer)
    assert found.keys() == {"0.n_averaged", "0.module.layer.weight", "0.module.layer.bias"}
    found["0.module.layer.bias"].fill_(7.0)
    assert average._average_model.module.layer.bias.tolist() == [7.0] * 3


def test_a_folders_name_of_what_is_no_tensor_is_lightnings() -> None:
    from lightning.fabric.utilities.load import _METADATA_FILENAME

    assert META == _METADATA_FILENAME


def test_whole_weights_and_numbered_states_are_loaded() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    compat.load_full_weights(dict(other.state_dict()), model)
    assert torch.equal(model.weight, other.weight)
    state = {"state": {0: {"step": 1}, 1: {"step": 2}}, "param_groups": [{"params": [0, 1], "lr": 1.0}]}
    named = compat.key_optimizer_state_by_name(state, model)
    assert named["state"] == {"weight": {"step": 1}, "bias": {"step": 2}}
    assert compat.key_optimizer_state_by_name(named, model) == named


def test_a_loader_is_called_on_its_class_alone() -> None:
    class Loads:
        @compat.restricted_classmethod
        def load(cls, path: str) -> str:  # noqa: N805
            return f"{cls.__name__} {path}"

    assert Loads.load("a.ckpt") == "Loads a.ckpt"
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Loads().load("a.ckpt")


def test_operators_over_many_tensors() -> None:
    left, right = ([torch.randn(3, 4), torch.randn(5)] for _ in range(2))
    expected = torch.stack([tensor.norm() for tensor in left])
    torch.testing.assert_close(compat.foreach_norms(left, torch.float32), expected)
    half = [tensor.bfloat16() * 1e3 for tensor in left]
    assert compat.foreach_norms(half, torch.float32).dtype == torch.float32
    for found, a, b in zip(compat.foreach_differences(left, right), left, right, strict=True):
        assert torch.equal(found, a - b)
    scaled = [tensor.clone() for tensor in left]
    compat.foreach_scale_(scaled, 2.0)
    compat.foreach_scale_(scaled, torch.tensor([0.5, 2.0]).unbind())
    assert torch.equal(scaled[0], left[0])
    assert torch.equal(scaled[1], left[1] * 4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_onednn_computes_a_linear_layer() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    torch.testing.assert_close(compat.onednn_linear(x, weight), F.linear(x, weight))


def test_more_graphs_are_allowed_and_never_fewer() -> None:
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=8):
        compat.allow_graphs(64)
        compat.allow_graphs(16)
        assert torch._dynamo.config.recompile_limit == 64


def test_the_scaler_asks_an_optimizer_whether_it_unscales_by_itself() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    assert optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
    compat.unscale_before_clipping(optimizer)
    assert not optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
    assert "_step_supports_amp_scaling" in inspect.getsource(torch.amp.GradScaler.step)


def test_words_of_errors_without_a_type() -> None:
    """Those of gloo and of data-loader processes come from real ones: tests/distributed, test_shared_memory.py."""
    for size in (2**46, 2**62):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(size)
        assert compat.lacks_memory(caught.value), caught.value
    assert compat.lacks_memory(MemoryError())
    for said in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
    ):
        assert compat.lacks_memory(RuntimeError(said))
    assert not compat.lacks_memory(RuntimeError("shape mismatch"))
    import torch.utils.data.dataloader as loader

    assert "DataLoader worker" in inspect.getsource(loader)
    assert compat.lost_a_loader_process(RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed."))
    for judge in (compat.lacks_shared_memory, compat.lost_a_loader_process, compat.lost_a_peer):
        assert not judge(RuntimeError("shape mismatch"))
    assert compat.lost_a_peer(dist.DistBackendError("x"))


def test_shapes_without_memory() -> None:
    with compat.FakeTensorMode():
        out = nn.Linear(2**12, 2**20)(torch.empty(2**20, 2**12))
    assert out.shape == (2**20, 2**20)
    assert compat.tree_leaves({"a": [1, (2, 3)]}) == [1, 2, 3]


def test_collectives_have_gradients_and_are_traced(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        x = torch.randn(4, 2, requires_grad=True)
        group = dist.group.WORLD
        assert group is not None
        out = compat.wait_tensor(compat.all_to_all_single_autograd(x, [4], [4], group))
        out.square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach())
        assert torch.equal(compat.wait_tensor(compat.all_reduce(x.detach(), "sum", group)), x.detach())
    finally:
        dist.destroy_process_group()


def test_casts_and_moves_of_a_module_go_through_one_function() -> None:
    from torch.distributed.tensor.parallel import ParallelStyle

    class Kept(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
            return self

    assert nn.Sequential(Kept(1, 1)).to(torch.float64)[0].weight.dtype == torch.float32
    assert list(inspect.signature(ParallelStyle._apply).parameters) == ["self", "module", "device_mesh"]


def test_a_module_without_a_trainer_says_so() -> None:
    """LanguageModule takes that for its answer."""
    with pytest.raises(RuntimeError):
        _ = BoringModel().trainer
