"""Bone and Bat, as Hugging Face peft writes them."""

from __future__ import annotations

from typing import Any

from core.adapters.huggingface.form import Inexpressible, PeftForm
from core.method import PEFTMethod
from core.peft.weights.bone import Bat, Bone


class BoneForm(PeftForm):
    """peft calls the method MiSS, and says by ``init_weights`` which form it is."""

    types = {"init_weights": bool | str | None, "mini_r": int}

    def matches(self, config: dict[str, Any]) -> bool:
        # true and false are two starts of Bone, "mini" is Bone with fewer columns.
        return config.get("init_weights") != "bat"

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        config: dict[str, Any] = {"r": method.config["rank"]}
        columns = method.config["columns"]
        if columns is None:
            config["init_weights"] = True
        else:
            config["init_weights"] = "mini"
            config["mini_r"] = columns
        return config

    def arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        # Other forms have mini_r as well, and do not use it.
        columns = config["mini_r"] if config.get("init_weights") == "mini" else None
        return {"rank": config["r"], "columns": columns}


class BatForm(PeftForm):
    """peft has only the grouping by outputs."""

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        if method.config["group"] != "outputs":
            raise Inexpressible(f"{method.name}: group 'inputs' is none that peft has; it has 'outputs'")
        return super().config(method)


FORMS = {
    Bone: BoneForm("MISS", {"rank": "r"}, {"miss_block": "D"}, training=("init_weights", "mini_r", "miss_dropout")),
    Bat: BatForm("MISS", {"rank": "r"}, {"miss_block": "Q"}, fixed={"init_weights": "bat"},
        training=("mini_r", "miss_dropout")),
}
