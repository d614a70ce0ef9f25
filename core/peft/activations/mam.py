"""MAM: a prefix in attention and a parallel adapter at the MLP (He et al. 2021, arXiv:2110.04366)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod
from core.peft.activations.parallel import Input, ParallelAdapter
from core.peft.tokens.prefix import PrefixTuning


class MAM(PrefixTuning, PEFTMethod):
    """Mix-and-match: a short prefix in every attention, and a wide scaled adapter beside every MLP.

    Equation: softmax(q [P_k; K]^T / sqrt(width)) [P_v; V], P = W2 tanh(W1 e + b1) + b2; and
        y <- MLP(x) + s (U relu(D x + b_D) + b_U), s = 4
    Trains: PrefixTuning's numbers and ParallelAdapter's; BERT-base: 22,493,984, of which `fold` leaves 7,644,672
    Merges: no, it adds keys to the attention
    Source: He et al. 2021, arXiv:2110.04366, section 4.6 (on GLUE: 16 tokens, bottleneck 16, scale 2), whose learning
        rate this is. Their code reads the residual stream before a pre-norm block's norm

    Args:
        tokens: learned positions a layer, at least 1.
        reparametrize: hidden width of the prefixes' MLP; False trains them as they are. ``fold`` replaces it by its
            output.
        reduction: the bottleneck is the block's width divided by this, rounded.
        bottleneck: its width, at least 1; None leaves it to ``reduction``.
        scale: s, or ``learned``.
        input: ``residual``, or ``normed``: what the MLP reads.
        dropout: of the learned keys and values.
        targets: attentions that get a prefix; None is all that there are, a decoder's cross-attention too.
        init: of the adapter: ``zero_up`` starts as the identity, ``normal`` draws both maps from a normal of 0.02.
    """

    tags = ("hybrid", ("block", "tokens"))
    peft = None
    inference_cost = "every attention reads `tokens` more keys and values, and a bottleneck stays beside each MLP"
    recommended = {"lr": 1e-4, "weight_decay": 0.1, "head_lr": 1e-3}

    def __init__(self, tokens: int = 30, reparametrize: bool | int = 800, reduction: float = 2,
                 bottleneck: int | None = None, scale: float | Literal["learned"] = 4.0, input: Input = "residual",
                 dropout: float = 0.0, targets: Sequence[str] | None = None,
                 init: Literal["zero_up", "normal"] = "zero_up", **common: Any) -> None:
        every = ("attend", "cross.attend")
        super().__init__(tokens, reparametrize, dropout, every if targets is None else targets, **common)
        self.all_attentions = tuple(self.targets) == every  # as the first stored adapters have it
        try:
            self.adapter = ParallelAdapter(reduction, bottleneck, scale, input=input, init=init, name=self.name,
                                           layers=self.layers)
        except ScionError as error:
            raise ScionError(f"MAM: its {error}") from None

    def sites(self, anatomy: Anatomy) -> list[Site]:
        attentions = [role for role in self.targets if role in anatomy.roles or not self.all_attentions]
        return [*anatomy.sites(attentions, self.layers, self.name), *self.adapter.sites(anatomy)]

    def build(self, site: Site) -> Graft:
        return self.adapter.build(site) if site.role == "mlp" else super().build(site)
