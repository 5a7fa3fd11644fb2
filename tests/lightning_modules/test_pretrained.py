"""A folder of transformers gives a model with its logits; whatever could not be such a model is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ConfigError
from lightning_modules.language_module import LanguageModule
from lightning_modules.pretrained.families import FAMILIES, find_pretrained
from tests.support.pretrained import ODD, OF_FAMILY, edit, saved

CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {"tie_word_embeddings": tied}) for family in OF_FAMILY for tied in (False, True)),
    ("Llama", {"num_key_value_heads": 4, "head_dim": None}),
    ("Qwen2", {"head_dim": 6, "num_key_value_heads": 1}),
    ("Qwen3", {"hidden_size": 31}),  # which no number of heads divides
    ("Olmo2", {"head_dim": 6}),
    ("Mixtral", {"num_experts_per_tok": 1}),
    ("Olmoe", {"norm_topk_prob": True}),
    ("Qwen3Moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}),
    ("Qwen3Moe", {"decoder_sparse_step": 2, "num_hidden_layers": 5}),
    ("Qwen3Moe", {"mlp_only_layers": [0, 1, 2]}),  # all dense
]


def started(folder: Path, **fields: Any) -> LanguageModule:
    """A model of the folder's architecture, and of other fields where they are given, with its weights."""
    pretrained = find_pretrained(folder)
    assert pretrained is not None
    module = LanguageModule({**pretrained.model, **fields}, {}, 50)
    module.start_from(folder)
    module.configure_model()
    return module.eval()


