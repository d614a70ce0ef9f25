"""``lightning predict``: what a run's model says of files."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli.failures import says_what_failed
from core.cli.models import first_line
from core.cli.predictions import check_kind, write
from core.errors import ScionError, one_line, printable
from core.files import read_json

if TYPE_CHECKING:
    from core.data import DataModule
    from core.training.finetuner import FineTuner

LARGEST_SIZE = 1_000_000
"""What a number in the data section of a run may be, at most: a stranger's may ask for any memory."""


@says_what_failed
def predict(run: str, files: list[str], as_json: bool, trust: bool = False, features: bool = False,
            out: str | None = None) -> int:
    """Print a label and a score for each file, and for each in a folder; 2 if one could not be read, the others are
    labelled all the same.

    Args:
        run: folder of a finished run.
        files: to label, or folders of them. A text file may hold one sample a line.
        as_json: print JSON.
        trust: whether the run's configuration may name a data class by its full path, which runs that module.
        features: give what the head reads, one vector a sample, in place of a label.
        out: a file for all of it, with the probability of every class: ``.csv``, ``.jsonl`` or ``.npy``.
    """
    import torch

    from core.training.load_run import load_run  # start-up time

    if not files:
        raise ScionError("no files given")
    target = check_kind(out) if out else None
    if features and not (out or as_json):
        raise ScionError("--features: are many numbers a file; add --json, or --out FILE.npy")
    tuner = load_run(run, "cuda" if torch.cuda.is_available() else "cpu")
    data = data_of(run, trust)
    _check_agreement(run, tuner, data)
    data.bind(tuner.backbone)
    files = [name for file in files for name in _inside(file, data)]
    if tuner.task.compares and not features:
        return _compare(run, tuner, data, files, as_json)
    reader = _Reader(tuner, data, features, prints=not (as_json or features), with_all=target is not None)
    results = reader.read(files)
    if target is not None:
        write(target, results)
        print(f"{printable(str(target))}: {len(results)} samples", file=sys.stderr)
    if as_json:
        print(json.dumps(results, indent=1, allow_nan=False))
    _show(run, data, reader.shown)
    return 2 if any("error" in entry for entry in results) else 0


class _Reader:
    """Reads samples in batches and says what the model makes of them, line by line as it goes.

    Args:
        tuner: the model.
        data: of the run; it reads files.
        features: give the feature in place of a prediction.
        prints: whether a line is printed for each sample.
        with_all: whether an entry holds the probability of every class.
    """

    def __init__(self, tuner: FineTuner, data: DataModule, features: bool, prints: bool, with_all: bool) -> None:
        self.tuner, self.data, self.features, self.prints, self.with_all = tuner, data, features, prints, with_all
        self.shown: list[tuple[Any, str]] = []
        """The first inputs, each with what a picture says of it."""

    def read(self, files: list[str]) -> list[dict[str, Any]]:
        """An entry for each sample in the files, in their order."""
        from tqdm import tqdm

        samples = [(name, make) for file in files for name, make in self.data.entries(file)]
        size = max(1, min(self.data.batch_size, len(samples)))
        hidden = len(samples) <= 8 or not sys.stderr.isatty()
        results: list[dict[str, Any]] = []
        with tqdm(total=len(samples), unit="sample", disable=hidden, file=sys.stderr) as bar:
            for start in range(0, len(samples), size):
                chunk = samples[start:start + size]
                results += self._batch(chunk, bar)
                bar.update(len(chunk))
        return results

    def _batch(self, chunk: list[tuple[str, Callable[[], Any]]], bar: Any) -> list[dict[str, Any]]:
        from core.data.batch import is_all_finite, rows_of  # start-up time
        from core.report import MOST  # start-up time

        entries: list[dict[str, Any]] = [{"file": name} for name, _ in chunk]
        inputs, readable = [], []
        for entry, (_, make) in zip(entries, chunk, strict=True):
            one = _input(entry["file"], make)
            if isinstance(one, Exception):
                _fail(entry, one, bar)
                continue
            inputs.append(one)
            readable.append(entry)
        outputs = _outputs(self.tuner, self.data, inputs, self.features) if inputs else None
        for row, (entry, one) in enumerate(zip(readable, inputs, strict=True)):
            output = rows_of(outputs, slice(row, row + 1))
            said = {"feature": output[0].tolist()} if self.features else self._said(output)
            if not (is_all_finite(output) and math.isfinite(said.get("score", 0.0))):
                _fail(entry, "the model's outputs are not finite", bar)
                continue
            entry.update(said)
            if len(self.shown) < MOST and not self.features:
                self.shown.append((one, f"{self.tuner.task.caption(entry)}\n{Path(entry['file']).name}"))
            if self.prints:
                bar.write(_line(entry), file=sys.stdout)
        return entries

    def _said(self, output: Any) -> dict[str, Any]:
        found = self.tuner.task.predict(output)
        if len(found) != 1:
            raise ScionError(f"{type(self.tuner.task).__name__} labels no samples; --features gives their "
                             "vectors, and of a language model --generate.max_new_tokens 64 writes texts")
        every = self.tuner.task.probabilities(output) if self.with_all else None
        return found[0] if every is None else {**found[0], "probabilities": every[0]}


