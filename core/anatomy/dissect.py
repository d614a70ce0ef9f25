"""From a model and the description of its family to its `Anatomy`, with all that can be checked of a description."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from core.anatomy import families, torch_attention  # noqa: F401  (families enter the table)
from core.anatomy.anatomy import Anatomy, Block, Site, Stack
from core.anatomy.description import FAMILIES, LANGUAGE_HEADS, BlockDescription, Describer, Description, class_names
from core.anatomy.layout import NORMS, ROLES, Heads, Rows
from core.errors import ScionError, listed, nearest


def _describer(module: nn.Module) -> tuple[str, Describer] | None:
    """The family that describes this module, by its class's name, and the function that does."""
    for name in class_names(module):
        if name in FAMILIES:
            return name.rpartition(":")[2], FAMILIES[name]
    return None


def _find(model: nn.Module) -> tuple[str, nn.Module]:
    """The described module nearest to the root: the model itself, or the one inside a wrapper."""
    level = [("", model)]
    while level:
        found = [(path, module) for path, module in level if _describer(module)]
        if len(found) == 1:
            return found[0]
        if found:
            paths = listed(path for path, _ in found)
            raise ScionError(f"{type(model).__name__} holds several backbones ({paths}): give attach one of them, or "
                             "name it with on=...")
        level = _next_level(level)
    raise _unknown(model)


