"""What can be done to a file, on purpose or by bad luck; each case is a function of a path and a source of choices."""

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

Draw = Callable[[list[Any]], Any]
"""Chooses one of several."""

ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    10**18,
    -(10**18),
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "x" * 100_000,
    "../../beside/notes.txt",
    "/etc/passwd",
    "x/../../../PWN",
    "\x1b]0;owned\x07\x1b[31m",
    "[/x]",
    "<script>alert(1)</script>",
    "![x](/etc/passwd)",
    "${oc.env:HOME}",
    "\ud800",
    "a\0b",
    "os.system",
    "²",
    [],
    [[]],
    {},
    {"_target_": "os.system", "_args_": ["touch ran"]},
    [0] * 10_000,
    {"a": {"b": {"c": None}}},
]
TENSORS = [
    torch.zeros(1),
    torch.zeros(2, 3),
    torch.tensor(float("nan")),
    torch.tensor(7),
    torch.zeros(0),
    torch.zeros(0, 3),
]


class Runs:
    """Unpickled, it makes a file: the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def any_bytes(path: Path, draw: Draw, canary: Path) -> None:
    """Bits flipped, parts cut off, zeroed, doubled, or put in."""
    content = bytearray(path.read_bytes())
    place = int(len(content) * draw([0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999]))
    size = draw([1, 2, 8, 64, 1000])
    how = draw(["flip", "cut", "zero", "double", "noise", "empty", "drop"])
    if how == "flip" and content:
        content[min(place, len(content) - 1)] ^= 1 << draw(list(range(8)))
    elif how == "cut":
        del content[place:]
    elif how == "zero":
        content[place : place + size] = bytes(size)
    elif how == "double":
        content[place:place] = content[place : place + size]
    elif how == "noise":
        content[place:place] = bytes(draw(list(range(256))) for _ in range(min(size, 8)))
    elif how == "drop":
        del content[place : place + size]
    else:
        content.clear()
    path.write_bytes(content)


def another_kind(path: Path, draw: Draw, canary: Path) -> None:
    """A folder, a pipe, a device, or a link in the place of the file."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    how = draw(["folder", "pipe", "zero", "loop", "outside", "gone", "zip", "unreadable text"])
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "zip":
        path.write_bytes(b"PK\x03\x04" + bytes(100))
    elif how == "unreadable text":
        path.write_bytes(b"\xff\xfe\x00\x80" * 50)
    elif how != "gone":
        path.symlink_to({"zero": "/dev/zero", "loop": path.name, "outside": "../../beside/array.npy"}[how])


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        found += _places(value, (*path, key))
    return found


def _damaged(content: Any, draw: Draw, odd: list[Any] = ODD) -> Any:
    """One value replaced, taken away, or added."""
    *path, last = draw([place for place in _places(content) if place] or [(None,)])
    node = content
    for key in path:
        node = node[key]
    how = draw(["replace", "replace", "replace", "remove", "add"])
    if last is None:
        return draw(odd)
    if how == "remove" and isinstance(node, dict):
        del node[last]
    elif how == "add" and isinstance(node, dict):
        node[draw(["nonsense", "_target_", "", "../x", "\x1b[31m"])] = draw(odd)
    else:
        node[last] = draw(odd)
    return content


def json_values(path: Path, draw: Draw, canary: Path) -> None:
    """Of JSON, or the last line of JSON lines: one value is odd, or all of it."""
    *before, text = path.read_text().rstrip("\n").split("\n") if path.suffix == ".jsonl" else [path.read_text()]
    how = draw(["value", "value", "value", "value", "deep", "whole", "many digits", "doubled keys"])
    if how == "value":
        with contextlib.suppress(ValueError):
            text = json.dumps(_damaged(json.loads(text), draw))
    elif how == "deep":
        depth = draw([500, 5000, 100_000])
        text = draw(["[" * depth, "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])
    elif how == "many digits":
        text = text.replace("1", "1" * 5000, 1)
    elif how == "doubled keys":
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    else:
        text = json.dumps(draw(ODD))
    path.write_text("\n".join([*before, text]) + "\n", errors="surrogatepass" if "\ud800" in text else "strict")


def yaml_values(path: Path, draw: Draw, canary: Path) -> None:
    """One value of a YAML file is odd; or the file holds aliases that unfold, types of Python, or depth."""
    text = path.read_text()
    how = draw(["value", "value", "value", "value", "aliases", "types", "deep", "whole", "interpolation"])
    if how == "value":
        content = yaml.safe_load(text)
        text = yaml.safe_dump(_damaged(content, draw))
    elif how == "aliases":
        levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, draw([5, 9, 30])))
        text = f"l0: &l0 [x]\n{levels}{text}"
    elif how == "types":
        tag = draw(["python/object/apply:os.mkdir", "python/name:os.system", "python/object/new:os.mkdir", "binary"])
        runs = f"{{a: '${{oc.create:{{_target_: os.mkdir, path: {canary}}}}}'}}"
        text += draw([f"more: !!{tag} [{canary}]\n", f"data: !!pairs [{runs}]\n", f"trainer: !!omap [{runs}]\n"])
    elif how == "deep":
        text += "more: " + draw(["[", "{a: "]) * draw([100, 1000, 20_000]) + "\n"
    elif how == "interpolation":
        text += draw(
            ["more: ${more}\n", "more: ${oc.env:HOME}\n", "more: ${oc.create:{_target_: os.system}}\n", "more: ${\n"]
        )
    else:
        text = yaml.safe_dump(draw(ODD))
    path.write_text(text, errors="surrogateescape")


