"""LoHa, as Hugging Face peft writes it."""

from __future__ import annotations

from core.adapters.huggingface.form import PeftForm
from core.peft.weights.loha import LoHa

FORMS = {
    LoHa: PeftForm("LOHA", {"rank": "r", "alpha": "alpha"},
        {"hada_w1_a": "B_1", "hada_w1_b": "A_1", "hada_w2_a": "B_2", "hada_w2_b": "A_2"},
        training=("rank_dropout", "module_dropout", "init_weights"),
        patterns={"rank_pattern": "r", "alpha_pattern": "alpha"}, modules=("linear", "conv")),
}
