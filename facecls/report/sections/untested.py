"""What stands where a task was not tested."""

import pandas as pd

from facecls.data.tasks import Task
from facecls.report.blocks import Missing


def untested(table: pd.DataFrame, task: Task) -> Missing:
    """Why there are no numbers about a task.

    Args:
        table: Predictions.
        task: A task that is not among ``analysis.tables.tested_tasks``.
    """
    if f"{task.name}_predicted" not in table:
        return Missing(f"The model was not trained for {task.title.lower()}, so there are no results.")
    return Missing(
        f"None of the tested faces is labelled for {task.title.lower()}, so the predictions cannot be scored."
    )