def torch_values(path: Path, draw: Draw, canary: Path) -> None:
    """One value of what torch.save wrote is odd; or it holds code, in the format of today or of old; or a trap."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    how = draw(["value", "value", "value", "value", "code", "old code", "only code", "stride", "unfolds", "zip"])
    if how == "value":
        # Each of these has more values than all the rest, which would hardly ever be met.
        large = [name for name in ("optimizer_states", "loops") if name in content]
        chosen = draw([None, None, *large])
        part = {name: value for name, value in content.items() if (name == chosen if chosen else name not in large)}
        rest = {name: value for name, value in content.items() if name not in part}
        content = {**rest, **_damaged(part, draw, [*ODD, *TENSORS])}
    elif how == "stride":
        name = draw(["model.head.weight", "model.embedding.weight", "big"])
        state = content.setdefault("state_dict", {}) if isinstance(content, dict) else {}
        state[name] = torch.zeros(1).expand(draw([2**20, 2**36]))
    elif how == "unfolds":
        node: dict[str, Any] = {}
        for _ in range(40):
            node = {"a": node, "b": node}
        content = {**content, draw(["hyper_parameters", "callbacks", "more"]): node}
    elif how in ("code", "old code"):
        content = {**content, draw(["global_step", "state_dict", "more"]): Runs(canary)}
    if how == "only code":
        path.write_bytes(pickle.dumps(Runs(canary)))
    elif how == "zip":
        _rezip(path, draw, canary)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "old code")


def _rezip(path: Path, draw: Draw, canary: Path) -> None:
    """The same archive with a part renamed, left out, compressed, doubled, or with a pickle of ours."""
    parts = {}
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    name = draw(sorted(parts))
    how = draw(["rename", "drop", "compress", "pickle", "large"])
    content = parts[name]
    if how in ("rename", "drop"):
        del parts[name]
    if how == "rename":
        parts[draw([f"../../../{canary.name}", "/" + name, name.upper(), ""])] = content
    if how == "pickle":
        parts[next(part for part in parts if part.endswith("data.pkl"))] = pickle.dumps(Runs(canary))
    if how == "large":
        parts[name] = bytes(1 << 26)
    stored = zipfile.ZIP_DEFLATED if how in ("compress", "large") else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", stored) as archive:
        for part, inside in parts.items():
            archive.writestr(part or "x", inside)
    path.write_bytes(buffer.getvalue())


def pickle_values(path: Path, draw: Draw, canary: Path) -> None:
    """A pickle of ours in the place of one."""
    path.write_bytes(
        draw([pickle.dumps(Runs(canary)), pickle.dumps({"a": Runs(canary)}), pickle.dumps(draw(ODD)), b"\x80"])
    )


def table_values(path: Path, draw: Draw, canary: Path) -> None:
    """A cell of a CSV table."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    row = draw(list(range(len(rows))))
    cell = draw(list(range(len(rows[row]))))
    rows[row][cell] = draw(
        ["", "x", "nan", "1e999", "-1", "9" * 5000, "\x1b[31m", '"', "\0", "1.5", "[/x]", "a" * 200_000]
    )
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")


def line_values(path: Path, draw: Draw, canary: Path) -> None:
    """A text of documents."""
    how = draw(
        [b"\x80" * (1 << 20), b"[" * 100_000, b'{"text": 5}\n', b'{"text": null}', b"\0" * 1000, b"\n" * 100_000]
    )
    path.write_bytes(how)
