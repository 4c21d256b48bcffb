"""What fusing did: region by region, and what was left with its reason."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from reptool.proof.verdict import RegionProof

_WIDTH, _LABEL = 80, 13
"""Columns of a summary, and of the word in front of each entry."""
_NUMBER, _FIGURE = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]\d+)?"), re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")
_Item = tuple[str, ...]
_GLUE = "\xa0"
"""A space at which no line ends."""


@dataclass(frozen=True)
class Region:
    """One rewritten region: its name, the modules it came from, the operators before and after, and its proof."""

    name: str
    sources: tuple[str, ...]
    before: dict[str, int]
    after: dict[str, int]
    proof: RegionProof

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        fields = {"name": self.name, "sources": list(self.sources), "before": self.before, "after": self.after}
        return {**fields, "error": self.proof.error}

    def __str__(self) -> str:
        return (
            f"{self.name}: {_counts(self.before)} -> {_counts(self.after) or 'nothing'}, error {self.proof.error:.1e}"
        )


@dataclass(frozen=True, repr=False)
class FusionReport:
    """What fusing did, region by region, and what was left.

    ``kept_apart`` are neighbours, "one -> the next" or "one + one beside it", with the reason why they were not merged: it
    was not exact, or not worth it; figures are multiply-accumulates for one example, or the estimate for the batch.
    ``left`` are the norms and scales that are still there: module path, kind and reasons. ``requires`` is what the inputs
    have to be, such as ``x.shape[2] == 224``, and why. ``not_carried`` are the hooks on state dictionaries that the result
    does not have. Printed, it is its summary. **Units**: seconds.
    """

    regions: tuple[Region, ...]
    kept_apart: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str, str], ...]
    opaque: dict[str, int]
    seconds: dict[str, float]
    requires: tuple[tuple[str, str], ...] = ()
    not_carried: tuple[tuple[str, str], ...] = ()

    @property
    def worst_error(self) -> float:
        """The largest relative error of any region's proof, in float64."""
        return max((r.proof.error for r in self.regions), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "schema_version": 3,
            "regions": [region.to_dict() for region in self.regions],
            "kept_apart": [{"at": at, "why": why} for at, why in self.kept_apart],
            "left": [{"at": at, "kind": kind, "why": why} for at, kind, why in self.left],
            "opaque": self.opaque,
            "requires": [{"what": what, "why": why} for what, why in self.requires],
            "not_carried": [{"what": what, "why": why} for what, why in self.not_carried],
            "worst_error": self.worst_error,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        counts = f"{len(self.regions)} regions, {len(self.left)} left, {len(self.kept_apart)} kept apart"
        return f"FusionReport({counts}, largest error {self.worst_error:.1e})"

    def summary(self, lines: int = 5) -> str:
        """How much was fused, what is left, and the commonest reasons; what differs only by a number in a path is one entry."""
        before: Counter[str] = Counter()
        after: Counter[str] = Counter()
        for region in self.regions:
            before.update(region.before)
            after.update(region.after)
        text = [
            f"{len(self.regions)} region{'s' * (len(self.regions) != 1)} fused and proved, largest error {self.worst_error:.1e}",
            _wrapped(f"{_counts(before, _GLUE)} ->{_GLUE}{_counts(after, _GLUE) or 'nothing'}", "  ", 4)
            if self.regions
            else "",
            *_entries("left", self.left, " ".join, _left, lines),
            *_entries("kept apart", self.kept_apart, lambda item: item[-1], _apart, lines),
        ]
        reasons = dict.fromkeys(why for _, why in self.requires)
        text += [_entry("inputs", f"{' and '.join(w for w, y in self.requires if y == r)}: {r}") for r in reasons]
        text += [_entry("not carried", f"{what}: {why}") for what, why in self.not_carried[:lines]]
        if len(self.not_carried) > lines:
            text.append(_entry("", f"and {len(self.not_carried) - lines} more"))
        return "\n".join(filter(None, text))


def _entries(
    label: str, found: Iterable[_Item], key: Callable[[_Item], str], words: Callable[[list[_Item]], str], lines: int
) -> list[str]:
    """An entry for each group of what is alike, the largest first, and how many more there are."""
    groups: dict[str, list[_Item]] = {}
    for item in found:
        groups.setdefault(_NUMBER.sub("#", key(item)), []).append(item)
    shown = sorted(groups.values(), key=len, reverse=True)
    text = [_entry(label, f"{len(group)} x {words(group)}") for group in shown[:lines]]
    more = sum(map(len, shown[lines:]))
    return [*text, _entry("", f"and {more} more for {len(shown) - lines} other reasons")] if more else text


def _left(group: list[_Item]) -> str:
    """Norms or scales that are left, in words for all of them."""
    return _common([f"{kind} {at}: {why}" for at, kind, why in group])


def _apart(group: list[_Item]) -> str:
    """Neighbours that are kept apart: the reason for all of them, and the first."""
    more = f", and {len(group) - 1} more" if len(group) > 1 else ""
    return f"{_common([why for _, why in group])}: {group[0][0]}{more}"


def _common(texts: list[str]) -> str:
    """Texts that differ only in numbers as one: a star where paths differ, from the least to the largest of figures."""
    columns = list(zip(*(text.split(" ") for text in texts), strict=True))
    before = ("", *(words[0] for words in columns))
    return " ".join(
        _common_word(words, path=last in {"in", "into"}) for last, words in zip(before, columns, strict=False)
    )


def _common_word(words: tuple[str, ...], *, path: bool) -> str:
    if len(set(words)) == 1:
        return words[0]
    if not path and all(_FIGURE.fullmatch(word) for word in words):
        figures = sorted(words, key=lambda word: float(word.replace(",", "")))
        return f"{figures[0]}..{figures[-1]}"
    numbers = [_NUMBER.findall(word) for word in words]
    same = iter([column[0] if len(set(column)) == 1 else "*" for column in zip(*numbers, strict=True)])
    return _NUMBER.sub(lambda _: next(same), words[0])


def _entry(label: str, text: str) -> str:
    return _wrapped(text, label.ljust(_LABEL), _LABEL)


def _wrapped(text: str, first: str, indent: int) -> str:
    """Text in lines of 80 columns; names stay whole, and so do a count and its kind."""
    lines = textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace(_GLUE, " ")


def _counts(kinds: dict[str, int], between: str = " ") -> str:
    return ", ".join(f"{count}{between}{kind}" for kind, count in sorted(kinds.items()))
