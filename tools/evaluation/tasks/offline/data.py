"""The data of the three tasks: what a model of Python should know. Written for this project."""

from typing import Any

from datasets import Dataset

CHOICES: list[dict[str, Any]] = [
    {"start": "def first(items):\n    return", "ends": [" items[0]", " items]0[", " [0]items"], "right": 0},
    {"start": "for index in", "ends": [" range(10):", " 10 range:", " (range 10):"], "right": 0},
    {"start": "import os\nimport", "ends": [" )=", " sys", " :("], "right": 1},
    {"start": "if value is None:\n    raise", "ends": ["Error Value ", "())(", " ValueError"], "right": 2},
    {"start": "class Point:\n    def", "ends": [" __init__(self):", " self(__init__):", " init(__self__:"], "right": 0},
    {"start": "with open(path) as", "ends": [": file", " file:", " :file"], "right": 1},
    {
        "start": "while True:\n    try:\n        pass\n    except",
        "ends": [" Exception:", " :", "Exception"],
        "right": 0,
    },
    {"start": "x = [1, 2, 3", "ends": ["]", ")", "}"], "right": 0},
]
TEXTS = [
    {"text": "def add(a, b):\n    return a + b\n"},
    {"text": "import sys\n\nif __name__ == '__main__':\n    sys.exit(0)\n"},
    {"text": "The quick brown fox jumps over the lazy dog. Die Straße, 漢字."},
]
STARTS = [
    {"start": "import sys\nimport o", "end": "s"},
    {"start": "def f(self):\n    return sel", "end": "f"},
    {"start": "x = (1", "end": ")"},
]


def choices(**_: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(CHOICES)}


def texts(**_: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(TEXTS)}


def starts(**_: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(STARTS)}