@torch.no_grad()
def assert_same_logits(theirs: Any, ours: LanguageModule) -> None:
    batch = torch.randint(ODD["vocab_size"], (3, 19), generator=torch.Generator().manual_seed(1))
    expected, found = theirs(batch).logits, ours(batch)[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_there_is_a_case_of_every_family() -> None:
    assert {family.lower().replace("3moe", "3_moe") for family, _ in CASES} == FAMILIES.keys()


@pytest.mark.parametrize(("family", "fields"), CASES, ids=str)
def test_logits_are_those_of_transformers(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    assert_same_logits(saved(tmp_path, family, **fields), started(tmp_path))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_files_of_16_bits_and_in_parts_are_read(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = saved(tmp_path, family, dtype, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole = type(theirs).from_pretrained(  # whose RoPE is not rounded
        tmp_path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    assert_same_logits(whole.eval(), started(tmp_path))


def test_a_config_of_transformers_4_means_the_same(tmp_path: Path) -> None:
    theirs = saved(tmp_path, "Qwen3Moe")
    of_5 = {"rope_parameters": None, "num_local_experts": None, "dtype": None}
    edit(tmp_path, **of_5, rope_theta=500.0, num_experts=5, torch_dtype="float32", use_mrope=False, _name_or_path="x")
    assert "rope_parameters" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_logits(theirs, started(tmp_path))


@pytest.mark.parametrize(
    "fields",
    [
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        {"unsloth_version": "2024.9", "unsloth_fixed": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        {"rope_theta": None},
    ],
    ids=str,
)
def test_what_published_folders_have_beside_is_read(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(tmp_path, "Llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    assert_same_logits(theirs, started(tmp_path))


def test_logits_are_not_scaled_with_width(tmp_path: Path) -> None:
    saved(tmp_path, "Llama")
    pretrained = find_pretrained(tmp_path)
    assert pretrained is not None
    module = LanguageModule(pretrained.model, {"width_scaling": "mup", "base_width": 20}, 50)
    valid = r"optim\.width_scaling='mup' is not valid: expected none or standard, as of .*by 1, and here by 0\.5"
    with pytest.raises(ConfigError, match=valid):
        module.start_from(tmp_path)


def test_what_a_missing_field_means_is_what_transformers_takes(tmp_path: Path) -> None:
    from transformers import AutoConfig

    names = {"num_key_value_heads": "num_kv_heads", "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tie_embeddings"}
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for model_type, family in FAMILIES.items():
        content = {"model_type": model_type, **{name: 128 for name in needed}, "sliding_window": None}
        if family.mixture is not None:
            content |= {"num_experts": 4, "num_experts_per_tok": 2, family.expert_dim: 128}
        (tmp_path / "config.json").write_text(json.dumps(content))
        theirs, ours = AutoConfig.from_pretrained(tmp_path), find_pretrained(tmp_path)
        assert ours is not None
        assert {name: ours.model[mine] for name, mine in names.items()} == {n: getattr(theirs, n) for n in names}
        assert ours.model["rope_theta"] == theirs.rope_parameters["rope_theta"]
        assert (ours.model["head_dim"] or 1) == (getattr(theirs, "head_dim", None) or 1)
        if family.mixture is not None and family.normalizes is None:
            assert ours.model["moe"]["normalize_weights"] == theirs.norm_topk_prob


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "field", "value", "valid"),
    [
        ("Llama", "attention_bias", True, "false: of attention's projections only Qwen2's"),
        ("Llama", "mlp_bias", True, "false: feed-forward layers have no biases"),
        ("Llama", "hidden_act", "gelu", "'silu'"),
        ("Llama", "sliding_window", 16, "null: attention reads all"),
        ("Llama", "final_logit_softcapping", 30.0, "null, or no such field"),
        ("Llama", "attention_multiplier", 0.1, "null, or no such field"),
        ("Llama", "rope_parameters", YARN, "RoPE is not scaled here"),
        ("Llama", "rope_scaling", {"type": "linear", "factor": 2.0}, "RoPE is not scaled here"),
        (
            "Llama",
            "rope_parameters",
            {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
            "a partial_rotary_factor of 1",
        ),
        ("Llama", "rope_theta", 7.0, "a rope_theta > 0, the same as beside it"),
        ("Llama", "partial_rotary_factor", 0.5, "1: RoPE turns all"),
        ("Llama", "quantization_config", {"quant_method": "gptq"}, "null: weights are fp32"),
        ("Llama", "attention_dropout", 0.1, "0: there is no dropout"),
        ("Llama", "num_experts", 4, "null, or no such field"),
        ("Llama", "model_type", "gemma2", "one of llama, mistral"),
        ("Llama", "model_type", 3, "one of llama, mistral"),
        ("Llama", "architectures", ["LlamaForSequenceClassification"], r"\['LlamaForCausalLM'\]"),
        ("Llama", "auto_map", {"AutoModel": "evil.Model"}, "null, or no such field"),
        ("Llama", "num_hidden_layers", 10**9, "an integer from 1 to 4,096"),
        ("Llama", "num_hidden_layers", "3", "an integer from 1"),
        ("Llama", "hidden_size", True, "an integer from 1"),
        ("Llama", "rms_norm_eps", -1.0, "a number > 0"),
        ("Llama", "tie_word_embeddings", 1, "true or false"),
        ("Mistral", "sliding_window", 4096, "null: attention reads all"),
        ("Qwen2", "use_sliding_window", True, "false: attention reads all"),
        ("Qwen2", "layer_types", ["sliding_attention"] * 3, "'full_attention' of each layer"),
        ("Olmoe", "clip_qkv", 8.0, "null: queries, keys and values are not clipped"),
        ("Mixtral", "router_jitter_noise", 0.1, "0: noise in training"),
        ("Mixtral", "mlp_only_layers", [0], "null, or no such field"),
        ("Qwen3Moe", "mlp_only_layers", [1], "dense layers at the bottom alone"),
        ("Qwen3Moe", "mlp_only_layers", "all", "a list of layers"),
        ("Qwen3Moe", "num_experts", 4, "num_experts=4, which is the same"),
    ],
    ids=str,
)
def test_what_is_not_had_is_refused_by_its_field(
    family: str, field: str, value: Any, valid: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folders[family] / name)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ConfigError, match=valid) as caught:
        started(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    named = {"rope_theta": "rope_parameters", "num_experts": "num_local_experts" if family == "Qwen3Moe" else field}
    assert f": {named.get(field, field)}=" in str(caught.value)


def test_a_window_that_transformers_takes_by_default_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "Mistral")
    edit(tmp_path, sliding_window=None)  # left out
    with pytest.raises(ConfigError, match=r"sliding_window=None is not valid: expected null"):
        started(tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in ("Llama", "Mistral", "Qwen2", "Mixtral")}
    made |= {family: tmp_path_factory.mktemp(family) for family in ("Olmoe", "Qwen3Moe")}
    for family, folder in made.items():
        saved(folder, family)
    return made


def change(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors.get(name))
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.block_sparse_moe.experts.3.w3.weight"


@pytest.mark.parametrize(
    ("family", "name", "new", "reason"),
    [
        ("Llama", Q, lambda tensor: None, f"there is no {Q}"),
        ("Llama", Q, lambda tensor: tensor[:-1].clone(), rf"{Q} should be \[24, 40\], and is \[23, 40\]"),
        ("Llama", Q, lambda tensor: tensor.int(), f"{Q} is torch.int32"),
        ("Llama", Q, lambda tensor: tensor.to(torch.float8_e4m3fn), f"{Q} is torch.float8_e4m3fn"),
        ("Llama", f"{Q[:-6]}bias", lambda _: torch.zeros(24), f"it has no {Q[:-6]}bias"),
        ("Llama", "lm_head.weight", lambda tensor: None, "there is no lm_head.weight"),
        ("Llama", "model.layers.3.input_layernorm.weight", lambda _: torch.zeros(40), r"it has no model\.layers\.3"),
        ("Mixtral", UP, lambda tensor: None, f"there is no {UP}"),
        ("Mixtral", UP, lambda tensor: tensor.t().contiguous(), rf"{UP} should be \[51, 40\], and is \[40, 51\]"),
        ("Mixtral", UP, lambda tensor: tensor.half(), f"one type in all experts of a layer: {UP}"),
        ("Qwen2", "model.layers.0.self_attn.v_proj.bias", lambda tensor: None, "there is no .*v_proj.bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_is_not_the_architectures_is_refused_by_name(
    family: str, name: str, new: Any, reason: str, tmp_path: Path
) -> None:
    saved(tmp_path, family)
    change(tmp_path, name, new)
    with pytest.raises(ConfigError, match=rf"^init_from='{tmp_path}' is not valid: .*{reason}"):
        started(tmp_path)


def test_a_tied_head_may_be_in_the_file_as_what_it_is(tmp_path: Path) -> None:
    theirs = saved(tmp_path, "Llama", tie_word_embeddings=True)
    change(tmp_path, "lm_head.weight", lambda _: theirs.model.embed_tokens.weight.detach().clone())
    assert_same_logits(theirs, started(tmp_path))
    change(tmp_path, "lm_head.weight", lambda tensor: tensor + 1)
    with pytest.raises(ConfigError, match=r"the embedding's values in lm_head\.weight"):
        started(tmp_path)


def test_frequencies_that_old_files_have_must_be_those_of_the_theta(tmp_path: Path) -> None:
    theirs = saved(tmp_path, "Llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(tmp_path, name, lambda _: 500.0 ** -(torch.arange(0, 6, 2) / 6))
    assert_same_logits(theirs, started(tmp_path))
    change(tmp_path, name, lambda tensor: tensor / 4)
    with pytest.raises(ConfigError, match=f"{name} has others"):
        started(tmp_path)


def test_a_pickle_is_refused_and_not_read(tmp_path: Path) -> None:
    saved(tmp_path, "Llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle, whose reading could run code"):
        started(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 1000, "{}"], ids=["empty", "list", "cut", "deep", "nothing"])
def test_a_config_that_is_none_is_one_line(content: str, tmp_path: Path) -> None:
    saved(tmp_path, "Llama")
    (tmp_path / "config.json").write_text(content)
    module = LanguageModule({"num_layers": 1, "dim": 32}, {}, 53)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        module.start_from(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_heads": 8, "num_kv_heads": 4, "head_dim": 3 * 2}, r"model\.num_heads=8 is not valid: expected 4"),
        ({"num_layers": 2}, r"model\.num_layers=2 is not valid: expected 3"),
        ({"norm_eps": 1e-6}, r"model\.norm_eps=1e-06 is not valid: expected 0\.001"),
        ({"rope_theta": 1e4}, r"model\.rope_theta=10000\.0 is not valid: expected 500\.0"),
        ({"qkv_bias": True}, r"model\.qkv_bias=True is not valid: expected False"),
        ({"vocab_size": 64}, r"model\.vocab_size=64 is not valid: expected 53"),
        ({"tie_embeddings": True}, r"model\.tie_embeddings=True is not valid: expected False"),
        ({"ffn": "moe"}, r"model\.ffn='moe' is not valid: expected 'dense'"),
    ],
    ids=str,
)
def test_a_setting_that_contradicts_the_folder_is_refused(
    fields: dict[str, Any], reason: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=rf"{reason}, as in .*config\.json"):
        started(folders["Llama"], **fields)


def test_another_placement_may_stand_around_its_matrices(tmp_path: Path) -> None:
    saved(tmp_path, "Llama")
    module, plain = started(tmp_path, placement="sandwich", qk_norm="head"), started(tmp_path)
    assert module.model is not None
    assert plain.model is not None
    found, expected = module.model.state_dict(), plain.model.state_dict()
    same = found.keys() & expected.keys()
    assert {name for name in expected if ".placement." not in name} <= same
    assert all(torch.equal(found[name], expected[name]) for name in same)
    new = found.keys() - same
    assert any("projection_norms" in name for name in new)
    assert all(
        torch.equal(found[name], torch.ones_like(found[name])) for name in new if name.endswith("norms.q.weight")
    )
