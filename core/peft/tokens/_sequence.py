"""Learned tokens in a sequence: where they enter, what they need to be seen, and where they leave again.

In text they enter where the model takes its inputs: ids become embeddings, the prompts stand before them, mask and
positions grow along, and the prompts are gone from the final state, so that labels and pooled positions stay where
they are. Of an encoder whose decoder reads it they stay, and the decoder's mask grows. When a decoder goes on from its
cache, which holds them, only the mask and the positions are longer.

In an image or a spectrogram, and where a model takes ids alone, they enter at the first block, behind the special
tokens, without a position, and leave behind the last block.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Block, Site, Stack
from core.errors import ScionError
from core.graft import Graft, hidden_name
from core.method import PEFTMethod

Values = Callable[[], Tensor]
"""Gives the prompts [tokens, dim]."""


class Run:
    """Whether the forward under way has got its prompts, and how often its last block has run. It copies and pickles
    empty."""

    def __init__(self) -> None:
        self.begin(False)

    def begin(self, inserted: bool) -> None:
        self.inserted, self.visits = inserted, 0

    def __getstate__(self) -> dict[str, Any]:
        return {"inserted": False, "visits": 0}


class PromptGraft(Graft):
    """Puts prompts into the sequence; the one that holds them has a ``prompt`` [tokens, dim]. All layers read them."""

    edits_call = True
    layer = None  # type: ignore[assignment]

    def __init__(self, site: Site, tokens: int, prompt: Tensor | None, values: Values | None = None) -> None:
        super().__init__(site)
        self.tokens = tokens
        self.prompt = None if prompt is None else torch.nn.Parameter(prompt)
        self.made: list[Values | None] = [values]  # in a list: the method registers what makes them

    def values(self) -> Tensor:
        """The prompts [tokens, dim]."""
        make = self.made[0]
        if make is not None:
            return make()
        assert self.prompt is not None
        return self.prompt

    def rows(self, like: Tensor) -> Tensor:
        """The prompts for each sample of ``like`` [batch, ...], in its type."""
        return self.values().to(like.dtype).expand(len(like), -1, -1)


class TextPrompt(PromptGraft):
    """[P; E(ids)], where ids arrive; the final state is without them again if ``leave`` is set."""

    def __init__(self, site: Site, tokens: int, prompt: Tensor | None, values: Values | None, run: Run, leave: bool
                 ) -> None:
        super().__init__(site, tokens, prompt, values)
        self.run, self.leave = run, leave
        self.added_positions = tokens

    def before(self, arguments: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        cache = arguments.get("past_key_values")
        self.run.begin(cache is None or cache.get_seq_length() == 0)
        changed = dict(arguments)
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ScionError(f"{self.site.name}: prompts need the padding mask [batch, tokens], not one for each "
                                 "query")
            changed["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.tokens), mask], 1)
        if positions is not None:
            positions = positions + self.tokens
        if self.run.inserted:
            embed: Any = self.site.module.get_input_embeddings()  # type: ignore[operator]
            embedded = arguments.get("inputs_embeds")
            embedded = embed(arguments["input_ids"]) if embedded is None else embedded
            changed["input_ids"] = None
            changed["inputs_embeds"] = torch.cat([self.rows(embedded), embedded], 1)
            types = arguments.get("token_type_ids")
            if types is not None:
                changed["token_type_ids"] = torch.cat([types.new_zeros(len(types), self.tokens), types], 1)
            if positions is not None:
                own = torch.arange(self.tokens, device=positions.device).expand(len(positions), -1)
                positions = torch.cat([own, positions], 1)
        if positions is not None:
            changed["position_ids"] = positions
        return changed

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y[:, self.tokens:] if self.leave and self.run.inserted else y


class Leave(Graft):
    """Takes the prompts out behind the last block."""

    layer = None  # type: ignore[assignment]

    def __init__(self, site: Site, tokens: int, run: Run) -> None:
        super().__init__(site)
        self.tokens, self.run = tokens, run

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.site.around is not None
        self.run.visits += 1
        last = self.run.visits == self.site.around.described.repeats
        return y[:, self.tokens:] if self.run.inserted and last else y


class Memory(Graft):
    """Where a decoder's inputs arrive: its mask of the encoder's states, which are longer by the prompts."""

    edits_call = True

    def before(self, arguments: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        mask, states = arguments.get("encoder_attention_mask"), arguments.get("encoder_hidden_states")
        if mask is None or states is None:
            return arguments
        more = mask.new_ones(len(mask), states.shape[1] - mask.shape[1])
        return {**arguments, "encoder_attention_mask": torch.cat([more, mask], 1)}


class StatePrompt(PromptGraft):
    """Prompts among a stack's states, behind its special tokens: in at the first block, out behind the last."""

    def __init__(self, site: Site, tokens: int, prompt: Tensor | None, values: Values | None, first: bool, last: bool
                 ) -> None:
        super().__init__(site, tokens, prompt, values)
        self.first, self.last = first, last
        assert site.around is not None
        self.special = site.around.grid.special if site.around.grid else 0
        self.causal = site.around.causal

    def before(self, arguments: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        changed = dict(arguments)
        for name, value in arguments.items():
            if isinstance(value, Tensor) and name in ("attention_mask", "attn_mask"):
                changed[name] = widened(value, self.tokens, self.causal)
            elif isinstance(value, Tensor) and name == "rope":
                changed[name] = behind_still_tokens(value, self.tokens)
        if self.first:
            name = hidden_name(arguments)
            x = arguments[name]
            special, rest = x[:, :self.special], x[:, self.special:]
            changed[name] = torch.cat([special, self.rows(x), rest], 1)
        return changed

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.last:
            return y
        special, rest = y[:, :self.special], y[:, self.special + self.tokens:]
        return torch.cat([special, rest], 1)


def behind_still_tokens(rope: Tensor, tokens: int) -> Tensor:
    """Sines, then cosines, of rotary positions [..., positions, 2 x frequencies], behind those of ``tokens`` further
    tokens that are not turned."""
    still = torch.zeros_like(rope[..., :1, :])
    still[..., rope.shape[-1] // 2:] = 1  # the cosine of no angle
    stills = still.expand(*rope.shape[:-2], tokens, -1)
    return torch.cat([stills, rope], -2)


def widened(mask: Tensor, tokens: int, causal: bool) -> Tensor:
    """A mask [.., queries or 1, keys], boolean or added, for a sequence with ``tokens`` prompts in front, which all
    see; they see each other and, unless causal, what any token sees."""
    boolean = mask.dtype == torch.bool
    open_, shut = (1, 0) if boolean else (0, torch.finfo(mask.dtype).min)
    batch, queries = mask.shape[:-2], mask.shape[-2]
    seen_prompts = mask.new_full((*batch, queries, tokens), open_)
    wide = torch.cat([seen_prompts, mask], -1)
    if queries == 1:
        return wide
    of_prompts = (*batch, tokens, wide.shape[-1])
    if causal:
        own = mask.new_full(of_prompts, shut)
        among = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
        own[..., :tokens] = own[..., :tokens].masked_fill(among, open_)
    else:  # what any token sees
        seen = wide.any(-2, keepdim=True) if boolean else wide.amax(-2, keepdim=True)
        own = seen.expand(of_prompts)
    return torch.cat([own, wide], -2)


class Prompted(PEFTMethod):
    """Base of methods that put learned tokens into the sequence: those of ``prompt_for``, one set a stack."""

    identity_at_start = False
    inference_cost = "every layer reads `tokens` more tokens"
    tokens: int
    roles_of: dict[str, tuple[str, Stack, Any]]
    """What the graft at each site is, of which stack, and what it must know, on this model."""

    @abstractmethod
    def prompt_for(self, stack: Stack, dim: int, table: nn.Embedding | None) -> tuple[Tensor | None, Values | None]:
        """The prompts of a stack: start values [tokens, dim] to be trained, or else a function that makes them.

        Args:
            stack: where they enter.
            dim: width of the embeddings or states among which they stand.
            table: the module that embeds ids, where there is one. Its output may be a multiple of its weight.
        """

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        found = {}
        for site, role, stack, what in self._places(anatomy):
            found[site.name] = role, stack, what
        return {"roles_of": found}

    def sites(self, anatomy: Anatomy) -> list[Site]:
        return [site for site, *_ in self._places(anatomy)]

    def _places(self, anatomy: Anatomy) -> list[tuple[Site, str, Stack, Any]]:
        """Where grafts stand, what each of them is, of which stack, and what it must know."""
        if self.layers is not None:
            raise ScionError(f"{self.name}: prompts enter before the first block, so that layers={self.layers} has no "
                             "meaning")
        found: list[tuple[Site, str, Stack, Any]] = []
        for stack in anatomy.stacks:
            blocks = stack.blocks
            reads_encoder = any("cross.attend" in block.sites or "cross.q" in block.sites for block in blocks)
            if reads_encoder and stack.text is not None:
                found.append((stack.text, "memory", stack, None))
            elif stack.text is not None:
                run, is_read = Run(), len(anatomy.stacks) > 1
                found.append((stack.text, "text", stack, (run, stack.final is not None and not is_read)))
                if stack.final is None and not is_read:
                    found.append((blocks[-1].sites["block"], "leave", stack, run))
            else:
                self._check_states(blocks, anatomy.family)
                for block in blocks:
                    ends = block is blocks[0], block is blocks[-1]
                    found.append((block.sites["block"], "state", stack, ends))
        return found

    def _check_states(self, blocks: list[Block], family: str) -> None:
        for block in blocks:
            if block.described.heads is None:
                raise ScionError(f"{self.name}: {family} has no attention that could read further tokens")
            if block.described.windows:
                raise ScionError(f"{self.name}: {family} keeps its states as a map, in which there is no place for "
                                 "further tokens; take VPT(deep=True), whose prompts are read in every window")

    def build(self, site: Site) -> Graft:
        role, stack, what = self.roles_of[site.name]
        if role == "memory":
            return Memory(site)
        if role == "leave":
            return Leave(site, self.tokens, what)
        if role == "text":
            table: Any = site.module.get_input_embeddings()  # type: ignore[operator]
            prompt, values = self.prompt_for(stack, table.weight.shape[1], table)
            return TextPrompt(site, self.tokens, prompt, values, *what)
        first, last = what
        prompt, values = None, None
        if first:  # the others read what it puts in
            prompt, values = self.prompt_for(stack, site.width, None)
        return StatePrompt(site, self.tokens, prompt, values, first, last)
