"""The page of tools.watch: what it is told of runs, what it refuses, and what a real browser makes of it."""

import html
import http.client
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch.utils.tensorboard import SummaryWriter

from core import cli
from core.tensorboard import TensorBoard
from tests.support.browser import CHROMIUM, WITHOUT, dom
from tests.support.watch_server import serving
from tools.curves import read_curves
from tools.watch import main
from tools.watching.content import MAX_POINTS, Content
from tools.watching.server import Watching, is_of_this_machine

EVIL = "<img src=x onerror=document.title='run'>&"
PICTURE = np.zeros((3, 8, 8), dtype=np.float32)


def make_run(folder: Path, rate: float, status: dict[str, Any], losses: list[float]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"optim": {"lr": rate}, "seed": 0}))
    (folder / "status.json").write_text(json.dumps(status))
    with SummaryWriter(folder / "tensorboard") as writer:
        for step, loss in enumerate(losses):
            writer.add_scalar("train/loss", loss, step)
        writer.add_scalar("val/loss", losses[-1], len(losses) - 1)
        writer.add_image("depth/signal", PICTURE, 0)
        writer.add_image("depth/signal", PICTURE + 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("watch") / "runs"
    make_run(root / "a", 0.1, {"status": "done", "step": 3, "max_steps": 3, "val_loss": 1.0}, [3.0, float("nan"), 1.0])
    reason = "</script><script>document.title='run'</script>"
    make_run(root / EVIL.replace("/", ""), 0.2, {"status": "failed", "step": 2, "reason": reason}, [3.0, 2.0])
    (root / "b").mkdir()
    (root / "b/config.yaml").write_text("{}")
    (root.parent / "secret").write_text("secret")
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[Watching]:
    with serving(folder) as served:
        yield served


def get(server: Watching, path: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"localhost:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def asked(server: Watching, path: str, **parameters: Any) -> Any:
    status, content, _ = get(server, f"{path}?{urlencode(parameters, doseq=True)}")
    assert status == 200, content
    return json.loads(content)


def test_runs_are_listed_with_what_became_of_them(server: Watching) -> None:
    found = {run["name"]: run for run in asked(server, "/runs")["runs"]}
    assert found.keys() == {"a", "b", EVIL}
    assert (found["a"]["status"], found["a"]["step"], found["a"]["val_loss"]) == ("done", 3, 1.0)
    assert found[EVIL]["reason"].startswith("</script>")
    assert found["b"]["status"] == "failed"


def test_curves_pictures_and_differences_are_those_of_the_files(server: Watching, folder: Path) -> None:
    found = asked(server, "/curves", run="a", tag=["train/loss", "no/such"])
    assert found["curves"] == {"train/loss": [[1, 2, 3], [3.0, None, 1.0]]}
    assert (found["tags"], found["pictures"], found["error"]) == (["train/loss", "val/loss"], {"depth/signal": 2}, None)
    status, picture, headers = get(server, "/picture?run=a&tag=depth/signal")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert picture == Content(folder).picture(folder / "a", "depth/signal")
    assert picture.startswith(b"\x89PNG")
    rows = dict((row[0], row[1:]) for row in asked(server, "/differences", run=["a", EVIL])["rows"])
    assert rows == {"optim.lr": ["0.1", "0.2"]}


def test_the_newest_run_comes_first(tmp_path: Path) -> None:
    written = {"oldest": 1000, "newest": 3000, "middle": 2000}
    for name, time in written.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("{}")
        os.utime(tmp_path / name / "config.yaml", (time, time))
    assert [run["name"] for run in Content(tmp_path).runs()["runs"]] == ["newest", "middle", "oldest"]


def test_a_file_that_grows_is_read_again(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 0.1, {"status": "running"}, [1.0])
    content = Content(tmp_path)
    with SummaryWriter(tmp_path / "run/tensorboard", filename_suffix=".2") as writer:
        for step in range(1, 4):
            writer.add_scalar("train/loss", 1.0 + step, step)
            writer.add_image("depth/signal", PICTURE, step + 1)
            writer.flush()
            found = content.curves(tmp_path / "run", ["train/loss"])
            assert found["curves"]["train/loss"][1][-1] == 1.0 + step
            assert found["pictures"] == {"depth/signal": step + 2}
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 2, "the second file has grown"


def test_loggers_write_out_at_each_logged_step(tmp_path: Path) -> None:
    """Before the next step begins, as the page's documentation says."""
    seen: list[list[int]] = []

    class Reader(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            seen.extend(read_curves(tmp_path / name).get("loss", ([], []))[0] for name in ("events", "table"))

    class Module(BoringModel):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

    loggers = [TensorBoard(tmp_path / "events"), CSVLogger(tmp_path / "table", "csv")]
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        max_steps=3, limit_val_batches=0, log_every_n_steps=1, logger=loggers, callbacks=[Reader()], accelerator="cpu",
        **silent,
    )  # fmt: skip
    trainer.fit(Module())
    assert seen == [[], [], [0], [0], [0, 1], [0, 1]]


def test_what_is_written_meanwhile_is_seen_and_long_curves_are_thinned(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 0.1, {"status": "running"}, [1.0])
    content = Content(tmp_path)
    assert content.curves(tmp_path / "run", ["train/loss"])["curves"]["train/loss"] == [[1], [1.0]]
    with SummaryWriter(tmp_path / "run/tensorboard", filename_suffix=".2") as writer:
        for step in range(1, 3 * MAX_POINTS):
            writer.add_scalar("train/loss", step, step)
    steps, values = content.curves(tmp_path / "run", ["train/loss"])["curves"]["train/loss"]
    assert len(steps) == len(values) == MAX_POINTS
    assert (steps[0], steps[-1]) == (1, 3 * MAX_POINTS)
    (tmp_path / "run/tensorboard/events.out.tfevents.9").write_bytes(b"x" * 100)
    assert "tfevents.9" in content.curves(tmp_path / "run", ["train/loss"])["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/../secret",
        "/%2e%2e/secret",
        "/content.py",
        "/page.html",
        "//etc/passwd",
        "/curves",
        "/curves?run=nowhere",
        "/curves?run=..",
        f"/curves?run={quote('a/../b')}",
        f"/picture?run={quote('../secret')}&tag=x",
        "/picture?run=a&tag=../../config.yaml",
        "/picture?run=a",
        "/differences?run=a&run=../..",
    ],
)
def test_nothing_else_is_there(server: Watching, path: str) -> None:
    status, content, _ = get(server, path)
    assert (status, content) == (404, b"There is no such thing here.\n")


def test_it_answers_this_machine_alone_and_only_reads(server: Watching) -> None:
    assert server.server_address[0] == "127.0.0.1"
    for path in ("/", "/runs", "/page.js"):
        status, content, _ = get(server, path, host="elsewhere.example:8765")
        assert (status, content) == (403, b"This page is of 127.0.0.1 alone.\n")
    assert [get(server, "/runs", method=method)[0] for method in ("POST", "PUT", "DELETE")] == [501] * 3
    policy = get(server, "/")[2]["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    names = {host: is_of_this_machine(host) for host in ("127.0.0.1:80", "localhost", "LOCALHOST:9000", "")}
    assert names == {"127.0.0.1:80": True, "localhost": True, "LOCALHOST:9000": True, "": False}
    assert not any(
        map(is_of_this_machine, ("localhost.example", "127.0.0.1.example:80", "x@localhost", "localhost:80:1"))
    )


def test_a_port_that_is_taken_and_a_folder_that_is_not_there_are_said(
    server: Watching, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ([str(folder), f"port={server.server_port}"], ["nowhere"], [str(folder), "port=70000"])
    said = ("port=", "FOLDER='nowhere' is not valid: expected a folder with runs", "port=70000 is not valid")
    for arguments, words in zip(given, said, strict=True):
        with pytest.raises(SystemExit, match="2"):
            cli.run(lambda arguments=arguments: main(arguments))
        assert words in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)
def test_a_browser_shows_them_keeps_up_and_takes_nothing_for_its_own(
    server: Watching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, real = [0], server.content.runs

    def runs() -> dict[str, Any]:
        found = real()
        looks[0] += 1
        for run in found["runs"]:
            if run["name"] == "b":
                run.update(status="running" if looks[0] == 1 else "stopped", step=looks[0])
        return found

    monkeypatch.setattr(server.content, "runs", runs)
    page = dom(f"http://127.0.0.1:{server.server_port}/", tmp_path / "profile")
    assert looks[0] >= 2
    table = page[page.index('<table id="runs">') : page.index("</table>")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]]
    shown = {html.unescape(row[1]): row for row in rows}
    assert shown.keys() == {"a", "b", EVIL}
    assert shown["b"][2] == "stopped", "as the second look has it"
    assert (shown["a"][2], shown["a"][3], shown["a"][4]) == ("done", "3/3", "1")
    assert "<title>run</title>" not in page, "nothing of a run has been run"
    assert "<img src=x" not in page
    drawn = re.findall(r'<path d="([^"]+)" stroke', page)
    assert sorted(path.count("M") for path in drawn) == [1, 2], "a gap where a loss is no number"
    assert page.count("<circle") == 4, "validation losses, and points beside a gap, which no line would show"
    differences = page[page.index('<table id="differences">') :]
    assert "<td>optim.lr</td>" in differences[: differences.index("</table>")]
    assert re.search(r'<img src="picture\?run=[^"]+tag=depth%2Fsignal[^"]+" alt="depth/signal">', page)
    assert "depth/signal, step 2" in page
