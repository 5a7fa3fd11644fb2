"""A language model with any normalization placement, for transformers: AutoModelForCausalLM, trust_remote_code=True."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lightning_modules.config import ModelConfig, MoEConfig
from lightning_modules.transformer import Transformer


class PlacementConfig(PreTrainedConfig):
    """What the model is made of.

    Args:
        model: fields of ModelConfig.
        output_multiplier: on the logits.
        vocab_size: number of tokens.
    """

    model_type = "placement"

    def __init__(
        self, model: dict[str, Any] | None = None, output_multiplier: float = 1.0, vocab_size: int = 1, **others: Any
    ) -> None:
        self.model, self.output_multiplier, self.vocab_size = model or {}, output_multiplier, vocab_size
        super().__init__(**others)


class PlacementForCausalLM(PreTrainedModel, GenerationMixin):
    """The model that the run trained, with the names of its weights."""

    config_class = PlacementConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012 - as transformers has it

    def __init__(self, config: PlacementConfig) -> None:
        super().__init__(config)
        values = dict(config.model)
        parsed = ModelConfig(**{**values, "moe": MoEConfig(**values.get("moe", {}))})
        self.model = Transformer(parsed, config.vocab_size, config.output_multiplier)
        for module in self.model.modules():  # constants come from the file, too: the model is built without values
            module._non_persistent_buffers_set.clear()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Next-token logits [batch, seq, vocab_size], and the mean loss where there are labels (-100: none).

        Raises:
            ValueError: padding on the left, which would shift positions.
        """
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("pad on the right: attention is causal, and positions count from the first token")
        logits, _stats = self.model(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    # By the name of `kwargs` generate() knows that forward's arguments, as the mask, are welcome.
    def prepare_inputs_for_generation(self, input_ids: Tensor, *_: Any, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}  # all of it: there is no cache
