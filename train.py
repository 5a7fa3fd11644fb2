"""Train a model: compose the config, build module, data, callbacks and trainer, fit."""

import time

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from core import cli
from lightning_modules.composing import inherit_model, register_schemas


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@cli.job
def main(config: DictConfig) -> float:
    """Train, and return the final validation loss, which Optuna's and other sweepers minimize."""
    # Here and not above, so that --help and shell completion do not wait for torch.
    import lightning as L

    from core.accelerator import check_matmul_precision, set_matmul_precision
    from core.build import build, build_all, build_module
    from core.config_files import require_effect, turned_off_in_vain
    from core.console import silence_noise
    from core.early_end import tell_end
    from core.errors import require
    from core.interruption import report_failures
    from core.lightning_callbacks import check_callbacks, without_stand_ins
    from core.loggers import own_wandb_run
    from core.memory import check_memory
    from core.parallel import apply_micro_batching, check_parts
    from core.printable import printable
    from core.provenance import device_of, origin
    from core.run_control import take_control
    from core.run_folder import check_resumable, entered, folder_name, is_main_process
    from core.steps import check_length
    from core.sweep import swept_overrides
    from core.validation_loss import final_loss
    from datamodules.endless_datamodule import EndlessDataModule

    require_effect(config)
    OmegaConf.to_container(config, resolve=True)  # a reference to nothing is said before anything is written
    hydra_config = HydraConfig.get()
    overrides = [str(override) for override in OmegaConf.to_container(hydra_config.overrides.task, resolve=False)]
    name = folder_name(time.strftime("%Y-%m-%d_%H-%M-%S"), overrides, swept_overrides(overrides))
    with entered(config, hydra_config.runtime.choices.get("experiment"), name) as run:
        config.run_dir = str(run.path)
        silence_noise()
        for line in turned_off_in_vain(config) if is_main_process() else ():
            print(line)
        inherited = inherit_model(config, overrides, run.ckpt_path)
        if inherited and run.ckpt_path is None and is_main_process():
            print(f"The model of {printable(config.init_from)}: {', '.join(inherited)}")
        require(type(config.seed) is int and 0 <= config.seed < 2**32, "seed", config.seed, "an integer in [0, 2**32)")
        check_matmul_precision(config.float32_matmul_precision)
        L.seed_everything(config.seed, workers=True, verbose=False)

        datamodule = build(config, "data")
        valid = f"a subclass of {EndlessDataModule.__module__}.EndlessDataModule, at whose position a run is resumed"
        require(isinstance(datamodule, EndlessDataModule), "data._target_", config.data["_target_"], valid)
        module = build_module(config, datamodule)
        if config.init_from is not None and run.ckpt_path is None:  # a resumed run has its weights
            valid = "null: the LightningModule has no method start_from"
            require(hasattr(module, "start_from"), "init_from", config.init_from, valid)
            module.start_from(config.init_from)
            datamodule.check_source(config.init_from)
        callbacks = build_all(config, "callbacks")
        trainer = build(
            config,
            "trainer",
            callbacks=callbacks,
            logger=build_all(config, "logger"),
            default_root_dir=config.run_dir,
            **without_stand_ins(config.trainer, callbacks),
        )
        set_matmul_precision(trainer, config.float32_matmul_precision)
        take_control(trainer)
        check_length(trainer, config.trainer.val_check_interval)
        if hasattr(module, "check_run"):  # a LightningModule of one's own need not have it
            module.check_run(trainer, resumed=run.ckpt_path is not None)
        check_memory(trainer, module)
        passes = check_parts(trainer, datamodule, config.micro_batch_size)
        check_callbacks(trainer, config, passes)
        datamodule.prepare_data()
        datamodule.check()
        apply_micro_batching(trainer, datamodule, config.micro_batch_size)
        step = 0
        if run.ckpt_path is not None:
            step = check_resumable(run, trainer, module, datamodule, config)

        made_by = origin(device_of(trainer), getattr(datamodule, "stream_identity", {}).get("corpus"))
        running = run.running(trainer, config, overrides, step, made_by)
        with running, own_wandb_run(), report_failures(trainer, run.path):
            trainer.fit(module, datamodule=datamodule, ckpt_path=run.ckpt_path, weights_only=True)
            tell_end(trainer)
        return final_loss(trainer, run.path)


if __name__ == "__main__":
    register_schemas()
    cli.run(main)
