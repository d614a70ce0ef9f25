"""The keys of a configuration, with a line each."""

from __future__ import annotations

KEYS = {
    "model.backbone": "the frozen network: a class of the domain, with arguments",
    "model.task": "the head and its loss: a class, with arguments (default Classification)",
    "model.checkpointing": "whether activations are recomputed in backward instead of kept",
    "data": "the datamodule: a class of the domain, with arguments",
    "peft": "the method, or a list of methods: a class of `lightning methods`, with arguments",
    "callbacks": "other callbacks of Lightning's Trainer, in order: classes of core.callbacks, the domain or Lightning",
    "loggers": "what writes down what is logged: classes of Lightning, with arguments (default TensorBoardLogger)",
    "optimizer": "the optimizer, by its name in torch.optim",
    "lr_scheduler": "the learning rate over the run, step by step",
    "trainer": "arguments of Lightning's Trainer, and checkpoint_every_n_steps",
    "seed_everything": "the seed of everything that is drawn (default 0)",
    "select": "the weights that are tested and kept: last, or best by validation (default last)",
    "stages": "fits that follow each other: {NAME: {what this one has otherwise, and start, carry, objective, repeat}}",
    "over": "axes of a table: {KEY: [values]}",
    "per": "settings that go with a value of another key: {KEY: {VALUE: {KEY: VALUE}}}",
    "run_dir": "the folder of the run",
    "domain": "where bare names of classes are looked up (default: the folder of the file)",
}

OF_STAGE = {
    "start": ("previous | base | STAGE", "previous", "whose result it begins with: the stage before it, none, or an "
              "earlier one by its name"),
    "carry": ("list[weights | head]", ["weights", "head"], "what it takes of that: the methods' tensors and masks, and "
              "the head; a head of another shape is left behind, and refused where this key is written"),
    "objective": ("task | method | none", "task", "what it trains on: the task's loss, what its methods add to it, or "
                  "nothing: methods compute what they compute from data, and are saved"),
    "repeat": ("int", 1, "how often it is fitted, one time after the other, as NAME.1, NAME.2, ..."),
}
"""What a stage has beside the keys of a run: type, default and meaning."""


def keys_text() -> str:
    """A line for each key."""
    width = max(map(len, KEYS))
    return "\n".join(f"  {key:{width}}  {text}" for key, text in KEYS.items())
