"""One training step beside Hugging Face peft: CPU time, bytes kept for backward, operators.

    python -m benchmarks.training_step --model bert_base --methods LoRA DoRA --repeats 20

Both sides get the same frozen weights (random, nothing is fetched), the same batch, the same sites and the same
optimizer, AdamW over what each of them trains. Their steps (forward, backward, update) run by turns in one process, and
the order of a pair alternates; what is compared is the process's own CPU time, since wall clock measures what else the
machine does. Where others share a core, that too has phases in which everything takes half as long again: such a phase
hits both steps of a pair, so beside the ratio of the medians stands the median of the pairs' ratios, which hardly feels
it. The intervals come from 2,000 resamples of the pairs. Bytes, operators and FLOPs are counted by `core.cost` on
either side. Results are added to a JSON file, row by row, and the table is written from that.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core import peft as methods
from core.anatomy import dissect
from core.cost import describe
from core.errors import ScionError, nearest
from core.files import write_atomically

DOCS = Path(__file__).parent.parent / "docs"
LIMIT = 1.03
"""The largest ratio of times that counts as no slower."""


# ------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Workload:
    """A backbone with random weights, a batch, and the sites that methods stand at, by the names on either side."""

    build: Callable[[int | None], nn.Module]
    """Makes the model, of as many blocks as it is given; None is all."""
    batch: Callable[[int], Any]
    size: int
    """Samples of a batch."""
    sample: str
    """What a sample is."""
    feature: Callable[[Any], Tensor]
    """The states that the loss reads, the same for sequences that prompts have lengthened."""
    targets: Sequence[str]
    peft_targets: str
    """peft's, as a regular expression of whole names."""
    scaled: tuple[Sequence[str], Sequence[str], str, str]
    """Of IA3: roles of outputs and of inputs; peft's modules, and those of them that are scaled at the input."""
    norms: str
    text: bool = False


def _vit(layers: int | None, name: str = "vit_base_patch16_224", **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=0, **{**options, **({} if layers is None else {"depth": layers})})


def _bert(layers: int | None, **options: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    options |= {} if layers is None else {"num_hidden_layers": layers}
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)
    return BertModel(config, add_pooling_layer=False)


def _images(side: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(1))


