"""FourierFT, as Hugging Face peft writes it."""

from __future__ import annotations

from core.adapters.huggingface.form import PeftForm
from core.peft.weights.fourierft import FourierFT

FORMS = {
    FourierFT: PeftForm("FOURIERFT", {"frequencies": "n_frequency", "scale": "scaling", "places": "random_loc_seed"},
        {"fourierft_spectrum": "c"}, training=("init_weights",),
        patterns={"n_frequency_pattern": "n_frequency"}, modules=("linear", "conv1d")),
}
