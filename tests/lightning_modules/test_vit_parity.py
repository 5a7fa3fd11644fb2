"""Under PreNorm, with LayerNorm, GELU and biases, the model of images is transformers' ViTForImageClassification."""

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from lightning_modules.vision_transformer import ImageConfig, VisionTransformer
from tests.support.models import tiny_config

NAMES = {
    "attn.q_proj": "attention.q_proj",
    "attn.k_proj": "attention.k_proj",
    "attn.v_proj": "attention.v_proj",
    "attn.o_proj": "attention.o_proj",
    "ffn.up_proj": "mlp.fc1",
    "ffn.down_proj": "mlp.fc2",
    "placement.norm_attn": "layernorm_before",
    "placement.norm_ffn": "layernorm_after",
}


def ours_and_theirs(images: ImageConfig) -> tuple[VisionTransformer, ViTForImageClassification, dict[str, str]]:
    """Both with the same random weights, and {our name: theirs} of all."""
    config = tiny_config(placement="prenorm", norm="layernorm", ffn="mlp", bias=True, causal=False, num_layers=3)
    ours = VisionTransformer(config, images)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    theirs = ViTForImageClassification(
        ViTConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.hidden_dim,
            hidden_act="gelu",
            layer_norm_eps=config.norm_eps,
            image_size=images.image_size,
            patch_size=images.patch_size,
            num_channels=images.num_channels,
            num_labels=images.num_classes,
        )
    ).eval()
    names = {
        "class_token": "vit.embeddings.cls_token",
        "position": "vit.embeddings.position_embeddings",
        **{f"embedding.{end}": f"vit.embeddings.patch_embeddings.projection.{end}" for end in ("weight", "bias")},
        **{f"head.{end}": f"classifier.{end}" for end in ("weight", "bias")},
        **{f"blocks.2.placement.final_norm.{end}": f"vit.layernorm.{end}" for end in ("weight", "bias")},
        **{
            f"blocks.{block}.{mine}.{end}": f"vit.layers.{block}.{yours}.{end}"
            for block in range(3)
            for mine, yours in NAMES.items()
            for end in ("weight", "bias")
        },
    }
    weights, shapes = ours.state_dict(), theirs.state_dict()
    assert names.keys() == weights.keys()
    theirs.load_state_dict({yours: weights[mine].view(shapes[yours].shape) for mine, yours in names.items()})
    return ours, theirs, names


@pytest.mark.parametrize(("size", "patch", "channels"), [(12, 4, 3), (8, 2, 1)])
def test_logits_and_gradients_are_those_of_transformers(size: int, patch: int, channels: int) -> None:
    ours, theirs, names = ours_and_theirs(ImageConfig(size, channels, 7, patch, "learned", "class_token"))
    batch = ours.example(5, 0)
    logits, _ = ours(batch["images"])
    expected = theirs(batch["images"], labels=batch["labels"])
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)

    ours.loss(batch).backward()
    expected.loss.backward()
    gradients: dict[str, Tensor] = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        wanted = gradients[names[name]].view_as(weight)
        torch.testing.assert_close(
            weight.grad, wanted, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
