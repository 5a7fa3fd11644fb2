"""The base of all LightningModules here: building and sharding, optimizer, schedule, the protocol of a step."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback, ModelPruning, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from core.chosen_scalars import choose_scalars
from core.compat import (
    allow_graphs,
    batch_in_epoch,
    prunes_when_an_epoch_ends,
    restricted_classmethod,
    saves_in_pieces,
)
from core.errors import ConfigError, InvalidValue, require
from core.lightning_callbacks import check_callbacks
from core.precision import describe_narrow_weights
from core.run_control import take_control
from core.steps import begin_epoch, completes_step, is_logged, num_steps
from core.task import Task
from lightning_modules.config import ModelConfig, OptimConfig, parse, settings
from lightning_modules.depth_scaling import depth_scaling
from lightning_modules.initialization import initialize
from lightning_modules.layers.cpu_kernels.allocator import keep_freed_memory
from lightning_modules.layers.router import RouterStats
from lightning_modules.loading import load_module
from lightning_modules.mean_metrics import WeightedMean
from lightning_modules.optim import (
    check_schedule,
    check_settings,
    check_state,
    describe_decay,
    describe_warmup,
    find_schedule,
    group_settings,
    make_schedule,
    number_by_parameters,
    number_names,
)
from lightning_modules.optimizers import check_kept, make_optimizer, state_sizes
from lightning_modules.resumed_schedule import describe_change
from lightning_modules.router_health import router_health, tally, tokens_per_expert
from lightning_modules.sharding import (
    check_mesh,
    check_unsharded,
    clip_gradients,
    gradient_norm,
    shard_block,
    shard_rest,
)
from lightning_modules.strategy import ShardedStrategy
from lightning_modules.trunk import Batch, Trunk
from lightning_modules.unused_options import describe_unused
from lightning_modules.warm_start import WarmStart, check_logits, warm_start
from lightning_modules.width_scaling import width_scaling

log = logging.getLogger(__name__)

SCHEDULE_STEPS = "schedule_steps"
"""A checkpoint's key for the number of optimizer steps that the learning-rate schedule was made for."""


