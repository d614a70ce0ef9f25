"""``lightning roles``: which roles a model has, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.cli.failures import says_what_failed
from core.cli.models import shapes_of

if TYPE_CHECKING:
    from core.anatomy import Anatomy, Site


@says_what_failed
def roles(model: str) -> int:
    """Print which roles a model has and which modules play them, from its shapes alone.

    Args:
        model: a name that one domain's backbone knows, ``audio:AST:nano`` where several do, a timm name, a folder with
            config.json, or a transformers id in the cache.
    """
    from core.anatomy import dissect  # start-up time

    anatomy = dissect(shapes_of(model))
    blocks = f"{len(anatomy.blocks)} blocks" if len(anatomy.blocks) != 1 else "1 block"
    print(f"{model}: {anatomy.family}, {blocks}")
    print("\n".join(role_table(anatomy)))
    return 0


def role_table(anatomy: Anatomy) -> list[str]:
    """One line for each role: number of sites, first and last module, shape, what stands there."""
    from core.anatomy import ROLES  # start-up time
    from core.report import aligned  # start-up time

    places: dict[str, list[Site]] = {}
    for site in anatomy.all_sites():
        places.setdefault(site.role, []).append(site)
    body = []
    # in the order of the table of roles; a role that is not in it comes last
    for role in sorted(places, key=lambda role: [*ROLES, role].index(role)):
        sites = places[role]
        first = sites[0].path or "(itself)"  # the model itself has an empty path
        last = sites[-1].path if len(sites) > 1 else ""
        shapes = list(dict.fromkeys(map(_shape, sites)))
        shape = shapes[0] if len(shapes) == 1 else f"{shapes[0]} .. {shapes[-1]}"
        body.append([role, str(len(sites)), first, last, shape, ROLES.get(role, "")])
    return aligned(["role", "sites", "first module", "last module", "shape", "what stands there"], body, left=6)


def _shape(site: Site) -> str:
    """The shape of what is at a site: of its weight, its heads or its hidden state."""
    if site.kind == "conv":
        return str(list(site.full_weight.shape))
    if site.kind != "module":
        return f"[{site.out_features}, {site.in_features}]"
    if site.role == "attend" and site.heads is not None:
        keys = f" ({site.heads.key} of keys)" if site.heads.key != site.heads.query else ""
        return f"{site.heads.query} heads{keys} x {site.heads.width}"
    weight = getattr(site.module, "weight", None)
    if weight is not None:
        return str(list(weight.shape))
    return f"hidden {site.width}" if site.width else type(site.module).__name__
