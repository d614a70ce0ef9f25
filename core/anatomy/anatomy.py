"""A backbone taken apart: its sites, blocks and stacks, as `core.anatomy.dissect` makes them of a description."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from core.anatomy.description import BlockDescription
from core.anatomy.layout import NORMS, Grid, check_layers, check_roles
from core.anatomy.site import Site
from core.errors import ScionError, listed


@dataclass(eq=False)
class Block:
    """One block: its module, its width and place, and its sites by role."""

    index: int
    path: str
    module: nn.Module
    dim: int
    stage: str
    pre_norm: bool
    sites: dict[str, Site]
    described: BlockDescription
    entry: Site | None = None
    """What is between the block before and this one (a downsampling)."""

    @property
    def grid(self) -> Grid | None:
        """How its tokens lie, where they are a grid."""
        return self.described.grid

    @property
    def causal(self) -> bool:
        """Whether its tokens see only those before them."""
        return self.described.causal

    def into(self, sublayer: str) -> Site:
        """The site whose input is what a sublayer (``attention``, ``cross.attention``, ``mlp``) reads, behind a norm
        before it."""
        if sublayer == "mlp":
            return self.sites["mlp.up"]
        call = sublayer.replace("attention", "attend")
        if call in self.sites:
            return self.sites[call]
        # Where attention is not torch's call there is no such site, but the values' map reads the same states (the maps
        # of queries and keys may read relative positions besides), and across stacks the queries' map.
        return self.sites["v" if sublayer == "attention" else "cross.q"]

    def beside(self, sublayer: str) -> Site:
        """The site whose input is the residual stream that a sublayer's output is added to."""
        # Where attention and MLP run side by side behind one norm (CodeGen), it is the MLP's too.
        norms = {"attention": ("norm1",), "cross.attention": ("cross.norm",), "mlp": ("norm2", "norm1")}[sublayer]
        found = [self.sites[norm] for norm in norms if norm in self.sites]
        if self.pre_norm and found:
            return found[0]
        return self.into(sublayer)


@dataclass(eq=False)
class Stack:
    """Blocks that run one after the other from an embedding to a final state: an encoder, a decoder."""

    name: str
    blocks: list[Block]
    final: Site | None
    """The norm after the last block; None where the last block's output is the final state."""
    text: Site | None = None
    """The module that takes token ids as ``input_ids`` or their embeddings as ``inputs_embeds``, where there is one."""


@dataclass(eq=False)
class Anatomy:
    """What a method may know about a backbone."""

    root: nn.Module
    family: str
    blocks: list[Block]
    stacks: list[Stack]
    """The blocks by the stack that they belong to, in the order in which the stacks run."""
    stem: dict[str, list[Site]]
    """Sites outside the blocks, by role; a role may be played more than once (``downsample``, ``norm``)."""
    inputs: Site
    """The described model itself, where its inputs arrive: each of its forwards begins here."""

    @property
    def stages(self) -> list[list[Block]]:
        """The blocks by stage, in order; one list where there are no stages."""
        found: dict[str, list[Block]] = {}
        for block in self.blocks:
            found.setdefault(block.stage, []).append(block)
        return list(found.values())

    @property
    def roles(self) -> dict[str, int]:
        """Each role that this backbone has, with the number of its sites."""
        counts: dict[str, int] = {}
        for site in self.all_sites():
            counts[site.role] = counts.get(site.role, 0) + 1
        return counts

    def linear_roles(self) -> list[str]:
        """Roles in the blocks that are linear maps; of a fused projection the whole, not its parts."""
        roles: dict[str, None] = {}  # a set that keeps the order
        for block in self.blocks:
            for site in block.sites.values():
                # A sublayer's output may be played by a linear map, which then has a role as a map besides.
                if site.kind != "module" and site.role not in ("attention", "mlp"):
                    roles[site.role] = None
        parts = ("q", "k", "v") if "qkv" in roles else ()
        return [role for role in roles if role not in parts]

    def all_sites(self) -> Iterator[Site]:
        """Every site, stem first, then block by block."""
        for sites in self.stem.values():
            yield from sites
        for block in self.blocks:
            yield from block.sites.values()

    def sites(self, roles: str | Iterable[str], layers: Sequence[int] | None = None, asker: str = "") -> list[Site]:
        """The sites of the given roles, in the order of the blocks.

        Args:
            roles: one role or several; each must exist.
            layers: block indices to keep (negative counts from the end); None keeps all. Sites outside blocks are
                kept either way.
            asker: who asks, for the message.

        Raises:
            ScionError: a role or a block that does not exist; the message lists what does.
        """
        wanted = [roles] if isinstance(roles, str) else list(roles)
        staged = self._staged()
        who = f"{asker}: " if asker else ""
        if not wanted:
            raise ScionError(f"{who}targets is empty; {self.family} has the roles {listed(self.roles, 40)}")
        unstaged = [role for role in wanted if role not in staged]
        check_roles(unstaged, self.roles, self.family, asker)
        keep = self.layer_indices(layers, asker)
        found: list[Site] = []
        for role in wanted:
            found += self.stem.get(role, [])
        for block in self.blocks:
            if block.index in keep:
                # One site where both "q" and "decoder.q" ask for it.
                here = dict.fromkeys(role.removeprefix(f"{block.stage}.") for role in wanted)
                found += [block.sites[role] for role in here if role in block.sites]
        if not found:
            raise ScionError(f"{who}targets {wanted} match nothing in the layers {sorted(keep)} of {self.family}")
        return found

    def paths(self, roles: Sequence[str], asker: str = "") -> list[str]:
        """Paths of all modules that play these roles, for those that are to be left out; none without a role."""
        found: list[str] = []
        for site in self.sites(roles, None, asker) if roles else []:
            found.append(site.path)
            for path, part in site.whole:
                found += [f"{path}.{name}" if name else path for name, _ in part.named_modules()]
        return found

    def _staged(self) -> set[str]:
        """The roles with a stage before them, where blocks have one."""
        found: set[str] = set()
        for block in self.blocks:
            if block.stage:
                found.update(f"{block.stage}.{role}" for role in block.sites)
        return found

    def block_of(self, name: str) -> int | None:
        """Index of the block that holds the parameter ``name``; None where it lies outside of them."""
        for block in self.blocks:
            if name.startswith(f"{block.path}."):  # with the dot, so that layer 1 is not taken for layer 10
                return block.index
        return None

    def layer_indices(self, layers: Sequence[int] | None, asker: str = "") -> set[int]:
        """Block indices, negative ones counted from the end; None means all."""
        return check_layers(layers, len(self.blocks), self.family, asker)

    def head_names(self) -> set[str]:
        """Names of the parameters of the task head; a language model's head is not among them."""
        names: set[str] = set()
        for site in self.stem.get("head", []):
            names.update(site.parameter_names)
        return names

    @property
    def size(self) -> int:
        """Number of the model's parameters, a task head included, without those that methods have added."""
        return sum(p.numel() for name, p in self.root.named_parameters() if not name.startswith("peft."))

    def norm_names(self) -> set[str]:
        """Names of all parameters of norms."""
        names: set[str] = set()
        for site in self.all_sites():
            if site.role in NORMS:
                names.update(site.parameter_names)
        return names


def linear_sites(anatomy: Anatomy) -> dict[str, Site]:
    """Sites with a weight that is a linear map, by name."""
    return {site.name: site for site in anatomy.all_sites() if site.kind != "module"}


def renamed(site: Site, **changes: Any) -> Site:
    """A copy of a site with other fields."""
    return replace(site, **changes)
