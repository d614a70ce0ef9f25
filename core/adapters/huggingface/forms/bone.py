"""Bone and Bat, as Hugging Face peft writes it."""

from __future__ import annotations

from typing import Any

from core.adapters.huggingface.form import Inexpressible, PeftForm
from core.method import PEFTMethod
from core.peft.weights.bone import Bat, Bone


class BoneForm(PeftForm):
    """peft calls the method MiSS; its ``init_weights`` says which form."""

    types = {"init_weights": bool | str | None, "mini_r": int}

    def matches(self, config: dict[str, Any]) -> bool:
        return config.get("init_weights") != "bat"

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        columns = method.config["columns"]
        return {"r": method.config["rank"], **({"init_weights": True} if columns is None else
                                               {"init_weights": "mini", "mini_r": columns})}

    def arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"rank": config["r"], "columns": config["mini_r"] if config.get("init_weights") == "mini" else None}


class BatForm(PeftForm):
    """peft has the grouping by outputs alone."""

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        if method.config["group"] != "outputs":
            raise Inexpressible(f"{method.name}: group 'inputs' is none that peft has; it has 'outputs'")
        return super().config(method)


FORMS = {
    Bone: BoneForm("MISS", {"rank": "r"}, {"miss_block": "D"}, training=("init_weights", "mini_r", "miss_dropout")),
    Bat: BatForm("MISS", {"rank": "r"}, {"miss_block": "Q"}, fixed={"init_weights": "bat"},
        training=("mini_r", "miss_dropout")),
}
