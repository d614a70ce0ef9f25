"""``lightning predict``: what a run's model says of files."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli.failures import says_what_failed
from core.cli.models import first_line
from core.errors import ScionError, one_line, printable
from core.files import check_regular, read_json

if TYPE_CHECKING:
    from core.data import DataModule
    from core.training.finetuner import FineTuner

LARGEST_SIZE = 1_000_000
"""What a number in the data section of a run may be, at most: a stranger's may ask for any memory."""


@says_what_failed
def predict(run: str, files: list[str], as_json: bool, trust: bool = False) -> int:
    """Print a label and a score for each file, and for each in a folder; 2 if one could not be read, the others are
    labelled all the same.

    Args:
        run: folder of a finished run.
        files: to label, or folders of them.
        as_json: print JSON.
        trust: whether the run's configuration may name a data class by its full path, which runs that module.
    """
    import torch
    from tqdm import tqdm

    from core.data.batch import is_all_finite, rows_of  # start-up time
    from core.report import MOST  # start-up time
    from core.training.load_run import load_run  # start-up time

    if not files:
        raise ScionError("no files given")
    tuner = load_run(run, "cuda" if torch.cuda.is_available() else "cpu")
    data = data_of(run, trust)
    _check_agreement(run, tuner, data)
    files = [name for file in files for name in _inside(file, data)]
    if tuner.task.compares:
        return _compare(run, tuner, data, files, as_json)
    size = max(1, min(data.batch_size, len(files)))
    results: list[dict[str, Any]] = []
    shown: list[tuple[Any, str]] = []
    with tqdm(total=len(files), unit="file", disable=len(files) <= 8 or not sys.stderr.isatty(),
              file=sys.stderr) as bar:

        def fail(entry: dict[str, Any], reason: object) -> None:
            entry["error"] = _failure(entry["file"], reason)
            bar.write(entry["error"], file=sys.stderr)

        for start in range(0, len(files), size):
            inputs, readable = [], []
            chunk: list[dict[str, Any]] = [{"file": file} for file in files[start:start + size]]
            for entry in chunk:
                one = _input(entry["file"], data)
                if isinstance(one, Exception):
                    fail(entry, one)
                    continue
                inputs.append(one)
                readable.append(entry)
            outputs = _outputs(tuner, data, inputs) if inputs else None
            for row, (entry, one) in enumerate(zip(readable, inputs, strict=True)):
                output = rows_of(outputs, slice(row, row + 1))
                [prediction] = tuner.task.predict(output)
                if not (is_all_finite(output) and math.isfinite(prediction.get("score", 0.0))):
                    fail(entry, "the model's outputs are not finite")
                    continue
                entry.update(prediction)
                if len(shown) < MOST:
                    shown.append((one, f"{tuner.task.caption(entry)}\n{Path(entry['file']).name}"))
                if not as_json:
                    bar.write(_line(entry), file=sys.stdout)
            results += chunk
            bar.update(len(chunk))
    if as_json:
        print(json.dumps(results, indent=1, allow_nan=False))
    _show(run, data, shown)
    return 2 if any("error" in entry for entry in results) else 0


def _line(entry: dict[str, Any]) -> str:
    """A file's prediction as people read it: file, label or labels, score."""
    if "labels" in entry:
        label = ", ".join(entry["labels"]) or "-"
    else:
        label = entry["label"]
    return f"{printable(entry['file'])}\t{printable(label)}\t{entry['score']:.4f}"


def _check_agreement(run: str, tuner: FineTuner, data: DataModule) -> None:
    """Refuse data of other sizes than the backbone's, which takes them from the data where it is not told them."""
    from core.record import signature  # start-up time

    if not os.path.lexists(Path(run) / "data_state.json"):
        return
    for name in signature(type(tuner.backbone)).parameters:
        here = getattr(data, name, None)
        there = getattr(tuner.backbone, name, None)
        if isinstance(here, int) and isinstance(there, int) and here != there:
            raise ScionError(f"{run}: the data have {name} {here}, the backbone was trained with {there}")


def _input(file: str, data: DataModule) -> Any:
    """A file as the model reads it, or the exception that says why that cannot be."""
    from core.data.batch import is_all_finite  # start-up time

    try:
        check_regular(file)
        one = data.read(file)
        if not is_all_finite(one):
            raise ScionError(f"{file}: holds values that are not finite")
        return one
    except Exception as error:  # whatever a decoder says of a file, the others are labelled all the same
        return error


def _outputs(tuner: FineTuner, data: DataModule, inputs: list[Any]) -> Any:
    """What the model gives for these inputs, on the CPU."""
    import torch

    from core.data.batch import move  # start-up time

    try:
        device = next(tuner.parameters()).device
        with torch.inference_mode():
            return move(tuner(move(data.stack(inputs), device)), "cpu")
    except ScionError:
        raise
    except Exception as error:  # inputs of another shape, memory that is not there
        raise ScionError(f"the model cannot compute this ({first_line(error)})") from error


def _failure(file: str, reason: object) -> str:
    """Why a file has no prediction, in one line with its name."""
    text = one_line(reason) or type(reason).__name__
    name = printable(file)
    return text if name in text else f"{name}: {text}"


