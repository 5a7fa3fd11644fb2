"""Pictures by depth, and the scalars that they leave, in the event files of real runs."""

from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch

from callbacks.console.depth_pictures import DepthPictures
from callbacks.scalars import ends_and_worst
from core.errors import ConfigError
from tests.support.runs import events, run, scalars, tiny_job, train
from tools.compare import Run
from tools.stability import stability

BLOCKS = 5
JOB = (
    "model=moe",
    f"model.num_layers={BLOCKS}",
    "model.moe.num_experts=2",
    "trainer.max_steps=4",
    "optim.schedule=constant",
    "trainer.val_check_interval=2",
    "callbacks.signal_propagation.every_n_steps=1",
    "callbacks.representation_collapse.every_n_steps=1",
)
SEEN = f"+callbacks.seen._target_={__name__}.Seen"


class Seen(L.Callback):
    """Keeps what other callbacks could see of each step."""

    steps: ClassVar[list[dict[str, float]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """(a run of five blocks, what could be seen of each of its steps)."""
    folder = run(tmp_path_factory.mktemp("whole"), "run", *JOB, SEEN)
    return folder, list(Seen.steps)


@pytest.fixture(scope="module")
def every_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("all"), "run", *JOB, "blocks=all")


def images(folder: Path) -> dict[str, dict[int, bytes]]:
    written = events(folder)
    return {
        tag: {image.step: image.encoded_image_string for image in written.Images(tag)}
        for tag in written.Tags()["images"]
    }


def test_each_validation_leaves_a_picture_of_each_kind(whole: tuple[Path, Any]) -> None:
    found = images(whole[0])
    assert {"gradients/depth", "updates/depth", "signal/depth", "representation/depth", "moe/depth"} <= found.keys()
    assert {tuple(steps) for tag, steps in found.items()} == {(1, 3)}
    assert all(picture.startswith(b"\x89PNG") for steps in found.values() for picture in steps.values())
    assert found["gradients/depth"][1] != found["gradients/depth"][3]


def test_a_resumed_runs_pictures_are_those_of_the_uninterrupted_one(whole: tuple[Path, Any], tmp_path: Path) -> None:
    run(tmp_path, "run", *JOB, "trainer.max_steps=3")
    run(tmp_path, "run", *JOB, "ckpt_path=last")
    resumed, uninterrupted = images(tmp_path / "run"), images(whole[0])
    assert resumed.keys() == uninterrupted.keys()
    assert {tag: steps[3] for tag, steps in resumed.items()} == {tag: steps[3] for tag, steps in uninterrupted.items()}


def test_the_ends_and_the_worst_block_are_left_as_scalars(whole: tuple[Path, Any], every_block: Path) -> None:
    few, all_tags = (set(events(folder).Tags()["scalars"]) for folder in (whole[0], every_block))
    blocks = {
        f"{prefix}/{figure}": {tag.split("/")[1] for tag in few if tag.split("/")[::2] == [prefix, figure]}
        for prefix, figure in (("gradients", "all"), ("updates", "router"), ("signal", "variance"), ("moe", "entropy"))
    }
    assert {tag.replace("layer", "block") for tag in blocks.pop("moe/entropy")} == {"block_1", "block_5", "block_worst"}
    assert set(map(frozenset, blocks.values())) == {frozenset({"block_1", "block_5", "block_worst"})}
    assert {f"gradients/block_{n}/all" for n in range(1, BLOCKS + 1)} <= all_tags
    assert not any("worst" in tag for tag in all_tags)
    assert len(few) < len(all_tags) - 30
    others = [{tag for tag in tags if "block_" not in tag and "layer_" not in tag} for tags in (few, all_tags)]
    assert others[0] == others[1]
    for tag in ("train/loss", "val/loss", "gradients/block_5/all", "signal/block_1/max", "moe/layer_5/entropy"):
        assert scalars(whole[0], tag) == scalars(every_block, tag), "the curves are the same"


def test_all_quantities_are_kept_block_by_block() -> None:
    pictures = DepthPictures()
    for step, values in ((1, [1.0, 2.0, 3.0]), (5, [4.0, 5.0, 6.0])):
        by_block = dict(zip((10, 2, 1), reversed(values), strict=True))
        figures = ("norm", "attn_in", "all")
        pictures.choose_scalars({f"gradients/block_{n}/{f}": v for n, v in by_block.items() for f in figures}, step)
    kept = pictures.state_dict()
    assert list(kept) == ["gradients/norm", "gradients/attn_in", "gradients/all"]
    for history in kept.values():
        assert (history["blocks"].tolist(), history["steps"].tolist()) == ([1, 2, 10], [1, 5])
        assert history["values"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_other_callbacks_see_every_block(whole: tuple[Path, list[dict[str, float]]], every_block: Path) -> None:
    values = list(scalars(every_block, "gradients/block_3/all").values())
    assert [step["gradients/block_3/all"] for step in whole[1]] == pytest.approx(values, rel=1e-6)
    routed = list(scalars(every_block, "moe/layer_3/entropy").values())  # logged behind the callbacks
    assert [step["moe/layer_3/entropy"] for step in whole[1][1:]] == pytest.approx(routed[:-1], rel=1e-6)


def test_the_worst_is_the_one_that_stands_out(whole: tuple[Path, Any], every_block: Path) -> None:
    for figure in ("gradients/block_{}/all", "signal/block_{}/variance"):
        columns = [scalars(every_block, figure.format(n)) for n in range(1, BLOCKS + 1)]
        for step, worst in scalars(whole[0], figure.format("worst")).items():
            values = np.array([column[step] for column in columns])
            apart = abs(np.log(values / np.median(values)))
            assert worst == pytest.approx(values[apart.argmax()])
    largest = stability(whole[0], Run(whole[0])._curves).largest_activation
    assert largest == pytest.approx(stability(every_block, Run(every_block)._curves).largest_activation)


def test_a_figure_of_three_blocks_stays_as_it_is() -> None:
    values = {f"a/block_{n}/b": float(n) for n in (1, 2, 3)} | {"c": 1.0}
    assert ends_and_worst(values) == values
    by_block = {f"a/block_{n}/max": value for n, value in enumerate((9.0, 1.0, 2.0, 0.001), start=1)}
    assert ends_and_worst(by_block)["a/block_worst/max"] == 9.0
    by_block = {f"a/block_{n}/b": value for n, value in enumerate((9.0, 1.0, 2.0, 0.001), start=1)}
    assert ends_and_worst(by_block) == {"a/block_1/b": 9.0, "a/block_4/b": 0.001, "a/block_worst/b": 0.001}
    signed = {f"a/block_{n}/b": value for n, value in enumerate((-9.0, 1.0, 2.0, 0.001), start=1)}
    assert ends_and_worst(signed)["a/block_worst/b"] == -9.0
    parts = {f"a/block_{n}/attn/from_{n - 1}": 0.5 for n in (1, 2, 3, 4)}
    assert ends_and_worst(parts).keys() == {"a/block_1/attn/from_0", "a/block_4/attn/from_3"}
    broken = by_block | {"a/block_2/b": float("inf")}
    assert ends_and_worst(broken)["a/block_worst/b"] == float("inf")


def test_what_cannot_have_been_kept_begins_anew() -> None:
    callback = DepthPictures()
    for step in (1, 2):
        callback.choose_scalars({f"signal/block_{n}/variance": float(n) for n in (1, 2)}, step)
    state = callback.state_dict()
    again = DepthPictures()
    again.load_state_dict(state)
    assert repr(again.state_dict()) == repr(state)
    kept = state["signal/variance"]
    for name, wrong in (
        ("steps", torch.tensor([2, 1])),
        ("steps", torch.tensor([1.0, 2.0])),
        ("values", kept["values"][:1]),
        ("values", "text"),
        ("blocks", torch.tensor([1])),
    ):
        again.load_state_dict({"signal/variance": {**kept, name: wrong}})
        assert again.state_dict() == {}, name
    again.load_state_dict([])  # type: ignore[arg-type]
    assert again.state_dict() == {}


def test_other_choices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected ends or all"):
        DepthPictures("some")  # type: ignore[arg-type]
    finished = train(tmp_path, *tiny_job("blocks=some"))
    assert (finished.code, finished.err) == (
        2,
        "Error: callbacks.depth_pictures.blocks='some' is not valid: expected one of 'ends', 'all'\n",
    )
    assert not list(tmp_path.iterdir())
