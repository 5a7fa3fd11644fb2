"""What is measured of images, and of tokens that are filled in, against formulas that are written out."""

import copy
import dataclasses
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from analysis.anatomy.bfloat16 import Bfloat16
from analysis.anatomy.contribution import Contribution
from analysis.anatomy.critical_batch_size import Branching, CriticalBatchSize
from analysis.anatomy.expert_share import ExpertShare
from analysis.anatomy.fake_quantization import fake_quantization, round_to_bits
from analysis.anatomy.held_out import Batch, HeldOut, held_out
from analysis.anatomy.layer_drop import LayerDrop
from analysis.anatomy.lens import LogitLens, TunedLens
from analysis.anatomy.outliers import Outliers
from analysis.anatomy.passage import Passage
from analysis.anatomy.routing_agreement import RoutingAgreement
from analysis.anatomy.sharpness import Sharpness
from analysis.anatomy.similarity import CrossSimilarity, Similarity
from analysis.states import watching
from core.checkpoint import load
from core.task import OF_LANGUAGE
from datamodules.images.digits import Digits
from lightning_modules.masked_language_module import MaskedLanguageModule
from lightning_modules.masked_transformer import MaskedTransformer
from lightning_modules.vision_transformer import ImageConfig
from tests.support import images
from tests.support.anatomy import IMAGES, POOLED, enlarged, make_images, of_images, trained_like
from tests.support.fitting import make_trainer
from tests.support.models import VOCAB_SIZE, tiny_config, tiny_values

FORMS = pytest.mark.parametrize("config", [IMAGES, POOLED], ids=["class token", "mean"])


def by_hand(model: Any, pixels: Tensor, *left_out: int) -> list[Tensor]:
    """The PreNorm stream [batch, positions, dim] before the first block and after each, with blocks passed over."""
    config, size = model.images, model.images.patch_size
    patches = F.unfold(pixels, size, stride=size).mT  # by channel, row and column; row by row
    stream = patches @ model.embedding.weight.T
    if config.pool == "class_token":
        stream = torch.cat((model.class_token.expand(len(stream), 1, -1), stream), dim=1)
    if config.positions == "learned":
        stream = stream + model.position
    states = [stream]
    for number, block in enumerate(model.blocks):
        if number not in left_out:
            placement, rope = block.placement, model.rope(pixels.device)
            stream = stream + block.attn(placement.norm_attn(stream), rope)
            stream = stream + block.ffn(placement.norm_ffn(stream))[0]
        states.append(stream)
    return states


def classified(model: Any, state: Tensor) -> Tensor:
    """Logits [batch, classes] of a state, as if it were the last."""
    normed = model.blocks[-1].placement.final_norm(state)
    pooled = normed[:, 0] if model.images.pool == "class_token" else normed.sum(1) / normed.size(1)
    return pooled @ model.head.weight.T


@FORMS
@torch.no_grad()
def test_losses_without_a_block_against_a_loop_over_the_others(config: ImageConfig) -> None:
    model, data = of_images(config=config, placement="prenorm"), make_images(config=config)
    found = LayerDrop(skip="identity")(model, data)

    def losses(*left_out: int) -> Tensor:
        logits = [classified(model, by_hand(model, batch.rows["images"], *left_out)[-1]) for batch in data]
        labels = torch.cat([batch.rows["labels"] for batch in data])
        return F.cross_entropy(torch.cat(logits), labels, reduction="none")

    whole = losses()
    assert found.scalars["loss"] == pytest.approx(float(whole.mean()), abs=1e-5)
    assert found.by_document["loss"][0] == pytest.approx(whole.numpy(), abs=1e-5), "each image is a document"
    drops = [float((losses(number) - whole).mean()) for number in range(4)]
    assert found.curves["drop_by_block"].values == pytest.approx(drops, abs=1e-4)
    assert min(map(abs, drops)) > 1e-3


