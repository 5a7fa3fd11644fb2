"""A sample of the model's own text, for TensorBoard's text tab."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from core.errors import ConfigError, require
from core.printable import printable
from datamodules.tokenizers import tokens_of


class TextSample(L.Callback):
    """Writes the text tag `sample` when all else is saved; in a line it says why it cannot.

    Args:
        prompt: what the model continues. Where the data are numbers (data=synthetic), numbers with spaces between them.
        num_tokens: how much it adds.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling.

    Raises:
        ConfigError: nothing to continue, or a number out of range.
    """

    def __init__(self, prompt: str, num_tokens: int, temperature: float = 0.8, seed: int = 0) -> None:
        field = "callbacks.text_sample"
        require(prompt != "", f"{field}.prompt", prompt, "at least one character")
        require(num_tokens >= 1, f"{field}.num_tokens", num_tokens, "an integer >= 1")
        require(0 <= temperature < math.inf, f"{field}.temperature", temperature, "a number >= 0")
        self.prompt, self.num_tokens, self.temperature, self.seed = prompt, num_tokens, temperature, seed

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        module: Any = pl_module
        try:
            knows = hasattr(datamodule, "tokenizer") and hasattr(datamodule, "seq_len")
            require(knows, "callbacks.text_sample.prompt", self.prompt, "data with a tokenizer and a seq_len")
            prompt = tokens_of(self.prompt, datamodule.tokenizer, "callbacks.text_sample.prompt")
        except ConfigError as error:  # all is trained: this is no reason to end with an error
            if trainer.is_global_zero:
                print(f"No text sample: {printable(error, limit=None)}", flush=True)
            return
        try:
            with torch.compiler.set_stance("force_eager"):  # a few short sequences: compiling for them takes minutes
                tokens = module.generate(
                    prompt, self.num_tokens, self.temperature, self.seed, window=datamodule.seq_len
                )
            text = datamodule.tokenizer.decode(tokens)
        except ValueError as error:  # a run that diverged ends well all the same
            text = f"no text: {error}"
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                fenced = "\n".join(f"    {line}" for line in text.splitlines())  # an indented block shows code as is
                logger.experiment.add_text("sample", fenced, trainer.global_step)
