"""The tar shards of a `webdataset:` location, by split; missing shards are errors.

`{split}` or the word `train` in a pattern stands for every split in turn, see `SPLIT_WORDS`. Numbers in braces or
brackets are those of the training shards; other splits may have any numbers.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from engine.errors import UserError

T = TypeVar("T")

# Names of splits in files and folders.
SPLIT_WORDS = ("train", "validation", "val", "valid", "dev", "test")
_WORD = re.compile(r"(?<![a-zA-Z])(train|validation|valid|val|dev|test)(?![a-zA-Z])")
# Short names of the validation split.
_SHORT = ("val", "valid", "dev")
# A number, and what follows it: a count of shards, with the hash of older uploads to the Hugging Face hub.
_SHARD = re.compile(r"(.*?)(\d+)(-of-(\d+)(?:-[0-9a-f]{8,})?(\D*)|\D*)")
# A number with several values in braces or brackets, with the digits around them.
_NUMBERS = re.compile(r"\d*(?:\{\d+\.\.\d+\}|\{\d+(?:,\d+)*\}|\[[\d-]+\])+\d*")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
# Compressed shards, which are not read.
_PACKED = re.compile(r"(?i)\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$")
_MOST = 1_000_000  # shards that a pattern may stand for


def by_split(found: Mapping[str, T], spec: str) -> dict[str, T]:
    """Return the values of `SPLIT_WORDS` by train, validation and test.

    `val` (or `valid`, `dev`) is the validation split if there is a `test`. Otherwise it is the test split, of which the
    fifth with the lowest hashes of ids is validation.

    Args:
        found: Values by word.
        spec: The data source, for errors.

    Raises:
        UserError: Two words stand for the same split.
    """
    short = [word for word in _SHORT if word in found]
    if len(short) > 1:
        raise UserError(f"data source {spec!r} has both {short[0]} and {short[1]}; keep one of the two")
    splits = {word: value for word, value in found.items() if word not in _SHORT}
    for word in short:
        place = "validation" if "test" in found else "test"
        if place in splits:
            raise UserError(f"data source {spec!r} has both {word} and validation next to test; keep one of the two")
        splits[place] = found[word]
    return splits


def split_word(name: str) -> str | None:
    """Return the word of `SPLIT_WORDS` in the name of a file or folder, None if there is none or more than one."""
    words = set(_WORD.findall(name))
    return words.pop() if len(words) == 1 else None


def find_shards(location: str, spec: str) -> dict[str, list[Path]]:
    """Return the shards of each split, in the order of their numbers.

    Raises:
        UserError: Shards are missing; the message names them.
    """
    location = os.path.expanduser(location)
    if not location:
        raise UserError(f"data source {spec!r}: write webdataset:FOLDER or webdataset:PATTERN")
    if os.path.isdir(location):
        found = _in_folder(Path(location), spec)
    else:
        found = _of_pattern(location, spec)
    if "train" not in found:
        raise UserError(f"data source {spec!r} has no train shards")
    return by_split(found, spec)


def add_folders(found: dict[str, list[Path]], folder: Path, files_of: Callable[[Path], list[Path]], spec: str) -> None:
    """Add the files of `folder`/WORD to those of each split word.

    Args:
        found: Files by split word; changed in place.
        folder: The folder.
        files_of: Returns the files of a folder.
        spec: The data source, for errors.

    Raises:
        UserError: A word has files already.
    """
    for word in SPLIT_WORDS:
        inside = files_of(folder / word)
        if inside and word in found:
            raise UserError(f"data source {spec!r} has {word} files both in {folder} and in {folder / word}; keep one")
        if inside:
            found[word] = inside


def _in_folder(folder: Path, spec: str) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    packed = [path for path in sorted(folder.glob("*")) if _PACKED.search(path.name) and split_word(path.name)]
    if packed:
        raise UserError(
            f"data source {spec!r}: {packed[0].name} is compressed; samples are read in any order, so decompress it "
            "(gunzip), or move it away"
        )
    for path in sorted(folder.glob("*.tar")):
        words = set(_WORD.findall(path.name))
        if len(words) != 1:
            raise UserError(
                f"data source {spec!r}: the name of {path.name} has {' and '.join(sorted(words)) or 'no split'}; name "
                "shards train-*.tar, val-*.tar, ..., or give a pattern with {split} in it"
            )
        found.setdefault(words.pop(), []).append(path)
    add_folders(found, folder, lambda below: sorted(below.glob("*.tar")), spec)
    if not found:
        raise UserError(f"data source {spec!r}: {folder} holds no train-*.tar and no train/*.tar")
    for shards in found.values():
        check_sequence(shards, spec)
    return found


def _of_pattern(pattern: str, spec: str) -> dict[str, list[Path]]:
    if "{split}" in pattern:
        forms = {word: pattern.replace("{split}", word) for word in SPLIT_WORDS}
        train = _expand(forms["train"], spec)
        others = [{word: form for word, form in forms.items() if word != "train"}]
    elif "train" in _WORD.findall(pattern):
        train = _expand(pattern, spec)
        folder, name = os.path.split(pattern)
        others = [
            {word: os.path.join(folder, _replace_train(name, word)) for word in SPLIT_WORDS[1:]},
            {word: _replace_train(pattern, word) for word in SPLIT_WORDS[1:]},
        ]
    else:
        raise UserError(
            f"data source {spec!r}: a pattern has to separate the splits; put {{split}} in the place of train, "
            "val or test, or name the train shards by a pattern with the word train in it"
        )
    found = {"train": train}
    for candidates in others:
        for word, form in candidates.items():
            shards = [] if form == pattern else _counterpart(form, spec)
            if shards:
                found.setdefault(word, shards)
        if len(found) > 1:
            break
    return found


def _replace_train(text: str, word: str) -> str:
    return _WORD.sub(lambda match: word if match[1] == "train" else match[1], text)


def _expand(pattern: str, spec: str) -> list[Path]:
    """Return every shard of a pattern; all shards of its braces must exist."""
    paths: list[str] = []
    missing: list[str] = []
    for name in _names(pattern, spec):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.isfile(name)
        paths += matches
        if not matches:
            missing.append(name)
    if not paths:
        raise UserError(f"data source {spec!r}: no file matches {pattern}")
    if missing:
        _raise_missing(missing, len(missing) + len(paths), spec)
    shards = [Path(path) for path in dict.fromkeys(paths)]
    # A wildcard next to a digit selects some of the numbers on purpose.
    if glob.has_magic(pattern) and not re.search(r"\d[*?\[]|[*?\]]\d|[{\[]", pattern):
        check_sequence(shards, spec)
    return shards


def _counterpart(pattern: str, spec: str) -> list[Path]:
    """Return the shards of another split than train: {0..9}, {0,1} and [01] stand for any numbers."""
    found: list[Path] = []
    for form in _names(_NUMBERS.sub("\0", pattern), spec):
        parts = [re.escape(part).replace(r"\*", ".*").replace(r"\?", ".") for part in form.split("\0")]
        numbered = re.compile(r"\d+".join(parts))
        matches = sorted(glob.glob(form.replace("\0", "*")))
        found += [Path(name) for name in matches if "\0" not in form or numbered.fullmatch(name)]
    if _NUMBERS.search(pattern):
        check_sequence(found, spec)
    return found


def _names(pattern: str, spec: str) -> Iterator[str]:
    """Yield the names of a pattern: `a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar; `{x,y}` likewise."""
    literals: list[str] = []
    choices: list[list[str]] = []
    position, total = 0, 1
    for match in _BRACES.finditer(pattern):
        literals.append(pattern[position : match.start()])
        position = match.end()
        if match[3] is not None:
            choices.append(match[3].split(","))
            continue
        first, last = int(match[1]), int(match[2])
        total *= last - first + 1
        if not 1 <= total <= _MOST:
            raise UserError(f"data source {spec!r}: the range {match[0]} names {max(0, last - first + 1)} shards")
        choices.append([str(number).zfill(len(match[1])) for number in range(first, last + 1)])
    for chosen in itertools.product(*choices):
        yield "".join(a + b for a, b in zip(literals, chosen, strict=True)) + pattern[position:]


def check_sequence(shards: Sequence[Path], spec: str) -> None:
    """Check the numbers of shards.

    A missing shard after the last one is detected only with a brace range or an `-of-`.

    Raises:
        UserError: A number is missing or occurs twice, or `00003-of-00010` is there without the other nine.
    """
    series: dict[tuple[str, str], dict[int, str]] = {}
    totals: dict[tuple[str, str], int] = {}
    for shard in shards:
        match = _SHARD.fullmatch(shard.name)
        if match:
            key = (str(shard.parent / match[1]), f"-of-{match[4]}{match[5]}" if match[4] else match[3])
            number = int(match[2])
            if match[4] and number in series.get(key, {}):
                raise UserError(
                    f"data source {spec!r}: two files are shard {match[2]} of {match[4]}, such as {shard}; remove one"
                )
            series.setdefault(key, {})[number] = match[2]
            if match[4]:
                totals[key] = int(match[4])
    _check_one_count(totals, spec)
    for key, numbers in series.items():
        wanted = range(totals[key]) if key in totals else range(min(numbers), max(numbers) + 1)
        if len(wanted) > _MOST:
            continue  # dates or hashes rather than numbers
        width = len(next(iter(numbers.values())))
        missing = [f"{key[0]}{number:0{width}d}{key[1]}" for number in wanted if number not in numbers]
        if missing:
            _raise_missing(missing, len(wanted), spec)


def _check_one_count(totals: Mapping[tuple[str, str], int], spec: str) -> None:
    """Check that shards of one name have one count `-of-`; two counts are two versions of the same data.

    Raises:
        UserError: There are two.
    """
    counts: dict[str, int] = {}
    for (prefix, _), count in totals.items():
        if counts.setdefault(prefix, count) != count:
            raise UserError(
                f"data source {spec!r}: shards {prefix}* are numbered of {counts[prefix]} and of {count}, two versions "
                "of the data; keep one"
            )


def _raise_missing(missing: Sequence[str], total: int, spec: str) -> None:
    raise UserError(
        f"data source {spec!r}: {len(missing)} of {total} shards are missing, the first: {', '.join(missing[:3])}; "
        "copy them again, or name only those that are there"
    )
