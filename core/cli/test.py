"""``lightning test``: a finished run measured on other data, or with a method replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.cli.failures import says_what_failed
from core.errors import ScionError, printable
from core.files import read_json


@says_what_failed
def test(run: str, overrides: list[str], swaps: list[str], trust: bool = False) -> int:
    """Measure a run once more, print the metrics, and write them with the predictions into ``RUN/tests/<n>``.

    Args:
        run: folder of a finished run.
        overrides: what of the run's configuration is other: ``--data.X``, ``--task.X``, ``--trainer.X``.
        swaps: ``NAME=FOLDER`` each: the method of that name gets the values of the one in the folder.
        trust: whether the run's configuration may name any class by its full path.
    """
    from core import report  # start-up time
    from core.cli.describe import check_published  # start-up time
    from core.config import points  # start-up time
    from core.training.measure import measure  # start-up time

    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise ScionError(f"{file}: missing; test needs the folder of a run")
    if not trust:
        check_published(str(file))
    changes, task = _apart(overrides, file)
    found = points(str(file), changes)
    if len(found) > 1:
        raise ScionError("test: measures one thing at a time; leave --over out")
    folder = measure(Path(run), found[0], _swaps(swaps), task)
    record = read_json(folder / "metrics.json")
    print(f"{printable(run)} on {report.data_named(record['data'])}")
    for name, methods in record["swaps"].items():
        print(f"  {name} from {printable(methods)}")
    for name, value in report.scalars(record["metrics"]["test"]).items():
        print(f"  {name} {value:.4f}")
    print(f"Everything is in {printable(str(folder))}")
    return 0


def _apart(overrides: list[str], file: Path) -> tuple[list[str], dict[str, Any]]:
    """Overrides of the data and the Trainer, in the last stage where there are stages, and those of the task as its
    arguments."""
    from core.config.document import parse, read  # start-up time
    from core.config.entries import last_stage  # start-up time
    from core.config.overrides import split  # start-up time

    config = read(file)
    stages = list(config.get("stages") or {})
    of_stage = last_stage(config)
    changes: list[str] = []
    task: dict[str, Any] = {}
    for key, operator, value in split(overrides):
        start, _, rest = key.removeprefix("model.").partition(".")
        if start == "task" and rest:
            task[rest.removeprefix("init_args.")] = parse(value)
        elif start in ("data", "trainer"):
            place = f"stages.{stages[-1]}." if start in of_stage else ""
            changes.append(f"--{place}{key}{operator}{value}")
        else:
            raise ScionError(f"--{key}: test can change data, task and trainer of a run, as in --data.root FOLDER; "
                             "what was trained stays (another method: --swap NAME=FOLDER)")
    return changes, task


def _swaps(given: list[str]) -> list[Any]:
    from core.training.measure import Swap  # start-up time

    found = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ScionError(f"--swap {text}: must be NAME=FOLDER, a method of the run and the folder of another one")
        found.append(Swap(name, folder))
    return found
