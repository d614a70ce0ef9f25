"""Checks of every: the survey's families, what is modified, and what is planned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core import report
from core.errors import ScionError
from core.peft import COMPOSITIONS, method_class, registry
from core.report.taxonomy import FAMILIES, KINDS, SURVEY, planned

NAMES = """Sequential adapter; Residual adapter; Parallel adapter; AdapterDrop; Tiny-Attn adapter; CIAT; CoDA;
Compacter; AdapterFusion; MerA; HyperFormer; WARP; Prompt tuning; Prefix tuning; P-tuning; SPoT; ATTEMPT; MPT; LST;
(IA)^3; PASTA; AttentionFusion; Hadamard adapter; BitFit; U-BitFit; S-BitFit; Threshold-Mask; FISH Mask; LT-SFT;
Child-Tuning_F; Child-Tuning_D; Diff pruning; SAM; Intrinsic SAID; LoRA; KronA; DyLoRA; AdaLoRA; IncreLoRA;
Delta-LoRA; LoRAPrune; QLoRA; QA-LoRA; LoftQ; Kernel-mix-lite; Laplace-LoRA; LoRA-FA; LoRAHub; MOELoRA; L-LoRA; MAM
adapter; U-MAM; UniPELT; AutoPEFT; S3Delta-M; S4; AdaMix; SparseAdapter; ProPETL"""


TAGS = [method_class(name).tags for name in (*registry(), *COMPOSITIONS)]


def test_2_every_method_of_the_survey_is_listed() -> None:
    """By its name, as implemented by a class that there is, or as planned."""
    assert [known.name for known in SURVEY] == " ".join(NAMES.split()).split("; ")
    here = {known.method for known in SURVEY if known.method is not None}
    assert here <= {*registry(), *COMPOSITIONS} and len(planned()) + len(here) == len(SURVEY)
    assert all(known.family in FAMILIES and set(known.kinds) <= set(KINDS) and known.kinds and known.summary
               for known in SURVEY)


def test_1_every_method_has_a_family_and_kinds() -> None:
    for name in (*registry(), *COMPOSITIONS):
        assert "tags" in vars(method_class(name)), f"{name} says itself what it is"
    assert all(family in FAMILIES and kinds and set(kinds) <= set(KINDS) for family, kinds in TAGS)


def test_4_one_of_every_family_and_kind() -> None:
    assert {family for family, _ in TAGS} == set(FAMILIES)
    assert {kind for _, kinds in TAGS for kind in kinds} == set(KINDS)


@pytest.mark.parametrize(("filters", "inside", "outside"), [
    ({"family": "additive"}, {"Houlsby", "VPT", "IA3"}, {"LoRA", "BitFit"}),
    ({"family": "weights"}, {"LoRA", "OFT"}, {"Houlsby"}),
    ({"kind": "tokens"}, {"VPT", "MAM", "PrefixTuning"}, {"LoRA", "Houlsby"}),
    ({"family": "hybrid", "kind": "norms"}, {"VPTSP"}, {"MAM"}),
    ({"mergeable": True}, {"LoRA", "FullFineTuning"}, {"Houlsby", "PrefixTuning"}),
    ({"planned": True}, {"LoRA-FA", "QLoRA"}, {"LoRA", "Houlsby"}),
    ({"planned": True, "family": "unified"}, {"AdaMix"}, {"QLoRA"}),
    ({"planned": True, "kind": "bits"}, {"QLoRA", "LoftQ"}, {"AdaMix"})],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "")
def test_filters(filters: dict[str, Any], inside: set[str], outside: set[str]) -> None:
    """By family (the survey's, or a folder's), by what is modified, by whether it merges, and what is planned."""
    cards = report.methods_json(**filters)
    names = {card["name"] for card in cards}
    assert inside <= names and not outside & names
    assert {card["status"] for card in cards} == {"planned" if "planned" in filters else "implemented"}
    assert json.loads(json.dumps(cards)) == cards
    lines = report.methods_table(**filters).splitlines()[2:]
    assert len(lines) == len(cards) and all(("planned: " in line) == ("planned" in filters) for line in lines)
    families = [card["taxon"] for card in cards]
    assert "planned" in filters or families == sorted(families)


def test_unknown_filters_are_refused() -> None:
    with pytest.raises(ScionError, match="no family is called 'aditive' .did you mean 'additive'"):
        report.methods_json(family="aditive")
    with pytest.raises(ScionError, match="no kind is called 'token' .did you mean 'tokens'"):
        report.methods_table(kind="token")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from core.cli import main

    assert main(["methods", "--family", "hybrid", "--json"]) == 0
    assert {card["name"] for card in json.loads(capsys.readouterr().out)} == {"MAM", "UniPELT", "VPTSP"}
    assert main(["methods", "--planned", "--kind", "side"]) == 0
    assert "planned: attention over the hidden states" in capsys.readouterr().out
    assert main(["methods", "LoRA"]) == 0
    assert "reparameterised; modifies linear" in capsys.readouterr().out