def _show(run: str, data: DataModule, shown: list[tuple[Any, str]], columns: int = 8) -> None:
    """The picture of the first files, in the run's folder."""
    from core.training.gallery import of_files  # start-up time

    file = Path(run) / "predictions.png"
    inputs = [one for one, _ in shown]
    # line by line: a line break of ours stays, and one in a file's name does not
    texts = ["\n".join(map(printable, text.split("\n"))) for _, text in shown]
    try:
        if of_files(data, inputs, texts, file, columns=columns):
            print(f"pictures: {printable(file)}", file=sys.stderr)
    except OSError as error:  # what was asked for is printed already
        print(f"{printable(file)}: cannot be written ({error.strerror})", file=sys.stderr)


def _compare(run: str, tuner: FineTuner, data: DataModule, files: list[str], as_json: bool) -> int:
    """Print for each file those of the others that are nearest; 2 if one could not be read."""
    import torch
    from tqdm import tqdm

    from core.tasks.embedding import SHOWN, neighbours  # start-up time

    inputs, readable, vectors, results = [], [], [], []
    for file in tqdm(files, unit="file", disable=len(files) <= 8 or not sys.stderr.isatty(), file=sys.stderr):
        results.append({"file": file})
        one = _input(file, data)
        vector = one if isinstance(one, Exception) else _outputs(tuner, data, [one])[0]
        if isinstance(vector, Exception) or not bool(vector.isfinite().all()):
            reason = vector if isinstance(vector, Exception) else "the model's outputs are not finite"
            results[-1]["error"] = _failure(file, reason)
            tqdm.write(results[-1]["error"], file=sys.stderr)
            continue
        vectors.append(vector)
        readable.append(results[-1])
        inputs.append(one)
    if len(vectors) < 2:
        raise ScionError(f"{len(vectors)} readable file{'s' * (len(vectors) != 1)}; this run compares files with each "
                         "other, so at least two are wanted")
    places, scores = neighbours(torch.stack(vectors), SHOWN[1])
    shown: list[tuple[Any, str]] = []
    for row, (entry, near, score) in enumerate(zip(readable, places.tolist(), scores.tolist(), strict=True)):
        found = list(zip(near, score, strict=True))
        entry["neighbours"] = [{"file": readable[i]["file"], "score": round(value, 4)} for i, value in found]
        if not as_json:
            named = [f"{printable(one['file'])} {one['score']:.4f}" for one in entry["neighbours"]]
            print("\t".join([printable(entry["file"]), *named]))
        if row < SHOWN[0]:
            shown.append((inputs[row], f"query\n{Path(entry['file']).name}"))
            for i, value in found:
                shown.append((inputs[i], f"{value:.2f}\n{Path(readable[i]['file']).name}"))
    if as_json:
        print(json.dumps(results, indent=1, allow_nan=False))
    _show(run, data, shown, columns=1 + len(places[0]))
    return 2 if any("error" in entry for entry in results) else 0


def _inside(file: str, data: DataModule) -> list[str]:
    """The files that a name on the command line stands for: itself, or what a folder holds. An empty folder stays, so
    that it is named as what cannot be read."""
    if not os.path.isdir(file):
        return [file]
    try:
        found = [str(inner) for inner in data.files(Path(file))]
    except OSError:  # named when it is read
        return [file]
    return found or [file]


def data_of(run: str, trust: bool = False) -> DataModule:
    """The datamodule of a run, ready to ``read`` files: from its config.yaml, and what it saved of the data.

    Args:
        run: the run's folder.
        trust: whether a class may be named by its full path, so that its module is imported.

    Raises:
        ScionError: no such folder, something in it is damaged, or a class is none that an installed domain publishes.
    """
    from core.config import make, read  # start-up time
    from core.data import DataModule  # start-up time
    from core.json_types import check  # start-up time

    file = Path(run) / "config.yaml"
    if not os.path.isfile(file):
        raise ScionError(f"{file}: missing; predict needs a whole run folder, not an adapter alone")
    config = read(file)
    part = config.get("data")
    domain = config.get("domain") or ""
    if not isinstance(part, dict) or "class_path" not in part:
        raise ScionError(f"{file}: no data section with a class_path")
    check(part["class_path"], str, str(file), "data.class_path")
    check(part.get("init_args", {}), dict[str, Any], str(file), "data.init_args")
    check(domain, str, str(file), "domain")
    if "." in part["class_path"] and not trust:
        raise ScionError(f"{file}: data.class_path {printable(part['class_path'])} is a full path, and predict imports "
                         "what the installed domains publish alone; pass --trust if the run is your own")
    if domain and not domain.isidentifier():
        raise ScionError(f"{file}: domain {printable(domain)} is no plain word")
    for name, value in part.get("init_args", {}).items():
        if isinstance(value, int) and abs(value) > LARGEST_SIZE and name != "seed":
            raise ScionError(f"{file}: data.{name} {value} is more than any data need")
    whole_part = {"init_args": {}, **part}
    data: DataModule = make(whole_part, "data", domain, DataModule)
    state = Path(run) / "data_state.json"
    if os.path.lexists(state):
        saved = read_json(state)
        try:
            check(saved, dict[str, Any], str(state))
            data.load_state(saved)
        except ScionError:
            raise
        except Exception as error:  # it knows what it has saved, and nothing else
            raise ScionError(f"{state}: damaged ({type(error).__name__}: {first_line(error)})") from None
    return data
