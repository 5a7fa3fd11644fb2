"""What transformers does with an exported model: each argument is used as it should be, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core.open_run import open_run
from tests.support.exports import exported, loaded, remade, tokenizer_of
from tests.support.tool_runs import byte_run
from tools.exporting import modeling_placement as modeling

pytestmark = pytest.mark.usefixtures("hub_modules")

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"placement": "spannorm", "num_kv_heads": 1},
    "tied": {"placement": "hybridnorm", "tie_embeddings": True},
    "moe": {"placement": "spannorm", "ffn": "moe"},
    "streams": {"placement": "siamesenorm", "ffn": "moe", "moe": {"num_shared_experts": 1, "first_dense_layers": 1}},
    "bias": {"placement": "lnscaling", "ffn": "moe", "moe": {"balancing": "bias", "score": "sigmoid"}},
}
TEXTS = ["def f(x):", "import os and a longer one", "a"]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """{name: (run, export)}."""
    torch.manual_seed(0)
    tmp_path = tmp_path_factory.mktemp("exports")
    first = byte_run(tmp_path, "experiment=dense_prenorm")
    found = {}
    for name, model in MODELS.items():
        found[name] = remade(first, tmp_path / name, **model), tmp_path / f"{name}-out"
        exported(*found[name])
    return found


@pytest.fixture(scope="module")
def models(folders: dict[str, tuple[Path, Path]], hub_modules: None) -> dict[str, Any]:
    """All of them, in eval mode; tests leave them as they are."""
    return {name: loaded(output) for name, (_, output) in folders.items()}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    return models[request.param]


@pytest.fixture(params=["tied", "streams"])
def writer(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    """Two of them that differ in all that generation touches, for what takes longer."""
    return models[request.param]


@pytest.fixture(params=["dense", "moe"])
def output(request: pytest.FixtureRequest, folders: dict[str, tuple[Path, Path]]) -> Path:
    return folders[request.param][1]


def ids(*texts: str) -> Tensor:
    return torch.tensor([list(text.encode()) for text in texts])


def continued(model: Any, text: str, **options: Any) -> list[int]:
    tokens = ids(text)
    new = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, **options)
    return new[0, tokens.size(1) :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_logit(side: str, model: Any, folders: dict[str, tuple[Path, Path]]) -> None:
    batch = tokenizer_of(folders["dense"][1], side)(TEXTS, return_tensors="pt", padding=True)
    logits = model(**batch).logits
    assert logits.isfinite().all()
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(
            logits[row, batch["attention_mask"][row].bool()], model(ids(text)).logits[0], **CLOSE
        )


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_batch_is_continued_as_each_text_alone(
    use_cache: bool, writer: Any, folders: dict[str, tuple[Path, Path]]
) -> None:
    batch = tokenizer_of(folders["dense"][1], "left")(TEXTS, return_tensors="pt", padding=True)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "use_cache": use_cache}
    alone = [writer.generate(ids(text), attention_mask=torch.ones_like(ids(text)), **options)[0] for text in TEXTS]
    assert len({tuple(tokens[-12:].tolist()) for tokens in alone}) == len(TEXTS)
    together = writer.generate(**batch, **options, pad_token_id=256)
    assert together[:, -12:].tolist() == [tokens[-12:].tolist() for tokens in alone]


def test_generation_is_the_runs_own(models: dict[str, Any], folders: dict[str, tuple[Path, Path]]) -> None:
    for name in ("dense", "streams"):
        ours = open_run(folders[name][0]).module.generate(ids(TEXTS[0])[0].tolist(), 12, 0.0, 0, 64)
        assert continued(models[name], TEXTS[0], min_new_tokens=12, eos_token_id=None) == ours[len(TEXTS[0]) :]


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"repetition_penalty": 1.3}]
)
def test_a_cache_changes_nothing(options: dict[str, Any], writer: Any) -> None:
    assert continued(writer, TEXTS[0], **options) == continued(writer, TEXTS[0], **options, use_cache=False)


def test_speculation_changes_nothing(writer: Any, models: dict[str, Any]) -> None:
    expected = continued(writer, TEXTS[0])
    assert continued(writer, TEXTS[0], prompt_lookup_num_tokens=2) == expected
    assert continued(writer, TEXTS[0], assistant_model=models["tied"]) == expected


@torch.no_grad()
def test_a_text_in_pieces_is_the_text(model: Any) -> None:
    from transformers import DynamicCache

    tokens, cache = ids(TEXTS[1]), DynamicCache()
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split([5, 1, 20], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens).logits, **CLOSE)
    assert model(tokens, use_cache=False).past_key_values is None


@torch.no_grad()
def test_positions_embeddings_and_masks_are_used(model: Any) -> None:
    one, two = ids(TEXTS[0]), ids("abcde")
    expected = model(one).logits
    places = torch.arange(one.size(1))[None]
    torch.testing.assert_close(model(one, position_ids=places + 7).logits, expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(model(one, position_ids=places * 3).logits, expected, atol=1e-3)
    packed = torch.cat((two, one), 1)
    texts = torch.cat((torch.arange(5)[None], places), 1)
    torch.testing.assert_close(model(packed, position_ids=texts).logits[:, 5:], expected, **CLOSE)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(one)).logits, expected, **CLOSE)
    causal = torch.ones(1, 1, one.size(1), one.size(1)).tril()
    torch.testing.assert_close(model(one, attention_mask=causal.bool()).logits, expected, **CLOSE)
    torch.testing.assert_close(model(one, attention_mask=(1 - causal) * -1e30).logits, expected, **CLOSE)
    assert not torch.allclose(model(one, attention_mask=torch.ones_like(causal).bool()).logits, expected, atol=1e-3)


@torch.no_grad()
def test_outputs_are_as_they_are_asked_for(model: Any) -> None:
    tokens = ids(TEXTS[0])
    logits = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, logits[:, -2:], **CLOSE)
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]], **CLOSE)
    plain = model(tokens, labels=tokens, return_dict=False, use_cache=False)
    assert type(plain) is tuple
    torch.testing.assert_close(plain[1], logits)
    if model.config.placement == "siamesenorm":
        with pytest.raises(ValueError, match="output_hidden_states=True is not valid: expected false: between the bl"):
            model(tokens, output_hidden_states=True)
    else:
        first, _, last = model(tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(first, model.get_input_embeddings()(tokens))
        torch.testing.assert_close(model.get_output_embeddings()(last), logits, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True}, "output_attentions=True is not valid: expected false: attention's weights"),
        ({"output_router_logits": True}, "output_router_logits=True is not valid: expected false: there are no"),
        ({"past_key_values": ((torch.ones(1),),)}, "past_key_values='tuple' is not valid: expected a cache that grows"),
        ({"inputs_embeds": torch.ones(1, 9, 32)}, "expected either this or input_ids"),
        ({"input_ids": torch.ones(1, 0).long()}, r"at least one token: a text begins with bos_token_id=256"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask=\[1, 4\] is not valid: expected a tensor \[batch, 9\]"),
        ({"position_ids": torch.ones(9).long()}, r"position_ids=\[9\] is not valid: expected a tensor \[1, 9\]"),
        ({"position_ids": -torch.ones(1, 9).long()}, "position_ids=-1 is not valid: expected numbers >= 0"),
        ({"labels": ids(TEXTS[0]), "logits_to_keep": 1}, "logits_to_keep=1 is not valid: expected 0 where there are"),
        ({"token_type_ids": torch.zeros(1, 9)}, "token_type_ids='Tensor' is not valid: expected nothing: this model"),
        ({"head_mask": torch.ones(2)}, "head_mask='Tensor' is not valid: expected nothing"),
        ({"lables": ids(TEXTS[0])}, "lables='Tensor' is not valid: expected nothing"),
        ({"cache_position": torch.arange(3, 12)}, r"cache_position=\[3, .* is not valid: expected \[0, 1, 2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_not_served_is_refused_in_one_line(
    options: dict[str, Any], message: str, models: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        models["dense"](**{"input_ids": ids(TEXTS[0]), **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_another_attention_is_refused(implementation: str, folders: dict[str, tuple[Path, Path]]) -> None:
    with pytest.raises((ValueError, ImportError)):
        loaded(folders["dense"][1], attn_implementation=implementation)
    assert loaded(folders["dense"][1], attn_implementation="sdpa").config._attn_implementation == "sdpa"


def test_a_cache_that_does_not_grow_is_refused(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="past_key_values='StaticCache' is not valid: expected a cache that grows"):
        continued(models["dense"], TEXTS[0], cache_implementation="static")


def test_an_empty_prompt_begins_a_text(folders: dict[str, tuple[Path, Path]], models: dict[str, Any]) -> None:
    from transformers import pipeline

    model, tokenizer = models["dense"], tokenizer_of(folders["dense"][1])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    begun = model.generate(torch.tensor([[256]]), attention_mask=torch.ones(1, 1), **options).tolist()
    assert model.generate(**tokenizer("", return_tensors="pt"), **options).tolist() == begun
    assert model.generate(**tokenizer(["", ""], return_tensors="pt"), **options).tolist() == begun * 2
    assert model.generate(**options).tolist() == begun
    (written,) = pipeline("text-generation", model=model, tokenizer=tokenizer)("", **options)
    assert written["generated_text"] == tokenizer.decode(begun[0][1:], skip_special_tokens=True)


def own_training_loss(run: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, all of the loss) that the run's own training step has."""
    module = open_run(run).module.train()
    logits, stats = module(tokens[:, :-1])
    entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    moe = module.model_config.moe
    balance = torch.stack([layer.load_balancing_loss for layer in stats]).mean()
    z_loss = torch.stack([layer.z_loss for layer in stats]).mean()
    return entropy, entropy + moe.balance_weight * balance + moe.z_loss_weight * z_loss