@FORMS
@torch.no_grad()
def test_depths_are_compared_over_patches(config: ImageConfig) -> None:
    model, data = of_images(config=config, placement="prenorm"), make_images(config=config)
    found = Similarity()(model, data)
    by_batch = [by_hand(model, batch.rows["images"]) for batch in data]
    states = [torch.cat(parts).flatten(0, 1).double().numpy() for parts in zip(*by_batch, strict=True)]
    for i, x in enumerate(states):
        for j, y in enumerate(states):
            u, v = x - x.mean(0), y - y.mean(0)
            cka = np.linalg.norm(v.T @ u) ** 2 / (np.linalg.norm(u.T @ u) * np.linalg.norm(v.T @ v))
            assert found.matrices["cka"][i][j] == pytest.approx(cka, abs=1e-5)
            cosine = ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean()
            assert found.matrices["cosine"][i][j] == pytest.approx(cosine, abs=1e-5)
    added = Contribution()(model, data).curves["contribution_by_block"].values
    ratios = [
        (np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)).mean()
        for before, after in itertools.pairwise(states)
    ]
    assert added == pytest.approx(ratios, rel=1e-4)


@FORMS
@torch.no_grad()
def test_a_depth_is_read_through_pooling_and_head(config: ImageConfig) -> None:
    model, data = of_images(config=config, placement="prenorm"), make_images(config=config)
    found = LogitLens()(model, data)
    labels = torch.cat([batch.rows["labels"] for batch in data])
    by_batch = [by_hand(model, batch.rows["images"]) for batch in data]
    logits = [torch.cat([classified(model, states[depth]) for states in by_batch]) for depth in range(5)]
    final = logits[-1].softmax(-1)
    for depth, each in enumerate(logits):
        expected = {
            "loss": F.cross_entropy(each, labels),
            "divergence": (final * (final.log() - each.log_softmax(-1))).sum(-1).mean(),
            "overlap": np.mean(
                [len(set(a.tolist()) & set(b.tolist())) / 5 for a, b in zip(*map(top, (each, final)), strict=True)]
            ),
        }
        for name, value in expected.items():
            assert found.curves[f"lens_{name}_by_depth"].values[depth] == pytest.approx(float(value), abs=1e-4)


def top(scores: Tensor) -> Tensor:
    return scores.argsort(-1, descending=True)[:, :5]


def test_of_five_classes_the_most_probable_five_say_nothing() -> None:
    few = replace(IMAGES, num_classes=5)
    found = LogitLens()(of_images(config=few, num_layers=2), make_images(config=few))
    assert found.scalars.keys() == {"lens_effective_depth", "lens_effective_share"}
    assert found.by_document.keys() == found.curves.keys() == {"lens_divergence_by_depth", "lens_loss_by_depth"}


def test_a_tuned_lens_is_fitted_on_what_the_head_reads_of_images() -> None:
    model, data = of_images(num_layers=2), make_images(batches=3)
    data = dataclasses.replace(data, fitting=data.batches)
    plain = LogitLens()(model, data).curves["lens_divergence_by_depth"].values
    tuned = TunedLens(steps=150, lr=1e-2)
    values = tuned(model, data).curves["tuned_divergence_by_depth"].values
    assert all(after < 0.8 * before for after, before in zip(values[:-1], plain[:-1], strict=True))
    assert [matrix.shape for matrix, _ in tuned.fit(model, data)] == [(32, 32)] * 2


@FORMS
@torch.no_grad()
def test_bfloat16_against_whole_logits_of_images(config: ImageConfig) -> None:
    model, data = of_images(config=config, num_layers=2), make_images(config=config)
    found = Bfloat16()(model, data)
    pixels, labels = (torch.cat([batch.rows[name] for batch in data]) for name in ("images", "labels"))
    p, q = model(pixels)[0].float(), copy.deepcopy(model).bfloat16()(pixels)[0].float()
    more = F.cross_entropy(q, labels) - F.cross_entropy(p, labels)
    divergence = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean()
    expected = {"bf16": float(more), "bf16_kl": float(divergence), "bf16_same": float(same)}
    assert found.scalars == pytest.approx(expected, rel=1e-3, abs=1e-6)