def _text(length: int, vocabulary: int) -> Callable[[int], dict[str, Tensor]]:
    def batch(size: int) -> dict[str, Tensor]:
        ids = torch.randint(vocabulary, (size, length), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[::2, -length // 4:] = 0  # every other sample is shorter
        return {"input_ids": ids, "attention_mask": mask}

    return batch


def _vit_workload(side: int, size: int, **options: Any) -> Workload:
    return Workload(
        lambda layers: _vit(layers, **options), _images(side), size, f"an image of {side} x {side}",
        lambda output: output,
        ("qkv",), r".*attn\.qkv", (("qkv",), ("mlp.down",), r".*(attn\.qkv|mlp\.fc2)", r".*mlp\.fc2"),
        r"norm|blocks\.\d+\.norm[12]")


def _bert_workload(length: int, size: int, **options: Any) -> Workload:
    return Workload(
        lambda layers: _bert(layers, **options), _text(length, options.get("vocab_size", 30_522)), size,
        f"{length} tokens", lambda output: output.last_hidden_state[:, -length:],
        ("q", "v"), r".*attention\.self\.(query|value)",
        (("k", "v"), ("mlp.down",), r".*(attention\.self\.(key|value)|layer\.\d+\.output\.dense)",
         r".*layer\.\d+\.output\.dense"), r".*LayerNorm", text=True)


WORKLOADS = {
    "vit_b16": _vit_workload(224, 2),
    "bert_base": _bert_workload(64, 4),
    # Narrow, to see that the script runs.
    "nano_vit": _vit_workload(32, 2, name="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2,
                              num_heads=4),
    "nano_bert": _bert_workload(16, 2, vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                intermediate_size=128),
}
NAMES = {"vit_b16": "ViT-B/16 (timm), the fused `qkv`", "bert_base": "BERT-base (transformers), `query` and `value`",
         "nano_vit": "a ViT of two narrow blocks", "nano_bert": "a BERT of two narrow layers"}


# ------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Pair:
    """A method here and in peft, with the same numbers."""

    ours: dict[str, Any]
    config: str
    """peft's class of configurations."""
    theirs: dict[str, Any]
    method: str | None = None
    """The class here; None is the pair's name."""
    sites: str = "targets"
    """What its sites are: ``targets``, ``scaled``, ``norms`` or ``prompts``."""
    starts_same: bool = True
    """Whether both start as the frozen model."""
    note: str = ""


def _prompts(ours: dict[str, Any], config: str, theirs: dict[str, Any], note: str = "") -> Pair:
    return Pair(ours, config, {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 20, **theirs}, sites="prompts",
                starts_same=False, note=note)


LORA = {"r": 8, "lora_alpha": 8}
PAIRS: dict[str, Pair] = {
    "LoRA": Pair({"rank": 8}, "LoraConfig", LORA),
    "rsLoRA": Pair({"rank": 8}, "LoraConfig", {**LORA, "use_rslora": True}),
    "PiSSA": Pair({"rank": 8}, "LoraConfig", {**LORA, "init_lora_weights": "pissa"},
                  note="peft moves the frozen weight; here it stays, and B_0 A_0 is subtracted"),
    "DoRA": Pair({"rank": 8}, "LoraConfig", {**LORA, "use_dora": True}),
    "AdaLoRA": Pair({"rank": 12, "alpha": 12}, "AdaLoraConfig", {"init_r": 12, "lora_alpha": 12, "total_step": 1000},
                    note="without budget and orthogonality, which peft leaves to the caller"),
    "VeRA": Pair({"rank": 256}, "VeraConfig", {"r": 256}),
    "FourierFT": Pair({"frequencies": 1000}, "FourierFTConfig",
                      {"n_frequency": 1000, "scaling": 300.0, "init_weights": True}),
    "OFT": Pair({"block": 32}, "OFTConfig", {"oft_block_size": 32}),
    "BOFT": Pair({"block": 4}, "BOFTConfig", {"boft_block_size": 4},
                 note="peft stores whole blocks, of which half is used"),
    "LoHa": Pair({"rank": 8}, "LoHaConfig", {"r": 8, "alpha": 8}),
    "LoKr": Pair({"rank": 8}, "LoKrConfig", {"r": 8, "alpha": 8}),
    "Bone": Pair({"rank": 64}, "MissConfig", {"r": 64}, note="peft's name is MiSS"),
    "IA3": Pair({}, "IA3Config", {}, sites="scaled"),
    "LayerNormTuning": Pair({}, "LNTuningConfig", {}, sites="norms"),
    "PrefixTuning": _prompts({"tokens": 20}, "PrefixTuningConfig", {}),
    "PromptTuning": _prompts({"tokens": 20}, "PromptTuningConfig", {}),
    "PTuning": _prompts({"tokens": 20}, "PromptEncoderConfig", {}),
    # peft's LoRA against itself: how far from 1 the ratio of equals lies.
    "control": Pair({}, "LoraConfig", LORA, method="", note="peft's LoRA on both sides: the noise"),
}


def ours(name: str, base: nn.Module, workload: Workload) -> nn.Module:
    """The base with the pair's method here; of the control, with peft's."""
    pair, model = PAIRS[name], copy.deepcopy(base)
    if pair.method == "":
        return theirs(name, base, workload)
    options = dict(pair.ours)
    if pair.sites == "targets":
        options["targets"] = list(workload.targets)
    elif pair.sites == "scaled":
        options |= {"outputs": list(workload.scaled[0]), "inputs": list(workload.scaled[1])}
    methods.make(pair.method or name, options).attach(model)
    return model


def theirs(name: str, base: nn.Module, workload: Workload) -> nn.Module:
    """The base with the pair's method in peft."""
    import peft

    pair = PAIRS[name]
    options = dict(pair.theirs)
    if pair.sites == "targets":
        options["target_modules"] = workload.peft_targets
    elif pair.sites == "scaled":
        options |= {"target_modules": workload.scaled[2], "feedforward_modules": workload.scaled[3]}
    elif pair.sites == "norms":
        options["target_modules"] = workload.norms
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(base), getattr(peft, pair.config)(**options))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- measuring


class Side:
    """One implementation: a model, its optimizer, and a step whose CPU time is returned."""

    def __init__(self, model: nn.Module, inputs: Any, workload: Workload, lr: float = 1e-4) -> None:
        self.model, self.inputs, self.feature = model.train(), inputs, workload.feature
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        with torch.no_grad():
            self.start = self.forward()
        # A direction that the loss follows; a mean of squares behind a norm would have no gradient.
        self.direction = torch.randn(self.start.shape, generator=torch.Generator().manual_seed(2))

    def forward(self) -> Tensor:
        output = self.model(**self.inputs) if isinstance(self.inputs, dict) else self.model(self.inputs)
        return self.feature(output)

    def loss(self, output: Any) -> Tensor:
        return (self.feature(output) * self.direction).mean()

    def step(self) -> float:
        start = time.process_time()
        self.optimizer.zero_grad()
        (self.forward() * self.direction).mean().backward()
        self.optimizer.step()
        return time.process_time() - start

    def counts(self) -> dict[str, int]:
        """Exact counts of one forward and backward."""
        cost = describe(self.model, self.inputs, self.loss)
        numbers = {"trained": cost.parameters["trained"], "kept_bytes": cost.kept_bytes,
                   "flops": (cost.forward_flops or 0) + (cost.backward_flops or 0),
                   "operators": (cost.forward_operators or 0) + (cost.backward_operators or 0)}
        self.model.zero_grad(set_to_none=True)
        return {name: int(value or 0) for name, value in numbers.items()}


@dataclass
class Row:
    """What was measured of one method on one model."""

    model: str
    method: str
    ratio: float
    """Median over the pairs of CPU time here / in peft."""
    interval: tuple[float, float]
    """95 % of the resampled ratios."""
    medians: float
    """Median CPU time here / median in peft."""
    medians_interval: tuple[float, float]
    """95 % of those."""
    seconds: dict[str, float]
    """Median CPU time of a step, ``ours`` and ``theirs``."""
    ours: dict[str, int]
    theirs: dict[str, int]
    start_difference: float | None
    """Largest difference of the two first outputs over the largest output; None where no equal start is meant."""
    settings: dict[str, Any] = field(default_factory=dict)


def random_base(model: str, layers: int | None = None) -> nn.Module:
    """The model with random weights, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WORKLOADS[model].build(layers)


def layers_of(base: nn.Module) -> int:
    """How many blocks the model has."""
    return len(dissect(base).blocks)


def measure(model: str, base: nn.Module, name: str, size: int | None = None, repeats: int = 20, warmup: int = 2,
            tick: Callable[[], Any] = lambda: None) -> Row:
    """One method on one model, both sides by turns.

    Args:
        base: what `random_base` gives for the model.
        size: samples of the batch; None is the workload's own.
        repeats: pairs of steps that count.
        warmup: pairs before them that do not.
        tick: called after each pair.

    Raises:
        ScionError: peft cannot run the method on the model.
    """
    workload, pair = WORKLOADS[model], PAIRS[name]
    if pair.sites == "prompts" and not workload.text:
        raise ScionError(f"{name}: peft's prompts need a transformers model, which {model} is not")
    inputs = workload.batch(size or workload.size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sides = Side(ours(name, base, workload), inputs, workload), Side(theirs(name, base, workload), inputs, workload)
        counts = [side.counts() for side in sides]
        first, second = sides[0].start, sides[1].start
        difference = float((first - second).abs().max() / second.abs().max()) if pair.starts_same else None
        times: list[tuple[float, float]] = []
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            for turn in range(warmup + repeats):
                if turn % 2:
                    b = sides[1].step()
                    a = sides[0].step()
                else:
                    a = sides[0].step()
                    b = sides[1].step()
                if turn >= warmup:
                    times.append((a, b))
                tick()
        finally:
            gc.enable()
            gc.unfreeze()
    ratio, interval = median_of_ratios(np.array(times))
    medians, medians_interval = ratio_of_medians(np.array(times))
    a, b = np.median(np.array(times), axis=0)
    return Row(model, name, ratio, interval, medians, medians_interval, {"ours": float(a), "theirs": float(b)},
               counts[0], counts[1], difference,
               {"batch": size or workload.size, "repeats": repeats, "threads": torch.get_num_threads(),
                "layers": layers_of(base), "load": round(os.getloadavg()[0], 1)})


def ratio_of_medians(times: np.ndarray, resamples: int = 2000) -> tuple[float, tuple[float, float]]:
    """times [pairs, 2] -> the ratio of the two medians, and the middle 95 % of it over resampled pairs."""
    medians = np.median(times[_draws(times, resamples)], axis=1)
    low, high = np.quantile(medians[:, 0] / medians[:, 1], [0.025, 0.975])
    middle = np.median(times, axis=0)
    return float(middle[0] / middle[1]), (float(low), float(high))


def median_of_ratios(times: np.ndarray, resamples: int = 2000) -> tuple[float, tuple[float, float]]:
    """times [pairs, 2] -> the median of the pairs' ratios, and the middle 95 % of it over resampled pairs."""
    ratios = times[:, 0] / times[:, 1]
    low, high = np.quantile(np.median(ratios[_draws(times, resamples)], axis=1), [0.025, 0.975])
    return float(np.median(ratios)), (float(low), float(high))


def _draws(times: np.ndarray, resamples: int) -> np.ndarray:
    """Rows of as many pairs as there are, drawn with repetition: [resamples, pairs]."""
    return np.random.default_rng(0).integers(len(times), size=(resamples, len(times)))


# ------------------------------------------------------------------------------------------------- the page


def machine() -> str:
    """The machine in words: its processor, threads and system."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{processor}, {os.cpu_count()} logical cores, {platform.system()}"


def page(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The Markdown page of these rows."""
    lines = [
        "# A training step beside Hugging Face peft", "",
        "Generated by `python -m benchmarks.training_step`; do not edit.", "",
        f"Machine: {about['machine']}; {about['note']}. " + ", ".join(f"{k} {v}" for k, v in about["versions"].items())
        + ".", "",
        "A step is forward, backward, and AdamW on what is trained; its time is CPU time of the process, not wall "
        "clock. The two sides run by turns in one process, in alternating order, from the same frozen random weights "
        "on the same batch. *Paired* is the median over the pairs of the time of a step here over that in peft, which "
        "hardly feels how fast the machine is at the moment; *medians* is the ratio of the two medians, which does; in "
        f"brackets 95 % of 2,000 resamples of the pairs. `*` marks a paired ratio above {LIMIT} with all of its "
        "interval above 1. Bytes kept for backward and operators (forward and backward) are exact counts by "
        "`core.cost`, without parameters, buffers and the batch. *Start* is the largest difference between the two "
        "outputs before training, over the largest output; methods that start from random values have none.", ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        settings = [row["settings"] for row in mine]
        shown = {key: " or ".join(dict.fromkeys(str(s[key]) for s in settings)) for key in settings[0]}
        lines += [f"## {NAMES[model]}", "",
                  f"{shown['layers']} blocks; a batch of {shown['batch']}, each {WORKLOADS[model].sample}; "
                  f"{shown['repeats']} pairs of steps; threads: {shown['threads']}; load average of the machine, this "
                  f"program included: {min(s['load'] for s in settings)} to {max(s['load'] for s in settings)}. "
                  f"`{about['commands'][model]}`", "",
                  "| method | time, paired | medians | step here, s | kept MiB here | in peft | ratio | operators "
                  "here | in peft | trained here | in peft | start |",
                  "|---|---|---|---|---|---|---|---|---|---|---|---|"]
        for row in sorted(mine, key=lambda row: list(PAIRS).index(row["method"])):
            lines.append(_line(row))
        lines.append("")
    noted = [name for name in PAIRS if PAIRS[name].note and any(row["method"] == name for row in rows)]
    lines += [f"- {name}: {PAIRS[name].note}." for name in noted]
    return "\n".join([*lines, ""])


def _line(row: dict[str, Any]) -> str:
    here, there = row["ours"], row["theirs"]
    (low, high), (least, most) = row["interval"], row["medians_interval"]
    slow = "*" if row["ratio"] > LIMIT and low > 1 else ""
    start = row["start_difference"]
    cells = [row["method"], f"{row['ratio']:.3f}{slow} [{low:.3f}, {high:.3f}]",
             f"{row['medians']:.3f} [{least:.3f}, {most:.3f}]", f"{row['seconds']['ours']:.3f}",
             f"{here['kept_bytes'] / 2**20:.2f}", f"{there['kept_bytes'] / 2**20:.2f}",
             f"{here['kept_bytes'] / there['kept_bytes']:.3f}", f"{here['operators']:,}", f"{there['operators']:,}",
             f"{here['trained']:,}", f"{there['trained']:,}", "" if start is None else f"{start:.0e}"]
    return f"| {' | '.join(cells)} |"


def record(rows: Sequence[Row], file: Path, table: Path, note: str, command: str) -> None:
    """Put rows in the JSON file, in place of older ones of the same model and method, and write the table anew."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": [], "about": {"commands": {}}}
    fresh = {(row.model, row.method): asdict(row) for row in rows}
    kept = [row for row in known["rows"] if (row["model"], row["method"]) not in fresh]
    about = {"machine": machine(), "note": note, "versions": {
        name: version(name) for name in ("torch", "timm", "transformers", "peft")},
        "commands": {**known["about"]["commands"], **{row.model: command for row in rows}}}
    every = json.loads(json.dumps([*kept, *fresh.values()]))
    text = json.dumps({"about": about, "rows": every}, indent=1) + "\n"
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
    write_atomically(table, lambda path: path.write_text(page(every, about), encoding="utf-8"))


# ------------------------------------------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(WORKLOADS), default=["vit_b16", "bert_base"])
    parser.add_argument("--methods", nargs="+", default=None, help="all that peft has on the model, when not given")
    parser.add_argument("--layers", type=int, default=None, help="blocks of the model, for a quick look; all, when not "
                        "given")
    parser.add_argument("--batch", type=int, default=None, help="samples; 2 images or 4 texts, when not given")
    parser.add_argument("--repeats", type=int, default=20, help="pairs of steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="pairs before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="other programs may have run on it", help="what else the machine does")
    parser.add_argument("--json", type=Path, default=DOCS / "speed.json")
    parser.add_argument("--table", type=Path, default=DOCS / "speed.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write both files after each method."""
    given = parse(argv)
    unknown = [name for name in given.methods or () if name not in PAIRS]
    try:
        if unknown:
            raise ScionError(f"{unknown[0]} is no method that both sides have{nearest(unknown[0], PAIRS)}")
        if given.repeats < 1 or given.warmup < 0 or given.threads < 1 or (given.batch is not None and given.batch < 1):
            raise ScionError("--repeats, --batch and --threads must be at least 1, --warmup not negative")
    except ScionError as error:
        print(error, file=sys.stderr)
        return 2
    from tqdm import tqdm

    torch.set_num_threads(given.threads)
    for model in given.model:
        names = [name for name in given.methods or PAIRS
                 if given.methods or WORKLOADS[model].text or PAIRS[name].sites != "prompts"]
        size = given.batch or WORKLOADS[model].size
        command = (f"python -m benchmarks.training_step --model {model} --batch {size} --repeats {given.repeats} "
                   f"--threads {given.threads}" + (f" --layers {given.layers}" if given.layers else ""))
        base = random_base(model, given.layers)
        with tqdm(total=len(names) * (given.warmup + given.repeats), unit="pair", file=sys.stderr) as bar:
            for name in names:
                bar.set_description(f"{model} {name}")
                try:
                    row = measure(model, base, name, size, given.repeats, given.warmup, bar.update)
                except ScionError as error:
                    print(error, file=sys.stderr)
                    return 2
                record([row], given.json, given.table, given.note, command)
                low, high = row.interval
                bar.write(f"{model} {name}: {row.ratio:.3f} [{low:.3f}, {high:.3f}], kept "
                          f"{row.ours['kept_bytes'] / row.theirs['kept_bytes']:.4f}, start {row.start_difference}",
                          file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
