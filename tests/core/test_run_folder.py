"""Nothing of the user's is lost, and nothing of one run is taken for another's."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from core.cli import main
from core.errors import ScionError
from core.files import locked
from core.training.run import execute
from core.training.run_folder import LOCK, RunFolder
from tests.core.tiny_run import PointOf, child, exit_code, fork, is_finished, results

SHORT = ("--trainer.max_epochs", "1")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below ``folder`` with its content, every folder with None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the user's own files."""
    folder = tmp_path / "proj"
    (folder / "adapter").mkdir(parents=True)
    (folder / "stages" / "one").mkdir(parents=True)
    for name in ("notes.txt", "adapter/notes.txt", "stages/one/thesis.tex"):
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize("mistake", [
    ("--peft.rank", "0"),                      # told before anything is built
    ("--peft.targets", "[nothing]"),           # told by the backbone
    ("--select", "best", "--data.no_validation", "true"),  # told when training is about to begin
    ("--optimizer.name", "Nothing"),           # told by the optimizer
])
@pytest.mark.parametrize("where", [".", "new/folder"])
def test_a_mistake_leaves_a_folder_as_it_was(tiny_config: Path, project: Path, monkeypatch: pytest.MonkeyPatch,
                                             mistake: tuple[str, ...], where: str,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(project)
    before = tree(project)
    assert main(["run", str(tiny_config), *SHORT, *mistake, "--run_dir", where]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert tree(project) == before


def test_a_run_beside_the_users_files(point_of: PointOf, project: Path) -> None:
    """They stay, also when the run is started anew."""
    before = tree(project)
    for overwrite in (False, True):
        execute(point_of(*SHORT, "--seed_everything", str(int(overwrite))), project, overwrite)
        assert before.items() <= tree(project).items()
    RunFolder(project, "").clear()
    assert tree(project) == before


@pytest.mark.parametrize("content", ['{"accuracy": 0.9}', '{"format": 1}', "[]", '"text"', "not json", ""])
@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_metrics(point_of: PointOf, project: Path, content: str, overwrite: bool) -> None:
    (project / "metrics.json").write_text(content)
    before = tree(project)
    with pytest.raises(ScionError, match=r"metrics\.json: (no record of a run|damaged)"):
        execute(point_of(*SHORT), project, overwrite)
    assert tree(project) == before


@pytest.mark.parametrize("name", ["config.yaml", "log.txt", "checkpoints/best.ckpt", "adapter/adapter.json",
                                  "stages/one/done.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_file_of_our_names(point_of: PointOf, project: Path, name: str, overwrite: bool) -> None:
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text("mine")
    before = tree(project)
    with pytest.raises(ScionError):
        execute(point_of(*SHORT), project, overwrite)
    assert tree(project) == before


def test_a_link_leads_nowhere_of_ours(point_of: PointOf, project: Path, tmp_path: Path) -> None:
    """Starting anew takes away no file behind a link to a folder."""
    execute(point_of(*SHORT), project)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(project / "checkpoints", elsewhere)
    (project / "checkpoints").symlink_to(elsewhere)
    RunFolder(project, "").clear()
    assert (elsewhere / "last.ckpt").is_file()


def test_one_process_at_a_time(point_of: PointOf, tmp_path: Path) -> None:
    point, folder = point_of(*SHORT), tmp_path / "run"
    folder.mkdir()
    with locked(folder / LOCK, "busy"):
        output = tmp_path / "output.txt"

        def work() -> int:
            import core.files

            core.files._held.clear()  # a fork inherits the notes, not the lock
            with pytest.raises(ScionError, match="another process is working in"):
                execute(point, folder)
            return 0

        assert exit_code(fork(work, output)) == 0, output.read_text()
    assert not (folder / "config.yaml").exists()
    execute(point, folder)
    assert not (folder / LOCK).exists()


def test_the_lock_of_a_killed_process_is_free(point_of: PointOf, tmp_path: Path) -> None:
    point, folder = point_of(*SHORT), tmp_path / "run"
    assert exit_code(child(point, folder, stop_after=1)) == -signal.SIGKILL
    assert (folder / LOCK).exists()
    execute(point, folder)


@pytest.mark.parametrize("prepare", [
    lambda folder: folder.write_text("a file"),
    lambda folder: folder.symlink_to(folder.parent / "nowhere"),
    lambda folder: (folder.parent / "file").write_text(""),
], ids=["file", "link", "below a file"])
def test_no_folder_to_be_had(point_of: PointOf, tmp_path: Path, prepare: Callable[[Path], object]) -> None:
    folder = tmp_path / "run"
    prepare(folder)
    before = tree(tmp_path)
    with pytest.raises(ScionError, match="run_dir"):
        execute(point_of(*SHORT), folder if os.path.lexists(folder) else tmp_path / "file" / "run")
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------------------------- stale results


def stopped(point_of: PointOf, folder: Path, *overrides: str, behind: int = 1) -> None:
    assert exit_code(child(point_of(*overrides), folder, stop_after=behind)) == -signal.SIGKILL


@pytest.mark.parametrize("other", [
    ("--seed_everything", "1"), pytest.param(("--optimizer.lr", "0.02"), marks=pytest.mark.slow),
    pytest.param(("--model.task.dropout", "0.2"), marks=pytest.mark.slow)])
def test_a_checkpoint_belongs_to_its_configuration(point_of: PointOf, tmp_path: Path, other: tuple[str, ...]) -> None:
    """Also where the run's record is gone."""
    folder = tmp_path / "run"
    stopped(point_of, folder)
    (folder / "metrics.json").unlink()
    with pytest.raises(ScionError, match="another run"):
        execute(point_of(*other), folder)
    execute(point_of(*other), folder, overwrite=True)
    execute(point_of(*other), tmp_path / "alone")
    assert results(folder) == results(tmp_path / "alone")


def test_a_run_whose_record_is_gone_goes_on(point_of: PointOf, tmp_path: Path) -> None:
    stopped(point_of, tmp_path / "run", behind=3)
    (tmp_path / "run" / "metrics.json").unlink()
    execute(point_of(), tmp_path / "run")
    execute(point_of(), tmp_path / "alone")
    assert results(tmp_path / "run") == results(tmp_path / "alone")


def test_a_record_put_over_another_runs_checkpoint(point_of: PointOf, tmp_path: Path) -> None:
    stopped(point_of, tmp_path / "run")
    stopped(point_of, tmp_path / "other", "--seed_everything", "1")
    shutil.copy(tmp_path / "other" / "metrics.json", tmp_path / "run" / "metrics.json")
    with pytest.raises(ScionError, match="belongs to another configuration"):
        execute(point_of("--seed_everything", "1"), tmp_path / "run")


@pytest.mark.parametrize("position", [0.1, 0.5, 0.97])
def test_a_flipped_byte_in_a_checkpoint(point_of: PointOf, tmp_path: Path, position: float) -> None:
    stopped(point_of, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = bytearray(file.read_bytes())
    place = content.rindex(b"PK\x01\x02") if position > 0.9 else int(position * len(content))
    content[place] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(ScionError, match=r"last\.ckpt: the checkpoint is damaged"):
        execute(point_of(), tmp_path / "run")
    file.unlink()
    execute(point_of(), tmp_path / "run")
    assert is_finished(tmp_path / "run")


@pytest.mark.parametrize("content", ["{", '{"rows": [], "parameters": {}, "metrics": {}}'])
def test_a_damaged_record_of_a_stage(point_of: PointOf, tmp_path: Path, content: str) -> None:
    point = point_of("--peft", "LTSFT", *SHORT, "--trainer.checkpoint_every_n_steps", "null")
    assert exit_code(child(point, tmp_path / "run", stop_after=2)) == -signal.SIGKILL
    [done] = (tmp_path / "run" / "stages").glob("*/done.json")
    done.write_text(content)
    with pytest.raises(ScionError, match=r"done\.json: damaged"):
        execute(point, tmp_path / "run")


def test_other_data_than_before(point_of: PointOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run does not go on where files have come or gone."""
    from core.training import run

    stopped(point_of, tmp_path / "run")
    monkeypatch.setattr(run, "_listing", lambda data: "other")
    with pytest.raises(ScionError, match="other data"):
        execute(point_of(), tmp_path / "run")


def test_records_are_json(point_of: PointOf, tmp_path: Path) -> None:
    """Numbers that JSON does not have are null."""
    from core.training.run_record import _finite

    execute(point_of(*SHORT), tmp_path / "run")
    for name in ("metrics.json", "history.json"):
        json.loads((tmp_path / "run" / name).read_text(), parse_constant=pytest.fail)
    assert _finite({"a": float("nan"), "b": 1.0}) == {"a": None, "b": 1.0}


@pytest.mark.parametrize("name", ["log.txt", "adapter", "checkpoints", "tensorboard", "stages"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_links_that_lead_out_of_the_folder(point_of: PointOf, tmp_path: Path, name: str, overwrite: bool) -> None:
    mine, folder = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    folder.mkdir()
    (mine / "log.txt").write_text("mine")
    (folder / name).symlink_to(mine / name if name == "log.txt" else mine)
    with pytest.raises(ScionError, match=rf"{name} is a link, and a run writes there"):
        execute(point_of(*SHORT), folder, overwrite)
    assert [file.name for file in mine.iterdir()] == ["log.txt"] and (mine / "log.txt").read_text() == "mine"


def test_a_pipe_where_the_log_goes(point_of: PointOf, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "log.txt")
    with pytest.raises(ScionError, match=r"log\.txt is a pipe"):
        execute(point_of(*SHORT), tmp_path / "run")
