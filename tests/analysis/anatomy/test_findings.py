"""Findings as JSON has them."""

import json
import math

import numpy as np

from analysis.anatomy.findings import Curve, Findings, Picture


def test_what_is_no_finite_number_is_null_and_six_digits_are_kept() -> None:
    found = Findings(
        scalars={"a": math.inf, "b": -math.inf, "c": math.nan, "d": 0.123456789, "e": 3.0},
        curves={"f": Curve([1.0, math.inf], "depth", 0)},
        matrices={"g": [[math.nan, 123456789.0]]},
        by_document={"h": np.array([[1.5, np.inf]])},
        pictures=(Picture("f", "curves", ("f",), "f"),),
        notes=("A note.",),
    )
    assert json.loads(json.dumps(found.as_plain(), allow_nan=False)) == {
        "scalars": {"a": None, "b": None, "c": None, "d": 0.123457, "e": 3.0},
        "curves": {"f": {"values": [1.0, None], "over": "depth", "first": 0}},
        "matrices": {"g": [[None, 123457000.0]]},
        "by_document": {"h": [[1.5, None]]},
        "notes": ["A note."],
    }


def test_a_curve_says_where_its_values_stand() -> None:
    assert Curve([5.0, 6.0, 7.0]).places == [1, 2, 3]
    assert Curve([5.0, 6.0], "depth", 0).places == [0, 1]
