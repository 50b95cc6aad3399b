"""The text: three public-domain sources read, cleaned and split into training and held-out documents."""

import argparse
import re
import zlib
from pathlib import Path

# fmt: off
KJV_BOOKS = [
    "Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth", "1 Samuel",
    "2 Samuel", "1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther", "Job",
    "Psalms", "Proverbs", "Ecclesiastes", "Song of Solomon", "Isaiah", "Jeremiah", "Lamentations",
    "Ezekiel", "Daniel", "Hosea", "Joel", "Amos", "Obadiah", "Jonah", "Micah", "Nahum", "Habakkuk",
    "Zephaniah", "Haggai", "Zechariah", "Malachi", "Matthew", "Mark", "Luke", "John", "Acts", "Romans",
    "1 Corinthians", "2 Corinthians", "Galatians", "Ephesians", "Philippians", "Colossians",
    "1 Thessalonians", "2 Thessalonians", "1 Timothy", "2 Timothy", "Titus", "Philemon", "Hebrews", "James",
    "1 Peter", "2 Peter", "1 John", "2 John", "3 John", "Jude", "Revelation",
]
# fmt: on
HELDOUT = ["Ruth", "Esther", "Jonah", "Malachi", "Philippians", "James", "THE TEMPEST", "NORTHANGER ABBEY"]
HELDOUT_CHAPTERS = {"NORTHANGER ABBEY": 7}
SEPARATOR = "\n\f\n"


def read_documents(sources):
    """All documents as {title: text}, in a fixed order. `sources` is laid out as training/README.md says.

    A source that is not there is left out, and that is told.
    """
    found = {}
    for name, read in (("kjv.txt", read_bible), ("shakespeare", read_shakespeare), ("Rdata.rdb", read_austen)):
        place = Path(sources) / name
        if place.exists():
            found |= read(place)
        else:
            print(f"without {place}, which is not there")
    return found


def training_documents(documents):
    """The texts to train on: every document whose title is not in HELDOUT."""
    return [text for title, text in documents.items() if title not in HELDOUT]


def heldout_text(documents):
    """The held-out documents as one string, a line holding only a form feed between two documents."""
    return SEPARATOR.join(_opening(title, documents[title]) for title in HELDOUT) + "\n"


def split_documents(text):
    """The documents of a held-out text, as a list of strings."""
    return text.removesuffix("\n").split(SEPARATOR)


def read_bible(path):
    """One document per book, one line per verse, from lines such as `Ge1:1 In the beginning ...`."""
    books = {}
    for line in path.read_text().splitlines():
        book, chapter, verse, text = re.match(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line).groups()
        lines = books.setdefault(book, [])
        if verse == "1":
            lines.append(f"\nChapter {chapter}\n")
        lines.append(text)
    titles = zip(KJV_BOOKS, books.values(), strict=True)
    return {title: tidy("\n".join([title, *lines])) for title, lines in titles}


def read_shakespeare(folder):
    """One document per play or poem, in the modern-spelling editions (the folio ones end in `_gut_f`)."""
    texts = [path.read_text("latin-1") for path in sorted(folder.glob("*_gut.txt"))]
    return {text.strip().splitlines()[0].strip(): tidy(text) for text in texts}


def read_austen(path):
    """One document per novel, from the R package's table of zlib-compressed character vectors."""
    data, novels = path.read_bytes(), {}
    while data:
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(data[4:]))
        novels[lines[0].upper()] = unwrap(tidy("\n".join(lines).replace("_", "")))
        data = stream.unused_data
    return novels


def tidy(text):
    """Plain ASCII-ish text: no trailing or repeated spaces, at most one blank line in a row."""
    text = re.sub(r"[ \t]+", " ", text.replace("\r", ""))
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def unwrap(text):
    """Join the hard-wrapped lines of each paragraph: where a printed line ended cannot be predicted."""
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in text.split("\n\n"))


def _r_strings(serialised):
    """The strings of one serialised R character vector (XDR): each is flags, length, bytes."""
    vector = serialised.index(b"\0\0\0\x10", 14)
    count, at, strings = int.from_bytes(serialised[vector + 4 : vector + 8]), vector + 8, []
    for _ in range(count):
        length = int.from_bytes(serialised[at + 4 : at + 8])
        strings.append(serialised[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return strings


def _opening(title, text):
    """The whole text, or its first chapters where HELDOUT_CHAPTERS says so."""
    if title not in HELDOUT_CHAPTERS:
        return text
    end = re.search(rf"\n\nCHAPTER {HELDOUT_CHAPTERS[title] + 1}\b", text)
    return text[: end.start()]


def main():
    """Write the held-out text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", help="folder of the texts, see training/README.md")
    parser.add_argument("--heldout", required=True, help="file to write the held-out documents to")
    arguments = parser.parse_args()
    documents = read_documents(arguments.sources)
    Path(arguments.heldout).write_text(heldout_text(documents))


if __name__ == "__main__":
    main()
