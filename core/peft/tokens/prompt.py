"""Learned tokens before the input: prompt tuning (Lester et al. 2021, arXiv:2104.08691) and P-tuning (Liu et al. 2021,
arXiv:2103.10385)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site, Stack
from core.errors import ScionError
from core.method import PEFTMethod
from core.method.options import at_least
from core.peft.tokens._sequence import Prompted, PromptGraft, Values

COUNTS = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
"""What peft says of the model, and of a prompt's size."""


class PromptTuning(Prompted, PEFTMethod):
    """Learned embeddings before those of the input.

    Equation: the model reads [P; E(x)], P [tokens, dim]
    Trains: tokens x dim of the embedding; ViT-B/16 or BERT-base, 20 tokens: 15,360
    Merges: no, they are tokens of the sequence
    Source: Lester et al. 2021, arXiv:2104.08691. Positions of the input move on by the prompts, as the embeddings were
        there; the final state is that of the input alone. An encoder's prompts are read by its decoder too. In images
        and sounds they stand behind the special tokens, as VPT's. The learning rate of the paper, 0.3 with Adafactor,
        is from memory; recommended here is that of prompts in PETL-AST

    Args:
        tokens: learned tokens, at least 1.
        init: ``vocabulary`` starts at the embeddings of random ids (where there are ids, else as ``normal``),
            ``normal`` draws from a normal of 0.02.
    """

    tags = ("additive", ("tokens",))
    recommended = {"lr": 1e-2, "weight_decay": 0.0}

    def __init__(self, tokens: int = 20, init: Literal["vocabulary", "normal"] = "vocabulary", **common: Any) -> None:
        super().__init__(**common)
        at_least(1, "PromptTuning", tokens=tokens)
        if init not in ("vocabulary", "normal"):
            raise ScionError(f"PromptTuning: init {init!r} is not one of vocabulary, normal")
        self.tokens, self.init = tokens, init

    def prompt_for(self, stack: Stack, dim: int, table: nn.Embedding | None) -> tuple[Tensor | None, Values | None]:
        if self.init == "vocabulary" and table is not None and not table.weight.is_meta:
            ids = torch.randint(table.num_embeddings, (self.tokens,)).to(table.weight.device)
            with torch.no_grad():
                return table.forward(ids).clone(), None  # Gemma's embedding scales what it reads
        return torch.randn(self.tokens, dim) * 0.02, None


class PromptEncoder(nn.Module):
    """A table e [tokens, dim] and what makes prompts of it: an MLP, or a bidirectional LSTM (two layers) and an MLP."""

    def __init__(self, tokens: int, dim: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tokens, dim))
        self.lstm = nn.LSTM(dim, hidden, 2, batch_first=True, bidirectional=True) if kind == "lstm" else None
        widths = (dim, hidden, hidden) if self.lstm is None else (2 * hidden, 2 * hidden)
        layers: list[nn.Module] = []
        for one, other in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(one, other), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], dim))

    def forward(self) -> Tensor:
        """The prompts [tokens, dim]."""
        if self.lstm is None:
            return self.mlp(self.embedding)
        with torch.autocast(self.embedding.device.type, enabled=False):  # CPUs have no LSTM in float16
            return self.mlp(self.lstm(self.embedding[None])[0][0])


class PTuning(Prompted, PEFTMethod):
    """Learned tokens before the input, made by a small network that is thrown away after training.

    Equation: the model reads [P; E(x)], P = MLP(e) with three maps and two ReLU between them, or P = MLP(LSTM(e)) with
        two bidirectional layers and two maps; e [tokens, dim]
    Trains: tokens x dim and the network; ViT-B/16 or BERT-base, 20 tokens, hidden 768: MLP 1,787,136, LSTM 27,174,144;
        folded 15,360
    Merges: no, they are tokens of the sequence; `fold` leaves the prompts alone
    Source: Liu et al. 2021, arXiv:2103.10385; the layers are those of Hugging Face peft's prompt encoder. The learning
        rate is that of prompts in PETL-AST

    Args:
        tokens: learned tokens, at least 1.
        encoder: ``mlp`` or ``lstm``; torch.compile follows the latter where ``torch._dynamo.config.allow_rnn`` is set.
        hidden: its inner width; None is the embedding's.
    """

    tags = ("additive", ("tokens",))
    recommended = {"lr": 1e-2, "weight_decay": 0.0}
    structure_types = {"folded": bool}

    def __init__(self, tokens: int = 20, encoder: Literal["mlp", "lstm"] = "mlp", hidden: int | None = None,
                 **common: Any) -> None:
        super().__init__(**common)
        at_least(1, "PTuning", tokens=tokens, hidden=hidden)
        if encoder not in ("mlp", "lstm"):
            raise ScionError(f"PTuning: encoder {encoder!r} is not one of mlp, lstm")
        self.tokens, self.encoder, self.hidden = tokens, encoder, hidden
        self.folded = False

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        return {**super().numbers(anatomy), "folded": False}

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        self.encoders: dict[str, PromptEncoder] = {}
        for site in sites:
            role, stack, what = self.roles_of[site.name]
            if role == "text" or (role == "state" and what[0]):
                dim = (site.module.get_input_embeddings().weight.shape[1] if role == "text"  # type: ignore[operator]
                       else site.width)
                made = PromptEncoder(self.tokens, dim, self.hidden or dim, self.encoder)
                self.encoders[stack.name] = made
                module.add_module(f"encoder_{stack.name}" if stack.name else "encoder", made)

    def prompt_for(self, stack: Stack, dim: int, table: nn.Embedding | None) -> tuple[Tensor | None, Values | None]:
        return None, self.encoders[stack.name]

    def fold(self) -> None:
        """Replace the network by the prompts that it makes: the same function, with tokens x dim numbers to store."""
        if self.folded:
            return
        for graft in self.grafts:
            if isinstance(graft, PromptGraft) and graft.made[0] is not None:
                graft.prompt = nn.Parameter(graft.values().detach().clone(), requires_grad=self.is_trained)
                graft.made = [None]
        for name in [name for name, child in self.module.named_children() if isinstance(child, PromptEncoder)]:
            delattr(self.module, name)
        self.encoders, self.folded = {}, True

    def structure(self) -> dict[str, Any]:
        return {"folded": self.folded}

    def restructure(self, structure: dict[str, Any]) -> None:
        if structure.get("folded"):
            self.fold()