def _next_level(level: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The children of these modules, with their paths."""
    children = []
    for path, module in level:
        for name, child in module.named_children():
            if name != "peft":  # what methods have attached
                children.append((_joined(path, name), child))
    return children


def _unknown(model: nn.Module) -> ScionError:
    """The error that asks for a description of a model."""
    known = sorted({name.rpartition(":")[2] for name in FAMILIES})
    inner = _unwrapped(model)
    kind = type(inner).__name__
    around = "" if inner is model else f" (in {type(model).__name__})"
    class_name = class_names(inner)[0]
    return ScionError(f"the anatomy of {kind}{around} is unknown (known: {listed(known, 40)}); describe it in a few "
                      f"lines with @core.anatomy.family({class_name!r}), see docs/families.md")


def _unwrapped(model: nn.Module) -> nn.Module:
    """What a wrapper of one module is around: a library's model in a domain's backbone, or in the user's own module."""
    inner = model
    while True:
        children = [child for name, child in inner.named_children() if name != "peft" and _has_parameters(child)]
        own = next(inner.parameters(recurse=False), None) is not None
        if len(children) != 1 or own:
            return inner
        # A user's class around one of torch's own modules is the model itself, not a wrapper of it.
        if type(children[0]).__module__.startswith("torch.nn."):
            return inner
        inner = children[0]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


_BESIDE = {"lm_head": "lm_head", "cls": "lm_head", "embed_out": "lm_head",
           "text_projection": "projection", "visual_projection": "projection"}
"""What is beside a backbone in a library's own wrapper and comes pretrained with it: name -> role."""


def _role_beside(wrapper: nn.Module, name: str, projection: str) -> str:
    """The role of a wrapper's child beside the backbone, where ``projection`` is the path to the vocabulary's map."""
    if name in _BESIDE:
        return _BESIDE[name]
    parts: set[str] = {projection.partition(".")[0]}  # the child that is the map, or holds it
    for class_name in class_names(wrapper):
        parts.update(LANGUAGE_HEADS.get(class_name, ()))
    return "lm_head" if name in parts else "head"


def _wrappers(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The wrappers around a backbone, with their paths, from the root inwards."""
    parts = path.split(".") if path else []
    for depth in range(len(parts)):
        wrapper_path = ".".join(parts[:depth])
        yield wrapper_path, model.get_submodule(wrapper_path)


def _projection(wrapper: Any) -> str:
    """Path, from a language model, of its map to the vocabulary, where the model says which module that is."""
    if not hasattr(wrapper, "get_output_embeddings"):
        return ""
    output = wrapper.get_output_embeddings()
    for path, module in wrapper.named_modules():
        # DeBERTa's newer head multiplies by the embedding itself, and names a map that leads elsewhere.
        if module is output and len(module.weight) == len(wrapper.get_input_embeddings().weight):
            return path
    return ""


_INTERNAL = ("inputs", "entry")
"""Roles of sites that no method asks for by name."""


def _check(site: Site, family: str) -> None:
    """Refuse what a description says of a site, where the model shows that it cannot be so."""
    who = f"the description of {family} has"
    if site.role not in ROLES and site.role not in _INTERNAL:
        raise ScionError(f"{who} {site.name}, but there is no role {site.role!r}{nearest(site.role, ROLES)}; the roles "
                         "are listed in docs/families.md")
    _check_rows(site, who)
    _check_heads(site, who)


def _check_rows(site: Site, who: str) -> None:
    """Refuse rows that the site's weight does not have."""
    if site.rows is None:
        return
    rows = site.rows.stop if site.rows.index is None else 1 + max(site.rows.index)
    whole = 0 if site.kind == "module" else site.full_weight.shape[site.out_axis]
    if rows > whole:
        raise ScionError(f"{who} {site.name} at row {rows - 1} of {site.path}, which has {whole} rows")


def _check_heads(site: Site, who: str) -> None:
    """Refuse heads that a map of queries, keys or values is not wide enough for, or too wide."""
    if site.heads is None:
        return
    if site.kind == "module" or site.role.rpartition(".")[2] not in ("q", "k", "v"):
        return
    width = site.heads.width
    heads = site.heads.query if site.role.endswith("q") else site.heads.key
    if site.out_features != heads * width:
        raise ScionError(f"{who} {heads} heads of {width} at {site.name}, but {site.path} gives {site.out_features} "
                         f"numbers, not {heads * width}")


def dissect(model: nn.Module) -> Anatomy:
    """The anatomy of ``model``: a described backbone, or a module that wraps exactly one.

    Raises:
        ScionError: no description fits the model or anything inside it.
    """
    return _Dissection(model).anatomy()


class _Dissection:
    """One model being taken apart."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.path, backbone = _find(model)
        """Where the described backbone is in the model."""
        found = _describer(backbone)
        assert found is not None
        self.family, describe = found
        self.description: Description = describe(backbone)
        # A module under two names (tied embeddings) has two paths, and a description may use either.
        self.modules = dict(model.named_modules(remove_duplicate=False))

    def anatomy(self) -> Anatomy:
        """All parts of the model; the first that does not fit its description is refused."""
        stem = self.stem()
        blocks = [self.block(index, block) for index, block in enumerate(self.description.blocks)]
        stacks = self.stacks(blocks)
        inputs = self.site("inputs", "inputs", self.path)
        return Anatomy(root=self.model, family=self.family, blocks=blocks, stacks=stacks, stem=stem, inputs=inputs)

    def site(self, name: str, role: str, *path: str, rows: Rows | None = None, **fields: Any) -> Site:
        """The site of this name and role at a path that is given in parts, checked against the model."""
        full = _joined(*path)
        module = self.modules.get(full)
        if module is None:
            hint = nearest(full, self.modules)
            raise ScionError(f"the description of {self.family} has {name} at {full!r}, where there is no module{hint}")
        is_input_map = role.rpartition(".")[2] in ("q", "k", "v", "qkv")
        if is_input_map and isinstance(module, nn.MultiheadAttention):
            if not torch_attention.is_attention(module):
                kind = type(module).__name__
                raise ScionError(f"{full} ({kind}) has maps of several widths, or keys of its own: {name} cannot be "
                                 "adapted there")
            # torch's attention never calls its fused map as a module: it multiplies by this parameter.
            fields["parameter"] = "in_proj_weight"
            fields["by_weight"] = True
        described = fields.get("while_active", ())
        of_torch = torch_attention.settings(self.modules, full)
        fields["while_active"] = (*described, *of_torch)
        offset = self.description.norm_offset if role in NORMS else 0.0
        site = Site(name=name, role=role, path=full, module=module, rows=rows, offset=offset, **fields)
        _check(site, self.family)
        return site

    # --------------------------------------------------------------------------------- the stem

    def stem(self) -> dict[str, list[Site]]:
        """The sites outside the blocks, by role."""
        stem: dict[str, list[Site]] = {}
        for role, paths in self.description.stem.items():
            paths = [paths] if isinstance(paths, str) else paths
            for number, path in enumerate(paths):
                name = role if len(paths) == 1 else f"{role}.{number}"
                site = self.site(name, role, self.path, path)
                stem.setdefault(role, []).append(site)
        for wrapper_path, wrapper in _wrappers(self.model, self.path):
            self._add_heads(stem, wrapper_path, wrapper)
        stem["feature"] = [Site(name="feature", role="feature", path="", module=self.model)]
        return stem

    def _add_heads(self, stem: dict[str, list[Site]], path: str, wrapper: nn.Module) -> None:
        """What is beside the backbone in a wrapper is its head: a task's, or a pretrained language model's."""
        inside = self.path[len(path):].lstrip(".")
        backbone = inside.partition(".")[0]  # the wrapper's child that is the backbone, or holds it
        projection = _projection(wrapper)
        parts: list[str] = []  # of a language-model head
        for name, child in wrapper.named_children():
            if name in ("peft", backbone) or not _has_parameters(child):
                continue
            role = _role_beside(wrapper, name, projection)
            if role == "lm_head":
                parts.append(name)
            else:
                stem.setdefault(role, []).append(self.site(name, role, path, name))
        for site in self._language_heads(path, parts, projection):
            stem.setdefault("lm_head", []).append(site)

    def _language_heads(self, path: str, parts: list[str], projection: str) -> list[Site]:
        """A language-model head as one site, its map to the vocabulary; each part is one where none has that map."""
        holder = projection.partition(".")[0]
        if holder not in parts:
            return [self.site(name, "lm_head", path, name) for name in parts]
        paths = [_joined(path, name) for name in parts]
        whole = tuple((part, self.modules[part]) for part in paths)
        return [self.site(holder, "lm_head", path, projection, whole=whole)]

    # --------------------------------------------------------------------------------- blocks and stacks

    def block(self, index: int, block: BlockDescription) -> Block:
        """One block with its sites, of which each knows the block."""
        heads = Heads(*block.heads) if block.heads is not None else None
        sites = {"block": self.site(f"{index}.block", "block", self.path, block.path, block=index, width=block.dim)}
        for role in block.roles:
            sites[role] = self._block_site(index, block, role, heads)
        whole = sites["block"]
        whole.per_token = block.per_token
        entry = None
        if block.entry:
            entry = self.site(f"{index}.entry", "entry", self.path, block.entry, width=block.dim)
        # The description comes along: methods ask it for what no site can say (masks, caches, the width of heads).
        found = Block(
            index=index,
            path=_joined(self.path, block.path),
            module=whole.module,
            dim=block.dim,
            stage=block.stage,
            pre_norm=block.pre_norm,
            sites=sites,
            described=block,
            entry=entry,
        )
        for site in sites.values():
            site.around = found
        return found

    def _block_site(self, index: int, block: BlockDescription, role: str, heads: Heads | None) -> Site:
        """The site of a role in a block."""
        where = block.roles[role]
        path, part = where if isinstance(where, tuple) else (where, None)
        fields: dict[str, Any] = {"block": index, "heads": heads, "width": block.dim}
        fields["while_active"] = self._settings(block, role)
        if isinstance(part, str):  # the name of a parameter, otherwise rows or nothing
            fields["parameter"] = part
        else:
            fields["rows"] = part
        return self.site(f"{index}.{role}", role, self.path, block.path, path, **fields)

    def _settings(self, block: BlockDescription, role: str) -> tuple[tuple[nn.Module, str, Any], ...]:
        """What must be so while a graft is active at a role: (module, attribute, value)."""
        settings: list[tuple[nn.Module, str, Any]] = []
        for attribute, value in block.while_active.get(role, {}).items():
            owner_path, _, name = attribute.rpartition(".")
            owner = self.modules.get(_joined(self.path, block.path, owner_path))
            if owner is None or not hasattr(owner, name):
                full = _joined(self.path, block.path, attribute)
                raise ScionError(f"the description of {self.family} sets {full!r} while {role!r} is active, and there "
                                 "is no such attribute")
            settings.append((owner, name, value))
        return tuple(settings)

    def stacks(self, blocks: list[Block]) -> list[Stack]:
        """The blocks by the stack that they belong to; a description without stages is one stack."""
        finals = self.description.final
        if isinstance(finals, str):
            finals = {"": finals}
        stacks = []
        for name, final in finals.items():
            members = [block for block in blocks if not name or block.stage == name]
            stacks.append(self._stack(name, final, members))
        return stacks

    def _stack(self, name: str, final_path: str, blocks: list[Block]) -> Stack:
        final = text = None
        if final_path:
            final = self.site(_joined(name, "final"), "norm", self.path, final_path, width=blocks[-1].dim)
        text_path = self.description.text
        if isinstance(text_path, dict):
            text_path = text_path.get(name)
        if text_path is not None:
            text = self.site(_joined(name, "inputs"), "inputs", self.path, text_path)
        return Stack(name, blocks, final, text)


def _joined(*parts: str) -> str:
    """One path of several, of which some may be empty."""
    return ".".join(part for part in parts if part)


def parameter_sites(model: nn.Module, names: Iterable[str]) -> list[Site]:
    """A site for each of these parameters, of whatever modules, for methods that treat all parameters alike."""
    modules = dict(model.named_modules(remove_duplicate=False))
    holders = _holders(modules.values())
    found = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        holding = holders[id(module.get_parameter(leaf))]
        tied = tuple(other for other, its_leaf in holding if other is not module and its_leaf == leaf)
        settings = tuple(torch_attention.settings(modules, path))
        site = Site(
            name=name,
            role="parameter",
            path=path,
            module=module,
            parameter=leaf,
            tied=tied,
            while_active=settings,
        )
        found.append(site)
    return found


def _holders(modules: Iterable[nn.Module]) -> dict[int, list[tuple[nn.Module, str]]]:
    """For each parameter, by its id, the modules that hold it and the name under which each does."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in dict.fromkeys(modules):  # each module once, whatever its names
        for leaf, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((module, leaf))
    return holders
