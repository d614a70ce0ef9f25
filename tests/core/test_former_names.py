"""What earlier versions had, by the names that it had there: modules, documented imports, options in files."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from core.former_names import FORMER

NAMES = {
    "artifact": "load_adapter save_adapter read_adapter fingerprint base_names RECORD TENSORS",
    "module": "FineTuner OptimizerSettings ScheduleSettings load_run load_outside outside spec build OUTSIDE",
    "run": "execute assemble make_methods stages_of count peak_memory History is_main_process run",
    "interop": "to_peft from_peft is_peft form_of PeftForm Place CONFIG TENSORS Inexpressible Matcher",
    "labelled": "LabelledData Sample Parts read_csv by_folds folder_with few noted",
    "commands": "role_table roles describe merge predict model_of save_plain export",
    "method": "PEFTMethod Home home_of key_of methods_on uncompiled sample_name training_batch",
    "graft": "Graft Carrier Attention Call Tap connect hidden_out checkpoint_activations route_rows",
    "compose": "Route Fuse Split SideBySide",
    "data": "DataModule EpochLoader EpochSampler ClassSampler Source seed_of",
    "patch": "Patch Change architecture_of residual_report",
    "optim": "Together steps_of run_closure",
    "anatomy": "dissect Site Anatomy BlockDescription Description family Rows",
}
"""What other people's code is likely to import from each."""


@pytest.mark.parametrize("name", FORMER)
def test_a_former_module(name: str) -> None:
    module = importlib.import_module(f"core.{name}")
    parts = [importlib.import_module(f"core.{part}") for part in FORMER[name]]
    assert module is parts[0] if len(parts) == 1 else module.__name__ == f"core.{name}"


@pytest.mark.parametrize("name", NAMES)
def test_what_it_had(name: str) -> None:
    module = importlib.import_module(f"core.{name}")
    assert [word for word in NAMES[name].split() if not hasattr(module, word)] == []
    with pytest.raises(ImportError, match="nothing_of_the_kind"):
        exec(f"from core.{name} import nothing_of_the_kind")


def test_they_cost_nothing_at_the_start() -> None:
    """The names are only looked up where somebody asks for one."""
    code = "import core, sys; print(sorted(name for name in sys.modules if name.startswith('core.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['core.former_names']"
