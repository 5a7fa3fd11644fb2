"""RUN/status.json is of runs that train. What they come to is in tests/tools/test_runs.py."""

from pathlib import Path

import lightning as L

from callbacks.console.run_status import RunStatus
from core.status import read
from lightning_modules.language_module import LanguageModule
from tests.support.models import tiny_values
from tests.support.runs import DESCRIPTION, TinyData


def test_a_validation_by_itself_says_nothing_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"status": "done", "step": 7}')
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[RunStatus(str(tmp_path))], default_root_dir=tmp_path, **quiet)
    module = LanguageModule(tiny_values(), {}, DESCRIPTION["vocab_size"])
    trainer.validate(module, TinyData(tmp_path), verbose=False)
    assert read(tmp_path) == {"status": "done", "step": 7}
