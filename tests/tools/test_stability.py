"""What is said of a run's stability, by its curves and its configuration."""

import math
from pathlib import Path

import pytest

from tools.curves import Curve
from tools.stability import stability


def curve(*values: float) -> Curve:
    return list(range(len(values))), list(values)


@pytest.mark.parametrize(
    ("clipping", "expected"),
    [
        ("gradient_clip_val: 1.0", 0.5),
        ("{gradient_clip_val: 1.0, gradient_clip_algorithm: null}", 0.5),
        ("{gradient_clip_val: 1.0, gradient_clip_algorithm: norm}", 0.5),
        ("{gradient_clip_val: 1.0, gradient_clip_algorithm: value}", None),
        ("{gradient_clip_val: null}", None),
    ],
)
def test_the_norm_says_what_was_clipped_only_where_it_is_clipped(
    clipping: str, expected: float | None, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(f"trainer:\n  {clipping}\n")
    assert stability(tmp_path, {"optim/grad_norm": curve(0.5, 2.0)}).clipped == expected


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("block", ["1", "2", "worst"])
def test_an_activation_that_is_no_finite_number_is_the_largest(odd: float, at: int, block: str, tmp_path: Path) -> None:
    curves = {f"signal/block_{n}/max": curve(3.0, 5.0, 4.0) for n in ("1", "2", "worst")}
    assert stability(tmp_path, curves).largest_activation == 5.0
    curves[f"signal/block_{block}/max"][1][at] = odd
    assert stability(tmp_path, curves).largest_activation == math.inf
    assert stability(tmp_path, {}).largest_activation is None
