"""The pictures of quantities over depth, looked at pixel by pixel."""

from collections.abc import Mapping

import numpy as np
import pytest

from callbacks.console import heat_map
from callbacks.console.heat_map import (
    BAR,
    GAP,
    HEIGHT,
    LEFT,
    MAX_COLUMNS,
    NO_NUMBER,
    PLOT,
    TITLE,
    VIRIDIS,
    History,
)


def draw(panels: Mapping[str, History]) -> np.ndarray:
    return np.asarray(heat_map.draw(panels))


def history(*columns: list[float], every: int = 1) -> History:
    made = History(list(range(1, len(columns[0]) + 1)))
    for number, column in enumerate(columns):
        made.add(1 + number * every, column)
    return made


def pixel(picture: np.ndarray, block: int, share_of_steps: float, blocks: int) -> tuple[int, ...]:
    cell = HEIGHT // blocks
    return tuple(picture[TITLE + cell * (block - 1) + cell // 2, LEFT + int(share_of_steps * PLOT)].tolist())


def test_a_block_is_a_row_a_step_a_column_and_a_power_of_ten_an_equal_part_of_the_colours() -> None:
    picture = draw({"figure": history([1e-4, 1e-2], [1e-2, 1.0])})
    darkest, middle, brightest = (tuple(VIRIDIS[index]) for index in (0, 4, 8))
    corners = {(block, at): pixel(picture, block, at, 2) for block in (1, 2) for at in (0.25, 0.75)}
    assert corners == {(1, 0.25): darkest, (1, 0.75): middle, (2, 0.25): middle, (2, 0.75): brightest}


def test_below_zero_the_colours_are_linear() -> None:
    picture = draw({"cosine": history([-1.0, 0.0], [0.0, 1.0])})
    assert pixel(picture, 1, 0.75, 2) == tuple(VIRIDIS[4])


@pytest.mark.parametrize("flat", [[1.0, 1.001], [-1.0, -1.001], [5e-9, 5.1e-9], [0.0, 0.0]])
def test_what_is_flat_looks_flat(flat: list[float]) -> None:
    """Rounding is not stretched over all colours, in the profile neither."""
    picture = draw({"figure": history(flat)})
    colours = [pixel(picture, block, 0.5, 2) for block in (1, 2)]
    distance = np.abs(np.subtract(*colours)).max()
    assert distance < 30, "dark purple and yellow are 247 apart"
    assert np.abs(np.subtract(colours[0], VIRIDIS[4])).max() < 30, "the middle's"
    profile = picture[TITLE : TITLE + HEIGHT, LEFT + PLOT + GAP + BAR + 50 :]
    dark = [np.flatnonzero((profile[HEIGHT * row // 4] < 90).all(axis=-1)).mean() for row in (1, 3)]
    assert abs(dark[0] - dark[1]) < 30, "of 130 pixels"


def test_what_differs_by_more_than_a_quarter_has_all_colours() -> None:
    picture = draw({"figure": history([1.0, 1.26])})
    assert [pixel(picture, block, 0.5, 2) for block in (1, 2)] == [tuple(VIRIDIS[0]), tuple(VIRIDIS[8])]


def test_what_is_no_number_is_red_and_zeros_are_below_all_others() -> None:
    picture = draw({"figure": history([0.0, 1.0, float("nan"), 2.0])})
    seen = [pixel(picture, block, 0.5, 4) for block in (1, 2, 3, 4)]
    assert (seen[0], seen[2], seen[3]) == (tuple(VIRIDIS[0]), NO_NUMBER, tuple(VIRIDIS[8]))
    assert seen[1] not in seen[:1] + seen[2:]
    assert draw({"dead": history([float("nan")] * 2, [float("inf")] * 2)}).shape[2] == 3


def test_columns_stand_at_their_steps() -> None:
    made = History([1, 2])
    for step in (1, 2, 9):  # of which the last is drawn for as long as the others on average
        made.add(step, [float(step), 1.0])
    picture = draw({"figure": made})
    ends = 9 + 4
    at = [pixel(picture, 1, (step - 1) / (ends - 1), 2) for step in (1.5, 2.5, 8.5, 9.5)]
    assert at[1] == at[2], "the second one's value until the ninth step"
    assert len(set(at)) == 3


def test_the_profile_is_drawn_now_and_at_first() -> None:
    picture = draw({"figure": history([1.0, 10.0], [10.0, 1.0])})
    profile = picture[TITLE : TITLE + HEIGHT, LEFT + PLOT + GAP + BAR + 50 :]
    first_row, dark = profile[HEIGHT // 4], (profile[HEIGHT // 4] < 90).all(axis=-1)
    grey = (abs(first_row.astype(int) - 170) < 5).all(axis=-1)
    assert np.flatnonzero(dark).mean() > np.flatnonzero(grey).mean(), "block 1 has risen"


def test_of_many_times_every_second_one_is_forgotten_and_a_rollback_takes_back_what_came_later() -> None:
    made = history(*[[float(step), 1.0] for step in range(MAX_COLUMNS)])
    made.add(1000, [5.0, 1.0])
    assert len(made.steps) == len(made.columns) == MAX_COLUMNS // 2 + 1
    assert (made.steps[:3], made.steps[-1]) == ([1, 3, 5], 1000)
    made.add(4, [7.0, 1.0])
    assert made.steps == [1, 3, 4]
    assert made.columns[-1] == pytest.approx([7.0, 1.0])


def test_any_depth_and_any_number_of_panels_can_be_drawn() -> None:
    for blocks in (2, 7, 96, 300):
        assert draw({str(n): history([1.0] * blocks) for n in range(5)}).dtype == np.uint8
    one, three = (draw({str(n): history([1.0, 2.0]) for n in range(number)}) for number in (1, 3))
    assert (three.shape[0], three.shape[1]) == (3 * one.shape[0], one.shape[1]), "below each other"
    assert (three[: one.shape[0]] == one).mean() > 0.99