@torch.no_grad()
def test_outliers_of_images_are_those_of_patches() -> None:
    """Without sinks, which causal attention has."""
    model, data = of_images(placement="prenorm"), make_images()
    found = Outliers()(model, data)
    states = [torch.cat(parts) for parts in zip(*(by_hand(model, b.rows["images"])[1:] for b in data), strict=True)]
    kurtosis = [float((x.pow(4).mean(-1) / x.pow(2).mean(-1) ** 2).mean()) for x in states]
    assert found.curves["kurtosis_by_block"].values == pytest.approx(kurtosis, rel=1e-4)
    largest = [float(x.abs().max()) for x in states]
    assert found.curves["activation_max_by_block"].values == pytest.approx(largest, rel=1e-5)
    assert not [name for name in (*found.scalars, *found.curves, *found.matrices) if "sink" in name]
    assert found.notes[-1].startswith("Sinks are not measured")


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_the_ends_of_the_hessian_of_images(ffn: str) -> None:
    tiny: dict[str, Any] = {"dim": 4, "num_heads": 1, "num_layers": 1, "ffn_dim": 4, "placement": "prenorm"}
    config = ImageConfig(8, 1, 3, 4, "learned", "class_token")
    model = of_images(config=config, ffn=ffn, **tiny, moe={"expert_dim": 4, "num_experts": 2})
    data = make_images(batches=1, number=2, config=config)
    parameters = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = F.cross_entropy(model(data.batches[0].rows["images"])[0], data.batches[0].rows["labels"])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [
        torch.cat([p.flatten() for p in torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True)])
        for g in gradient
    ]
    spectrum = torch.linalg.eigvalsh(torch.stack(rows))
    found = Sharpness(iterations=80)(model, data)
    assert found.scalars["hessian_top"] == pytest.approx(spectrum[-1].item(), rel=2e-3)
    assert found.scalars["hessian_bottom"] == pytest.approx(spectrum[0].item(), rel=2e-3)
    assert found.notes[0] == "Of the first 2 held-out images."


@torch.no_grad()
def test_who_takes_what_of_images() -> None:
    """By forward's own counts; kinds of tokens there are none."""
    model, data = of_images(ffn="moe", num_layers=2), make_images()
    found = ExpertShare()(model, data)
    counts = sum(torch.stack([layer.tokens_per_expert for layer in model(b.rows["images"])[1]]) for b in data)
    assert isinstance(counts, Tensor)
    expected = (counts / counts.sum(1, keepdim=True)).tolist()
    assert found.matrices["expert_share"] == [pytest.approx(row) for row in expected]
    assert found.scalars.keys() == {"busiest_expert"}
    assert found.matrices.keys() == {"expert_share"}


def test_models_that_cut_images_otherwise_share_no_position() -> None:
    first, second = of_images(num_layers=2), of_images(1, POOLED, num_layers=2)
    for comparison in (CrossSimilarity(), RoutingAgreement()):
        if isinstance(comparison, RoutingAgreement):
            first, second = of_images(num_layers=2, ffn="moe"), of_images(1, POOLED, num_layers=2, ffn="moe")
        assert comparison.lacks(first, second) == "it makes 4 positions of a sample, the first makes 17"
        assert comparison.lacks(first, first) is None
    data = make_images().seen_by(second)
    assert (data.num_positions, data.num_targets) == (4 * 8, 8)
    assert data.targets_by_document.tolist() == [1.0] * 8
    assert Outliers()(second, data).counts["kurtosis"].tolist() == [4.0] * 8


