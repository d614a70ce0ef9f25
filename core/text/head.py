"""A text model's own language-model head: which parameters it has, and whether it shares some with the embedding."""

from __future__ import annotations

from typing import Any

from torch import nn

from core.anatomy import Site, dissect
from core.errors import ScionError, listed


class LanguageHead:
    """The language-model head of a backbone, as its description names it: transform, bias and map to the vocabulary.

    Args:
        backbone: with the model of transformers in ``model``.

    Raises:
        ScionError: it has none.
    """

    def __init__(self, backbone: nn.Module) -> None:
        sites = dissect(backbone).stem.get("lm_head", ())
        if not sites:
            raise ScionError(f"model.task.head: {type(backbone).__name__} has no language-model head that could be "
                             "trained; take a backbone with one (head: true for a text encoder)")
        self.backbone = backbone
        self.projection: nn.Module = sites[0].module
        """The map to the vocabulary."""
        self.modules = [module for site in sites for part in _parts(site) for module in part.modules()]

    def shared(self) -> list[str]:
        """Names of the head's parameters that are others' too: an embedding's, in most models."""
        own = {id(module) for module in self.modules}
        elsewhere: set[int] = set()
        for module in self.backbone.modules():
            if id(module) not in own:
                elsewhere.update(id(parameter) for parameter in module.parameters(recurse=False))
        found = []
        for name, parameter in self.backbone.named_parameters():
            if id(parameter) in elsewhere and any(parameter is one for one in self._parameters()):
                found.append(name)
        return found

    def untie(self) -> None:
        """Give the map to the vocabulary a weight and a bias of its own, with the values that they have."""
        for name, parameter in self.projection.named_parameters(recurse=False):
            copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            self.projection.register_parameter(name, copy)
        config: Any = self.backbone.model.config  # type: ignore[union-attr]
        # T5 takes a scale of its states from this word, and ties by the values in a file.
        if not hasattr(config, "scale_decoder_outputs"):
            config.tie_word_embeddings = False

    def names(self) -> tuple[str, ...]:
        """Names, in the backbone, of the parameters that the head computes with.

        A bias that a wrapper of the map keeps under another name, as BERT's does, is the map's own or else without any
        effect.
        """
        bias = getattr(self.projection, "bias", None)
        own = {id(parameter) for parameter in self._parameters()}
        found = []
        for name, parameter in self.backbone.named_parameters():
            is_left_over = bias is not None and parameter is not bias and parameter.shape == bias.shape
            if id(parameter) in own and not is_left_over:
                found.append(name)
        return tuple(found)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules for parameter in module.parameters(recurse=False)]


def open_head(backbone: nn.Module, untie: bool) -> tuple[str, ...]:
    """The names of the parameters of a backbone's own head, for training.

    Args:
        backbone: to which no method is attached yet.
        untie: give the head's map to the vocabulary a weight of its own first.

    Raises:
        ScionError: there is no head, it is tied and stays so, or a method is attached already.
    """
    if hasattr(backbone, "peft"):
        raise ScionError("model.task.head: methods are attached already; make the FineTuner first, then attach them")
    head = LanguageHead(backbone)
    shared = head.shared()
    if shared and not untie:
        raise ScionError(f"model.task.head: train would move {listed(shared, 2)} too, which "
                         f"{type(backbone.model).__name__} shares with its head; set untie: true, and the head gets a "
                         "copy of its own")
    if untie:
        head.untie()
    return head.names()


def _parts(site: Site) -> list[nn.Module]:
    """The modules of a head: those around its map to the vocabulary, where it has some."""
    return [part for _, part in site.whole] or [site.module]