@pytest.mark.parametrize("name", ["moe", "streams", "bias"])
def test_fine_tuning_a_mixture_goes_on_with_the_runs_loss(name: str, folders: dict[str, tuple[Path, Path]]) -> None:
    """The run's step reads all tokens but the last; here the last is padding, which no loss may count."""
    tokens = torch.randint(256, (3, 20))
    model = loaded(folders[name][1])
    mask, labels = torch.ones_like(tokens), tokens.clone()
    mask[:, -1], expected = 0, own_training_loss(folders[name][0], tokens)
    for training, loss in zip((False, True), expected, strict=True):
        model.train(training)
        out = model(tokens, attention_mask=mask, labels=labels, output_router_logits=True)
        torch.testing.assert_close(out.loss, loss)
        assert [layer.shape for layer in out.router_logits] == [(60, 4)] * sum(
            block.is_mixture for block in model.model.blocks
        )
    parts = [model(tokens[n : n + 1], labels=labels[n : n + 1], num_items_in_batch=torch.tensor(57)) for n in range(3)]
    whole = [model(tokens[n : n + 1], labels=labels[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(sum(part.loss for part in parts), sum(part.loss for part in whole) / 3)


def test_accumulated_batches_are_one_batch(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """By transformers' own Trainer: loss, gradient norm and weights after a step of SGD; labels of unequal number."""
    from transformers import Trainer, TrainingArguments

    tokens = [list(range(65 + n, 85 + n)) for n in range(4)]
    data = [{"input_ids": row, "labels": [-100] * n + row[n:]} for n, row in enumerate(tokens)]
    found = []
    for size in (4, 1):
        arguments = TrainingArguments(
            str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            **{"max_steps": 1, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9},
            **{"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0},
        )
        model = loaded(folders["dense"][1])
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        first, *_ = trainer.state.log_history
        found.append((first["loss"], first["grad_norm"], model.model.embedding.weight.detach()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), atol=2e-4, rtol=2e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["dense", "streams"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_recomputing_blocks_changes_no_gradient(
    name: str, reentrant: bool | None, folders: dict[str, tuple[Path, Path]]
) -> None:
    tokens, found = ids(TEXTS[0]), []
    for recomputes in (False, True):
        model = loaded(folders[name][1]).train()
        calls: list[int] = []
        model.model.blocks[0].attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if recomputes:
            model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
        model(tokens, labels=tokens).loss.backward()
        assert len(calls) == 1 + recomputes
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    for weight, gradient in found[0].items():
        torch.testing.assert_close(found[1][weight], gradient, msg=weight)
    assert model(tokens, use_cache=True).past_key_values is None
    model.gradient_checkpointing_disable()
    assert model(tokens, use_cache=True).past_key_values is not None


@torch.no_grad()
def test_a_resized_vocabulary_is_saved_with_its_code(output: Path, tmp_path: Path) -> None:
    model, tokens = loaded(output), ids(TEXTS[0])
    before = model(tokens).logits
    model.resize_token_embeddings(260)
    after = model(tokens, labels=tokens)
    torch.testing.assert_close(after.logits[..., :257], before, **CLOSE)
    model.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    assert again.config.vocab_size == 260
    torch.testing.assert_close(again(tokens).logits, after.logits)
    assert {path.name for path in output.glob("*.py")} <= {path.name for path in (tmp_path / "saved").glob("*.py")}


@torch.no_grad()
def test_tied_weights_stay_tied(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model = loaded(folders["tied"][1])
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path / "saved")
    for each in (model, loaded(tmp_path / "saved")):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
        assert each(ids(TEXTS[0])).logits.size(-1) == 260


@pytest.mark.parametrize(("name", "places"), [*((name, "disk") for name in MODELS), ("moe", "mixed")])
@torch.no_grad()
def test_offloaded_weights_give_the_same_logits(
    name: str, places: str, folders: dict[str, tuple[Path, Path]], models: dict[str, Any], tmp_path: Path
) -> None:
    where = {"model.embedding": "cpu", "model.blocks.0": "disk", "model.blocks.1": "disk", "model.head": "disk"}
    if places == "mixed":
        where |= {"model.blocks.1": "cpu", "model.head": "cpu"}
    if name == "tied":
        where["model.head"] = where["model.embedding"]
    model = loaded(folders[name][1], device_map=where, offload_folder=tmp_path)
    assert any(weight.is_meta for weight in model.parameters()), "offloaded"
    tokens = ids(TEXTS[0])
    torch.testing.assert_close(model(tokens).logits, models[name](tokens).logits, **CLOSE)
    longer = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False)
    assert longer[0, -2:].tolist() == continued(models[name], TEXTS[0])[:2]


@torch.no_grad()
def test_in_bfloat16_the_selection_of_experts_stays_exact(
    folders: dict[str, tuple[Path, Path]], models: dict[str, Any]
) -> None:
    for name in MODELS:
        model = loaded(folders[name][1], dtype=torch.bfloat16)
        logits = model(ids(TEXTS[0])).logits
        assert logits.dtype == torch.bfloat16
        far = (logits.float() - models[name](ids(TEXTS[0])).logits).abs().mean()
        assert far < 0.1 * models[name](ids(TEXTS[0])).logits.std()
        kept = {buffer.dtype for key, buffer in model.named_buffers() if key.endswith("expert_bias")}
        assert kept == ({torch.float32} if name == "bias" else set())


def test_a_model_of_a_configuration_alone_has_weights(models: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    torch.empty(100_000).fill_(float("nan"))  # what uninitialized memory may hold
    model = AutoModelForCausalLM.from_config(models["moe"].config, trust_remote_code=True)
    for name, weight in model.named_parameters():
        assert weight.isfinite().all(), name
        if weight.dim() > 1:
            assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.2), name


def test_the_harness_reads_it_alike_at_any_batch_size(folders: dict[str, tuple[Path, Path]]) -> None:
    from lm_eval.models.huggingface import HFLM

    from tests.support.adapter import request

    found = []
    for batch_size in (1, 4):
        path = str(folders["moe"][1])
        harness = HFLM(path, trust_remote_code=True, device="cpu", batch_size=batch_size, dtype="float32")
        options = {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}
        texts = harness.generate_until([request(text, options) for text in (*TEXTS, "class")], disable_tqdm=True)
        pairs = [request(text, " and so on") for text in TEXTS]
        found.append((texts, [pytest.approx(score, abs=1e-3) for score, _ in harness.loglikelihood(pairs)]))
    assert found[0][0] == found[1][0]
    assert [score.expected for score in found[1][1]] == found[0][1]


def test_hidden_states_are_those_of_one_stream() -> None:
    """Of four in one tensor, as of two in a tuple, there are none to give."""
    config = modeling.PlacementConfig(50, 32, 48, 2, 4, placement="hc", norm="rmsnorm")
    model = modeling.PlacementForCausalLM(config).eval()
    with pytest.raises(ValueError, match="output_hidden_states=True is not valid: expected false: between the bl"):
        model(torch.randint(50, (1, 4)), output_hidden_states=True)


class AsIfOnGPU(Tensor):
    is_cuda = True


@pytest.mark.parametrize(("trained", "padded"), [(True, True), (True, False), (False, True)])
def test_cudnn_is_left_out_where_padding_is_trained_with(
    trained: bool, padded: bool, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient may be NaN, as lightning_modules/layers/document_mask.py has it."""
    seen, plain = [], F.scaled_dot_product_attention

    def note(*tensors: Tensor, **options: Any) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    attention = next(module for module in models["dense"].modules() if type(module).__name__ == "Attention")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril() if padded else None
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with torch.set_grad_enabled(trained):
        attention(torch.randn(1, 8, 32).as_subclass(AsIfOnGPU), None, mask, None)
    assert seen == [before and not (trained and padded)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