def _fail(entry: dict[str, Any], reason: object, bar: Any) -> None:
    entry["error"] = _failure(entry["file"], reason)
    bar.write(entry["error"], file=sys.stderr)


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
    told = _told_backbone(run)
    for name in signature(type(tuner.backbone)).parameters:
        if told.get(name) is not None:  # it did not take it from the data
            continue
        here = getattr(data, name, None)
        there = getattr(tuner.backbone, name, None)
        if isinstance(here, int) and isinstance(there, int) and here != there:
            raise ScionError(f"{run}: the data have {name} {here}, the backbone was trained with {there}")


def _told_backbone(run: str) -> dict[str, Any]:
    """The arguments of the backbone that a run's configuration names."""
    from core.config import read  # start-up time

    model = read(Path(run) / "config.yaml").get("model")
    part = model.get("backbone") if isinstance(model, dict) else None
    arguments = part.get("init_args") if isinstance(part, dict) else None
    return arguments if isinstance(arguments, dict) else {}


def _input(file: str, make: Callable[[], Any]) -> Any:
    """A sample as the model reads it, or the exception that says why that cannot be."""
    from core.data.batch import is_all_finite  # start-up time

    try:
        one = make()
        if not is_all_finite(one):
            raise ScionError(f"{file}: holds values that are not finite")
        return one
    except Exception as error:  # whatever a decoder says of a file, the others are labelled all the same
        return error


def _outputs(tuner: FineTuner, data: DataModule, inputs: list[Any], features: bool = False) -> Any:
    """What the model gives for these inputs, or its feature of them, on the CPU."""
    import torch

    from core.data.batch import move  # start-up time

    try:
        device = next(tuner.parameters()).device
        with torch.inference_mode():
            batch = move(data.stack(inputs), device)
            found = tuner.backbone.read(batch, "feature").float() if features else tuner(batch)
            return move(found, "cpu")
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
    samples = [entry for file in files for entry in data.entries(file)]
    hidden = len(samples) <= 8 or not sys.stderr.isatty()
    for file, make in tqdm(samples, unit="sample", disable=hidden, file=sys.stderr):
        results.append({"file": file})
        one = _input(file, make)
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
    from core.config.entries import last_stage  # start-up time
    from core.data import DataModule  # start-up time
    from core.json_types import check  # start-up time

    file = Path(run) / "config.yaml"
    if not os.path.isfile(file):
        raise ScionError(f"{file}: missing; predict needs a whole run folder, not an adapter alone")
    config = read(file)
    part = last_stage(config).get("data", config.get("data"))
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
