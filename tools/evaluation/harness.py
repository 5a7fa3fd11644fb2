"""Runs tasks of EleutherAI's lm-evaluation-harness, and keeps its results as it writes them."""

import difflib
import traceback
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.task import TaskConfig
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from core.errors import ConfigError, UserError, one_line, writing
from core.open_run import OpenRun
from tools.evaluation.adapter import Adapter, check_generation

TASKS = Path(__file__).resolve().parent / "tasks"


class CheckedTasks(TaskManager):
    """The harness' tasks, refused before the model is asked anything where they want what the adapter does not do."""

    def load(self, *arguments: Any, **options: Any) -> Any:
        """Return the tasks as the harness loads them.

        Raises:
            ConfigError: of a task's `generation_kwargs`.
        """
        try:
            loaded = super().load(*arguments, **options)
        except (TypeError, ValueError, AttributeError) as error:
            if (config := _config_in(error)) is not None and config.generation_kwargs is not None:
                check_generation(config.generation_kwargs)
                valid = f"what the harness can read, of {config.task} ({one_line(error)})"
                raise ConfigError("generation_kwargs", config.generation_kwargs, valid) from error
            raise
        for task in loaded["tasks"].values():
            if task.OUTPUT_TYPE == "generate_until":
                check_generation(task.config.generation_kwargs or {})
        return loaded


def _config_in(error: Exception) -> TaskConfig | None:
    """Return the task's configuration in which the harness failed, as it converts a temperature unseen."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "__post_init__")
    configs = [config for frame in frames if isinstance(config := frame.f_locals.get("self"), TaskConfig)]
    return configs[-1] if configs else None


def manager_of(tasks: list[str]) -> CheckedTasks:
    """Index tools/evaluation/tasks alone where nothing else is asked for: the harness' own tasks take many seconds.

    Args:
        tasks: names of tasks, groups or tags. A group of ours may hold tasks of the harness, as `paper` does, and a tag
            may be on some of them.
    """
    ours = CheckedTasks(include_path=str(TASKS), include_defaults=False)
    asked, groups = list(tasks), list[str]()
    while asked:
        name = asked.pop()
        if name in ours.all_groups and name not in groups:
            groups.append(name)
            members = (ours.task_index[name].cfg or {})["task"]
            asked += members if isinstance(members, list) else [members]
        elif name not in ours.all_subtasks and name not in groups:
            return CheckedTasks(include_path=str(TASKS))
    return ours


def run_tasks(
    run: OpenRun, tasks: list[str], window: int, batch_size: int, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """Evaluate, write RUN/evaluation/step_STEP/results_TIME.json and the samples beside it, and print the table.

    Args:
        run: the model.
        tasks: names of the harness, or of tools/evaluation/tasks.
        window, batch_size: see Adapter.
        num_fewshot: examples before each question; None: what the task says.
        limit: at most so many questions a task.

    Returns:
        {task or group: {metric: value}}.

    Raises:
        ConfigError: no such task, or one that asks for a way of generating that there is not.
        UserError: its data cannot be had.
    """
    manager = manager_of(tasks)
    for task in tasks:
        if task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise ConfigError("tasks", task, f"tasks of the harness or of tools/evaluation/tasks{hint}")
    tracker = EvaluationTracker(output_path=str(run.folder / "evaluation"))
    tracker.general_config_tracker.model_name_sanitized = f"step_{run.step}"
    adapter = Adapter(run.module.model, run.datamodule.tokenizer, window, batch_size)
    try:
        found = simple_evaluate(adapter, tasks=tasks, num_fewshot=num_fewshot, limit=limit, task_manager=manager)
    except OSError as error:  # what it has to download, where there is no network
        raise UserError(f"the data of {', '.join(tasks)} cannot be had: {one_line(error)}") from error
    assert found is not None
    samples = found.pop("samples")
    print(make_table(found))  # first: the folder may be on a disk that is full, or that cannot be written to
    if "groups" in found:
        print(make_table(found, "groups"))
    with writing("RUN", run.folder):
        tracker.save_results_aggregated(found, samples)
        for task, of_task in samples.items():
            tracker.save_results_samples(task, of_task)
    return {name: _metrics(values) for name, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Return {"acc": 0.5} of {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "x"}; filters but none are named."""
    found = {}
    for key, value in values.items():
        name, comma, how = key.partition(",")
        if comma and isinstance(value, int | float) and not name.endswith("_stderr"):
            found[name if how == "none" else f"{name}_{how}"] = float(value)
    return found
