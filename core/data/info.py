"""What a task must know of the data before its head can be built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.json_types import check


@dataclass(frozen=True)
class DataInfo:
    """What the data say of their targets, as plain values.

    Args:
        classes: names of the classes, in the order of their numbers; none where samples have no class.
        multilabel: whether a sample may have several classes.
        targets: the targets of a sample by name, where there are several, each with what is to be known of it (a dense
            map's kind and number of channels, say).
        special_ids: ids of the tokenizer's special tokens by their names: ``pad``, ``mask``, ...
        vocabulary: how many ids the tokenizer has; None where there is no text.
    """

    classes: tuple[str, ...] = ()
    multilabel: bool = False
    targets: Mapping[str, Any] = field(default_factory=dict)
    special_ids: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int | None = None

    @classmethod
    def of(cls, info: DataInfo | Sequence[str], multilabel: bool = False) -> DataInfo:
        """``info`` itself, or that of data with these classes."""
        if isinstance(info, DataInfo):
            return info
        return cls(tuple(info), multilabel)

    def further(self) -> dict[str, Any]:
        """What there is beside classes and labels, as JSON; empty for plain classification."""
        found: dict[str, Any] = {}
        if self.targets:
            found["targets"] = dict(self.targets)
        if self.special_ids:
            found["special_ids"] = dict(self.special_ids)
        if self.vocabulary is not None:
            found["vocabulary"] = self.vocabulary
        return found

    @classmethod
    def from_record(cls, classes: Sequence[str], multilabel: bool, further: Mapping[str, Any], where: str) -> DataInfo:
        """What was recorded by `further` beside the classes.

        Args:
            where: the file, for messages.
        """
        check(further.get("targets", {}), dict[str, Any], where, "info.targets")
        check(further.get("special_ids", {}), dict[str, int], where, "info.special_ids")
        check(further.get("vocabulary"), int | None, where, "info.vocabulary")
        return cls(tuple(classes), multilabel, dict(further.get("targets", {})), dict(further.get("special_ids", {})),
                   further.get("vocabulary"))
