"""The anatomy of a backbone: which module plays which role, so that a method asks for roles and never for paths.

``dissect(model)`` returns an `Anatomy`: blocks in order, and for every role a `Site`, a place where a graft can stand.
A family of models is described by one small function, registered under its class's name (``"module:Class"``, matched
along the class's MRO, so that nothing here imports a model library)::

    @family("my_package.models:MyEncoder")
    def my_encoder(model):
        return Description(
            stem={"embed": "embedding", "norm": "final_norm"}, final="final_norm",
            blocks=[
                BlockDescription(
                    path=f"layers.{i}", dim=model.width, heads=(8, 8, model.width // 8),
                    roles={"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.out", "attend": "attn",
                           "mlp.up": "mlp.0", "mlp.down": "mlp.2", "attention": "attn", "mlp": "mlp",
                           "norm1": "norm1", "norm2": "norm2"},
                )
                for i in range(len(model.layers))
            ],
        )
"""

from core.anatomy.anatomy import Anatomy, Block, Site, Stack, linear_sites, renamed
from core.anatomy.description import FAMILIES, BlockDescription, Describer, Description, Where, family
from core.anatomy.dissect import dissect, parameter_sites
from core.anatomy.layout import NORMS, ROLES, Grid, Heads, Rows, check_layers, check_roles

__all__ = ["FAMILIES", "NORMS", "ROLES", "Anatomy", "Block", "BlockDescription", "Describer", "Description", "Grid",
           "Heads", "Rows", "Site", "Stack", "Where", "check_layers", "check_roles", "dissect", "family",
           "linear_sites", "parameter_sites", "renamed"]