class TransformerModule(L.LightningModule):
    """Trains a Trunk. A subclass says which, what its loss is, and what else is measured beside it.

    A subclass saves its hyperparameters, sets what `make_model` needs, and calls `try_out`.

    Args:
        model: fields of ModelConfig, as plain values.
        optim: fields of OptimConfig, as plain values.

    Attributes:
        task: what it is trained to do.
        of_data: the names of those of its arguments that the DataModule has as attributes, and so are not configured.

    Raises:
        ConfigError: anything about the model or its optimizer that cannot work, before weights are allocated.

    Logs, every `trainer.log_every_n_steps` optimizer steps and at each validation:

    | key | unit |
    |---|---|
    | train/loss, val/loss | nats, without auxiliary losses; train: mean over the accumulated batches |
    | test/loss | by trainer.test, what val/loss is by validation |
    | moe/... | the routers' health: lightning_modules/router_health.py |
    | optim/lr | learning rate of the step just taken, without the factors of optim.groups and of width scaling |
    | optim/grad_norm | l2 norm over all parameters, accumulated, before clipping |
    """

    task: ClassVar[Task]
    of_data: ClassVar[tuple[str, ...]] = ()
    model: Trunk | None

    def __init__(self, model: dict[str, Any], optim: dict[str, Any]) -> None:
        super().__init__()
        self.model_config = parse(ModelConfig, "model", model)
        self.optim_config = parse(OptimConfig, "optim", optim)

    def try_out(self) -> None:
        """Build model and optimizer without weights, which finds every impossible configuration at no cost."""
        self.width_scaling = width_scaling(self.model_config, self.optim_config)
        self.depth_scaling = depth_scaling(self.model_config, self.optim_config)
        weightless = self.weightless()
        initialize(weightless, self.width_scaling, self.depth_scaling.num_layers)
        self.num_parameters = weightless.num_parameters()
        make_optimizer(weightless, self.optim_config)
        find_schedule(self.optim_config)
        self.model = None
        self._warm_start: WarmStart | None = None
        self.train_loss, self.held_out_loss = WeightedMean(), WeightedMean()
        self._router_tally: Tensor | None = None
        self._num_steps: float = math.nan  # that the learning-rate schedule goes by
        self._group_settings: list[dict[str, Any]] | None = None  # of the optimizer, as configure_optimizers made it
        self._num_steps_before: float | None = None  # likewise, in the run that is resumed; None: it did not say

    def make_model(self, config: ModelConfig, **arguments: Any) -> Trunk:
        """Return a model, not initialized.

        Args:
            config: of its blocks; that of the module, or a variation of it.
            arguments: those of Trunk, and `built`, which `add_blocks` takes.
        """
        raise NotImplementedError

    def weightless(self) -> Trunk:
        """Return the model without weights, on the meta device."""
        with torch.device("meta"):
            return self.make_model(self.model_config)

    @classmethod
    def assumed(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return values of the arguments `of_data`, for a tool that looks at no data.

        Args:
            arguments: the others, as they are configured.
        """
        raise NotImplementedError

    @property
    def loss_is_chunked(self) -> bool:
        """Return whether training takes the loss of a part of the logits at a time."""
        return False

    def compute_loss(self, batch: Batch) -> tuple[Tensor, list[RouterStats]]:
        """Return (the mean loss of a batch in nats, router statistics)."""
        raise NotImplementedError

    def training_loss(self, batch: Batch) -> tuple[Tensor, list[RouterStats]]:
        """Return what compute_loss does, of a batch that is trained on, and note what else is reported of it."""
        return self.compute_loss(batch)

    def held_out_step(self, batch: Batch) -> tuple[Tensor, int]:
        """Return (the mean loss of a batch, over how many predictions), and note what else is reported of it."""
        raise NotImplementedError

    def further_metrics(self, stage: str) -> Sequence[Any]:
        """Return metrics that are reported beside the loss; each computes {key: value}.

        Args:
            stage: train, val or test.
        """
        return ()

    def describe_loss(self, stage: str, loss: Tensor) -> dict[str, Any]:
        """Return what is reported of a held-out loss by other names, {key: value}."""
        return {}

    @restricted_classmethod
    def load_from_checkpoint(  # type: ignore[override]  # no addresses, and no files that are open already
        cls,  # noqa: N805
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        allow: Collection[str] = (),
        **hyper_parameters: Any,
    ) -> Self:
        """Return a module with the weights of a checkpoint, which is read as data, whatever it holds.

        Args:
            checkpoint_path: a checkpoint of one file, or in pieces, of any number of processes; a run's folder, whose
                last one is taken; or a file of tools.consolidate.
            map_location: the device of the module; None: the host, wherever the weights were saved.
            hparams_file: Lightning's; nothing but None, as a checkpoint has its hyperparameters.
            strict: whether all weights have to correspond; None: as `strict_loading` says, which is True.
            weights_only: Lightning's; False would run code of the file's, and is refused.
            allow: import paths of code of the user's own (a placement, a schedule) that the checkpoint may name.
            hyper_parameters: arguments of this class, each in the place of the whole saved one.

        Raises:
            ConfigError: it is nothing of that, names code that is not allowed, or has other weights than its
                hyperparameters say.
        """
        require(hparams_file is None, "hparams_file", hparams_file, "None: the checkpoint has its hyperparameters")
        require(weights_only is not False, "weights_only", False, "True or None: a checkpoint is read as data")
        return load_module(cls, checkpoint_path, map_location, strict, allow, hyper_parameters)

    def num_optimizer_values(self) -> int:
        """Return how many numbers the optimizer keeps of the whole model; 0 where that of the user does not say."""
        try:
            return sum(state_sizes(self.weightless(), self.optim_config).values())
        except ConfigError:
            return 0

    @classmethod
    def settings_in_effect(cls, hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's hyperparameters by the names of fields, with the values that take effect.

        A field that the checkpoint is too old to have is there with the value that its absence stands for.
        """
        rest = {name: value for name, value in hyper_parameters.items() if name not in ("model", "optim")}
        rest = {f"{'data' if name in cls.of_data else 'module'}.{name}": value for name, value in rest.items()}
        model = parse(ModelConfig, "model", hyper_parameters["model"])
        optim = parse(OptimConfig, "optim", hyper_parameters["optim"])
        return {**rest, **settings(model, "model"), **settings(optim, "optim")}

    def configure_callbacks(self) -> list[Callback]:
        """Bring no callback, but check those there are and build the model, which some look for in their setup."""
        if self.trainer.state.fn == "fit":
            check_callbacks(self.trainer)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BackboneFinetuning):
                reason = "no part of the model is a backbone; a BaseFinetuning of your own can say what it freezes"
                raise InvalidValue("callbacks", "BackboneFinetuning", reason)
            if isinstance(callback, WeightAveraging) and self.trainer.precision in ("bf16-true", "16-true"):
                valid = (
                    "bf16-mixed or 16-mixed: an average is kept in the type of the weights, "
                    f"and in that one {type(callback).__name__}'s small updates come to nothing"
                )
                raise ConfigError("trainer.precision", self.trainer.precision, valid)
            if isinstance(callback, ModelPruning | BaseFinetuning | WeightAveraging):
                sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
                valid = "none that freezes, prunes or averages weights with trainer=fsdp, where they are in parts"
                require(not sharded, "callbacks", type(callback).__name__, valid)
            if isinstance(callback, ModelPruning | BaseFinetuning):
                self.configure_model()
            if prunes_when_an_epoch_ends(callback) and self.trainer.max_epochs == -1:
                reason = (
                    "the run is a single epoch, which ends when all is saved; prune_on_train_epoch_end=false prunes "
                )
                raise InvalidValue("callbacks", "ModelPruning", f"{reason}after each validation")
        return []

    def setup(self, stage: str) -> None:
        if stage == "fit":
            take_control(self.trainer)  # under train.py and any other Trainer alike

    def check_run(self, trainer: L.Trainer, resumed: bool) -> None:
        """Refuse, before anything is written, a run that would train but not do what its configuration says.

        Args:
            trainer: not yet fitting.
            resumed: whether it goes on from a checkpoint.

        Raises:
            ConfigError: a learning-rate schedule that the run's length does not fit, an optimizer whose checkpoints
                could not be read, a router that cannot learn or never gets balanced, or weights that are sent in
                another precision than the products'.
        """
        self._check_schedule(trainer)
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.check_precision(trainer.precision)
        check_kept(self.weightless(), self.optim_config)
        self._check_router(resumed)

    def _check_schedule(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # a step or a few, whatever the schedule
            check_schedule(self.optim_config, num_steps(trainer))

    def _check_router(self, resumed: bool) -> None:
        """Refuse a new run whose router or bias would not learn; one that older versions began goes on."""
        moe = self.model_config.moe
        if self.model_config.ffn != "moe":
            return
        still = moe.balancing == "bias" and moe.bias_update_rate == 0 and moe.top_k < moe.num_experts
        valid = "a number > 0, without which the bias stays 0; model.moe.balancing=none does without"
        require(resumed or not still, "model.moe.bias_update_rate", moe.bias_update_rate, valid)
        if moe.top_k > 1 or not moe.normalizes_weights:
            return
        valid = "false or null with model.moe.top_k=1: one weight divided by itself is 1, and the router learns nothing"
        require(resumed, "model.moe.normalize_weights", True, valid)
        if self._attached_trainer is not None and self.global_rank == 0:
            log.warning("model.moe.top_k=1 with normalize_weights=true: the router gets no gradient from the loss")

    def start_from(self, source: str | Path) -> WarmStart:
        """Start from weights that were trained before, in the place of the init's. To be called before the fit.

        Args:
            source: RUN, a checkpoint, a safetensors file, or a folder of tools.export or transformers:
                lightning_modules/warm_start.py.

        Returns:
            What is taken, what starts anew and what is left out.

        Raises:
            ConfigError: it is nothing of that, its model has other sizes, or its width scaling multiplies the logits
                by another number.
        """
        check_logits(source, self.width_scaling)
        self._warm_start = warm_start(source, self.weightless())
        return self._warm_start

    def configure_model(self) -> None:
        """Build and initialize; Lightning calls this where the strategy wants the weights to come to life."""
        if self.model is not None:
            return
        # That of the run, which under a ModelParallelStrategy is not torch's default one.
        device = torch.get_default_device() if self._attached_trainer is None else self.trainer.strategy.root_device
        mesh, make = self.device_mesh, partial(self.make_model, self.model_config)
        if mesh is not None:
            check_mesh(self.model_config, mesh["data_parallel"].size(), mesh["tensor_parallel"].size())
            strategy = self._attached_trainer and self._attached_trainer.strategy
            precision = getattr(strategy, "mixed_precision", None)  # Lightning's own strategy has none
            make = partial(make, built=partial(shard_block, mesh=mesh, precision=precision))
        with device, self._precision():
            self.model = make(
                output_multiplier=self.width_scaling.output_multiplier,
                branch_multiplier=self.depth_scaling.branch_multiplier,
            )
        if self.model_config.cpu_kernels == "auto" and device.type == "cpu":
            keep_freed_memory()
        if mesh is not None:
            shard_rest(self.model, mesh)
        initialize(self.model, self.width_scaling, self.depth_scaling.num_layers)
        if self._warm_start is not None:
            self._warm_start.load_into(self.model)
            if self.global_rank == 0:
                log.info("%s", self._warm_start)
            self._warm_start = None  # its weights are no longer needed
        for mixture in list(self.model.mixtures().values())[:1]:
            if self.global_rank == 0:
                log.info("MoE backend: %s (%s)", *mixture.backend)
        if self.model_config.compile:
            allow_graphs(64)  # first, middle and last block, mixture or not, with and without gradients
            for block in self.model.blocks:
                block.compile()
        if mesh is None and self._attached_trainer is not None and self.trainer.state.fn == "fit":
            check_unsharded(self.model_config)  # elsewhere one process may have all experts

    @property
    def _attached_trainer(self) -> L.Trainer | None:
        """The Trainer that holds this module; None where it is used without one."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    def _precision(self) -> AbstractContextManager[Any]:
        """Return the precision of the forward pass in training, by which the backend of the experts is chosen."""
        return nullcontext() if self._attached_trainer is None else self.trainer.precision_plugin.forward_context()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, router_stats = self.training_loss(batch)
        self.train_loss.update(loss.detach())
        if not router_stats:
            return loss
        moe = self.model_config.moe
        if self._logs_this_step or moe.balancing == "bias":
            new = tally(router_stats)
            self._router_tally = new if self._router_tally is None else self._router_tally + new
        balance = torch.stack([stats.load_balancing_loss for stats in router_stats]).mean()
        z_loss = torch.stack([stats.z_loss for stats in router_stats]).mean()
        return loss + moe.balance_weight * balance + moe.z_loss_weight * z_loss

    @property
    def _logs_this_step(self) -> bool:
        """Return whether the loggers will write the optimizer step in progress; a loop of one's own has none."""
        trainer = self._attached_trainer
        return trainer is not None and is_logged(trainer, trainer.global_step + 1)

    def _balance_routers(self) -> None:
        """Move the routers' biases by what all batches and processes of the step have routed, in one reduction."""
        if self._router_tally is None:
            return
        assert self.model is not None
        if (trainer := self._attached_trainer) is not None:
            self._router_tally = trainer.strategy.reduce(self._router_tally, reduce_op="sum")
        load_by_layer = tokens_per_expert(self._router_tally)
        for mixture, load in zip(self.model.mixtures().values(), load_by_layer, strict=True):
            mixture.router.update_bias(load)
        if trainer is None:  # in a loop of one's own nobody reports it
            self._router_tally = None

    def _report_routers(self) -> None:
        """Log what the whole step has routed, in one transfer: loggers would fetch each scalar by itself."""
        if self._router_tally is not None:
            assert self.model is not None
            health = router_health(self._router_tally.cpu(), list(self.model.mixtures()))
            values = torch.stack(list(health.values())).tolist()
            chosen = choose_scalars(self.trainer, dict(zip(health, values, strict=True)), self.trainer.global_step)
            self.log_dict({name: health.get(name, value) for name, value in chosen.items()})
            self.log_dict({name: value for name, value in health.items() if name not in chosen}, logger=False)

    def on_after_backward(self) -> None:
        """Note the gradient's norm now: callbacks may clip it before the optimizer's own hook comes to it."""
        if self._logs_this_step and completes_step(self.trainer, batch_in_epoch(self.trainer)):
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            scale = scaler.get_scale() if scaler else 1.0
            self.log("optim/grad_norm", gradient_norm(self.parameters()) / scale)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._balance_routers()
        if self._logs_this_step:
            self.log("optim/lr", optimizer.param_groups[0]["lr"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, but by the norm over all parts of all parameters where these are distributed."""
        if self.device_mesh is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        clip_gradients(self.parameters(), gradient_clip_val)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not completes_step(self.trainer, batch_idx):
            return
        metrics = self.further_metrics("train")
        if is_logged(self.trainer, self.trainer.global_step):
            self.log("train/loss", self.train_loss.compute())
            for metric in metrics:
                self.log_dict(metric.compute())
            self._report_routers()
        self._router_tally = None
        self.train_loss.reset()
        for metric in metrics:
            metric.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, count = self.held_out_step(batch)
        self.held_out_loss.update(loss, weight=count)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._report_held_out("val")

    def on_test_epoch_end(self) -> None:
        self._report_held_out("test")

    def _report_held_out(self, stage: str) -> None:
        loss = self.held_out_loss.compute()
        self.held_out_loss.reset()
        # The same in all processes already; without sync_dist Lightning warns.
        self.log_dict({f"{stage}/loss": loss, **self.describe_loss(stage, loss)}, sync_dist=True)
        for metric in self.further_metrics(stage):
            self.log_dict(metric.compute())
            metric.reset()

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        self._check_schedule(self.trainer)
        optimizer, self._num_steps = make_optimizer(self.model, self.optim_config), num_steps(self.trainer)
        length = int(self._num_steps) if math.isfinite(self._num_steps) else 1  # to the constant one it is the same
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, make_schedule(self.optim_config, length))
        self._group_settings = group_settings(optimizer, self.optim_config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers if self.trainer.ckpt_path is not None else ():
            check_state(optimizer, self.trainer.global_step, self.trainer.ckpt_path)
        found = self.lr_schedulers()
        scheduler = found if isinstance(found, torch.optim.lr_scheduler.LambdaLR) else None
        if self.trainer.ckpt_path is not None and scheduler is not None and self._group_settings is not None:
            check_settings(scheduler, self._group_settings, self.trainer.global_step, self.trainer.ckpt_path)
        self._check_router(resumed=self.trainer.global_step > 0)
        if self.global_rank == 0:
            for line in describe_unused(self.model_config, self.optim_config):
                log.warning(line)
        begin_epoch(self.trainer, self)
        if self.trainer.is_global_zero and (loss := describe_narrow_weights(str(self.trainer.precision))) is not None:
            print(loss)
        if self.trainer.is_global_zero and scheduler is not None:
            by_steps = 0 <= self.trainer.max_steps <= self._num_steps
            change = describe_change(self.optim_config, scheduler, self._num_steps, self._num_steps_before, by_steps)
            short = self.trainer.fast_dev_run  # type: ignore[attr-defined]
            if change is not None:
                print(change)
            for describe in () if short else (describe_warmup, describe_decay):
                if (advice := describe(self.optim_config, self._num_steps)) is not None:
                    print(f"Learning rate: {advice}.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[SCHEDULE_STEPS] = self._num_steps
        # Not where only the weights are saved; and what several processes save in pieces goes by names.
        if "optimizer_states" in checkpoint and not saves_in_pieces(self.trainer):
            checkpoint["optimizer_states"] = [
                number_by_parameters(state, optimizer, self.parameters(), sharded=self.device_mesh is not None)
                for state, optimizer in zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True)
            ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._num_steps_before = checkpoint.get(SCHEDULE_STEPS)
        if "optimizer_0" in checkpoint:  # of several processes, in this one
            assert self.model is not None
            optimizer = make_optimizer(self.model, self.optim_config)
            state = number_names(checkpoint.pop("optimizer_0"), optimizer, dict(self.named_parameters()))
            checkpoint["optimizer_states"] = [state]
