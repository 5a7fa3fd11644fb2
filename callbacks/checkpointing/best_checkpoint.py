"""best.ckpt: always the best of the checkpoints that are kept, however many those are."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from core.checkpoint import keep
from core.rank_errors import failing_together


class BestCheckpoint(ModelCheckpoint):
    """Is Lightning's ModelCheckpoint, with a fixed name for the best one where `save_top_k` asks for several.

    Under one `filename` without a field such as {step}, Lightning writes all of them to the same path, so that it
    holds the last one that was good enough. Here each gets its step (best-step=200.ckpt), and `filename` itself stays
    a second name of the best one: a hard link, which takes no room. The arguments are ModelCheckpoint's.
    """

    _named = ""  # the checkpoint that has the second name, as far as this process has given it

    @property
    def state_key(self) -> str:
        # As if it were ModelCheckpoint's: runs that were begun with that one are resumed with their best score.
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    @property
    def _path_of_best(self) -> Path | None:
        """Return the second name; None where each checkpoint has the name by `filename`, and no other one."""
        if self.save_top_k in (0, 1) or not self.filename or "{" in self.filename or not self.dirpath:
            return None
        return Path(self.dirpath) / f"{self.filename}{self.FILE_EXTENSION}"

    def format_checkpoint_name(
        self, metrics: dict[str, Tensor], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        if filename is None and self._path_of_best is not None:
            filename = f"{self.filename}-{{step}}"
        return super().format_checkpoint_name(metrics, filename, ver, prefix)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *batch)
        self._name_best(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._name_best(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._name_best(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state, under another `save_top_k` too: the best checkpoints of before are kept."""
        super().load_state_dict(state_dict)
        if self.dirpath and Path(self.dirpath).absolute() not in Path(self.best_model_path).absolute().parents:
            self.best_model_path = ""  # of another folder, which the run has left: it is not the best of this one
        path, worst_first = self._path_of_best, self.mode == "min"
        if path is not None and str(path) in self.best_k_models:  # there was one, under the name of the best
            own = path.with_stem(f"{path.stem}-before")
            if path.exists():
                keep(path, own)
            self.best_k_models = {str(own) if p == str(path) else p: s for p, s in self.best_k_models.items()}
        ranked = sorted(self.best_k_models, key=lambda p: float(self.best_k_models[p]), reverse=worst_first)
        if self.save_top_k > 0:
            ranked = ranked[-self.save_top_k :]
        self.best_k_models = {p: self.best_k_models[p] for p in ranked}
        if ranked:
            self.kth_best_model_path, self.best_model_path = ranked[0], ranked[-1]
            self.kth_value = self.best_k_models[ranked[0]]

    def _name_best(self, trainer: L.Trainer) -> None:
        path = self._path_of_best
        if path is None or not self.best_model_path or self.best_model_path == self._named:
            return
        getattr(trainer.strategy, "finish_saving", bool)()  # it may be written beside the training
        with failing_together():
            if trainer.is_global_zero:
                keep(Path(self.best_model_path), path)
        self._named = self.best_model_path