def test_a_step_of_a_branch_is_one_of_the_module_of_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = images.make_vision_module({"schedule": "constant", "lr": 0.01, "weight_decay": 0.0}, placement="prenorm")
    assert module.model is not None
    batch = module.model.example(4, 0)
    trainer = make_trainer(tmp_path, limit_val_batches=0, logger=False, max_steps=1)
    trainer.fit(module, DataLoader([batch], batch_size=None), DataLoader([batch], batch_size=None))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = load(tmp_path / "last.ckpt")["optimizer_states"][0]
    branching = Branching(module, state, 1, tmp_path / "last.ckpt", 4, None)
    config = module.images
    data = replace(make_images(config=config), fitting=make_images(batches=9, config=config).batches)
    found = CriticalBatchSize(branching=branching)(module.model, data)
    branch, rows = copy.deepcopy(module.model), Batch.joined(data.fitting).rows
    optimizer = torch.optim.AdamW(branch.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for number, parameter in enumerate(branch.parameters()):
        optimizer.state[parameter] = {name: value.clone() for name, value in state["state"][number].items()}
    for pixels, labels in zip(rows["images"].split(4), rows["labels"].split(4), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(branch(pixels)[0], labels).backward()
        optimizer.step()
    with torch.no_grad():
        losses = [F.cross_entropy(branch(b.rows["images"])[0], b.rows["labels"]) for b in data]
    curve = found.curves["branch_loss_by_doubling"]
    assert curve.values[curve.places.index(0)] == pytest.approx(float(sum(losses)) / 2, abs=2e-3)
    assert found.notes[0].startswith("Each branch went through 36 images, in batches of 2, 4 images; ")


@FORMS
def test_the_ends_of_a_model_of_images_are_rounded_too(config: ImageConfig) -> None:
    model, pixels = of_images(config=config, num_layers=1), make_images(1, config=config).batches[0].rows["images"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[Tensor] = []
    handle = model.embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad(), fake_quantization(model, 4, 8, ends=True):
        for name in ("embedding.weight", "head.weight"):
            assert torch.equal(model.get_parameter(name), round_to_bits(before[name], 4))
        model(pixels)
    handle.remove()
    assert torch.equal(seen[0], round_to_bits(seen[0], 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_held_out_images_are_the_validation_split() -> None:
    """In the order of validation; 200 positions are 12 images of 17."""
    data = Digits(batch_size=5)
    data.prepare_data()
    module = images.make_vision_module(module={"num_classes": 10})
    made = held_out(data, module, 200, fitting_positions=30)
    assert [batch.num_samples for batch in made] == [5, 5, 2]
    assert (made.num_targets, made.num_positions, made.num_documents) == (12, 12 * 17, 12)
    expected = next(iter(data.val_dataloader()))
    assert torch.equal(made.batches[0].rows["images"], expected["images"])
    assert torch.equal(made.batches[0].targets[:, 0], expected["labels"])
    assert [batch.num_samples for batch in made.fitting] == [2]
    assert torch.equal(made.fitting[0].rows["images"], next(iter(data.train_dataloader()))["images"][:2])
    assert (made.task, made.tokenizer) == (module.task, None)
    assert held_out(data, module, 10**6).num_targets == 360


@pytest.mark.parametrize("placement", ["spannorm", "prenorm", "siamesenorm", "attnres"])
@torch.no_grad()
def test_the_way_of_filled_in_tokens_is_their_forward_pass(placement: str) -> None:
    """Tokens that step 0 takes out are asked for, where they stood, and belong to their place's document."""
    torch.manual_seed(0)
    config = tiny_config(causal=False, placement=placement)
    model = enlarged(MaskedTransformer(config, VOCAB_SIZE + 1, mask_rate=0.25, mask_token=VOCAB_SIZE))
    tokens = torch.randint(VOCAB_SIZE, (3, 13))
    masked = model.mask(tokens[:, :-1])
    documents = torch.arange(3)[:, None] * 2 + (torch.arange(12) >= 6)
    batch = Batch.of(model, {"tokens": tokens}, documents)
    assert batch.targets.shape == (3, 3)
    assert torch.equal(batch.targets, tokens.gather(1, masked.at))
    assert torch.equal(documents.gather(1, masked.at), batch.documents_of_targets)
    passage = Passage(model, batch)
    last = passage.states()[-1]
    logits, _ = model(masked.tokens, at=masked.at)
    assert torch.equal(passage.logits(last), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), masked.targets.flatten(), reduction="none").view(3, 3)
    torch.testing.assert_close(passage.losses(last), expected)
    found = LayerDrop()(model, HeldOut((batch,)))
    assert found.scalars["loss"] == pytest.approx(float(model.loss({"tokens": tokens})), abs=1e-5)
    views: list[Any] = []
    with watching(model, views.append):
        model(masked.tokens)
    norms = torch.stack([view.after.norm(dim=-1).mean() for view in views])
    assert len(norms) == 2
    assert Contribution()(model, HeldOut((batch,))).curves["contribution_by_block"].values[0] > 0


def test_a_task_says_what_is_asked_for() -> None:
    assert OF_LANGUAGE.predicted != MaskedLanguageModule.task.predicted != images.VisionModule.task.predicted
    module = MaskedLanguageModule(tiny_values(causal=False), {}, VOCAB_SIZE)
    assert (module.task.sample, module.task.documents) == ("sequence", "documents")
    assert trained_like(num_layers=1).tokens({"tokens": torch.tensor([[1, 2, 3]])}).tolist() == [[1, 2]]
