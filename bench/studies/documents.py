"""The shared texts as JSON lines, one record a document, for the studies beside this file.

    python -m bench.studies.documents [--data ../shared/data] [--output-dir runs/texts]

Each domain becomes train.jsonl, valid.jsonl and test.jsonl, by its own splits, of which valid holds
only the beginnings of documents, some 2500 tokens in all; and sample.jsonl, the beginnings of
documents of any split, for models that were trained on another domain. A folder's docs.tsv says
how long documents are, since blank lines part paragraphs as well.
"""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

DOMAINS = ("stories", "wikipedia_en", "wikitext2", "python_code", "german")
SPLITS = ("train", "valid", "test")
SAMPLED_DOCUMENTS = 20
SAMPLED_BYTES = 560  # a document: about 224 tokens of a vocabulary of 512
VALIDATION_BYTES = 6000  # of all documents

# An article's title has one sign on each side, those of its sections more.
_ARTICLE = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE)


@dataclass(frozen=True)
class Options:
    """Split the shared texts into documents."""

    data: Path = Path(os.environ.get("FASTPERTURB_DATA", "../shared/data"))
    output_dir: Path = Path("runs/texts")


def main(options: Options) -> None:
    if not options.data.is_dir():
        raise SystemExit(f"there is no folder {options.data}: give --data, or set FASTPERTURB_DATA")
    for name in DOMAINS:
        source, target = options.data / name, options.output_dir / name
        texts = {split: documents(source, split) for split in SPLITS}
        write(target / "train.jsonl", texts["train"])
        size = VALIDATION_BYTES // len(texts["valid"])
        write(target / "valid.jsonl", [beginning(text, size) for text in texts["valid"]])
        write(target / "test.jsonl", texts["test"])
        everything = [text for split in reversed(SPLITS) for text in texts[split]]
        longest = max(1, len(everything) // SAMPLED_DOCUMENTS)
        spread = everything[::longest][:SAMPLED_DOCUMENTS]
        write(target / "sample.jsonl", [beginning(text, SAMPLED_BYTES) for text in spread])
        print(f"{name}: " + ", ".join(f"{len(texts[s])} {s}" for s in SPLITS))
    tiny = (options.data / "extra_tinystories" / "sample.txt").read_text(encoding="utf-8")
    stories = [story for story in tiny.split("<|endoftext|>") if story.strip()]
    write(options.output_dir / "tinystories" / "sample.jsonl", stories)


def documents(folder: Path, split: str) -> list[str]:
    raw = (folder / f"{split}.txt").read_bytes()
    with (folder / "docs.tsv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["split"] == split]
    if len(rows) == 1:  # many articles as one
        return articles(raw.decode("utf-8"))
    texts, begin, counted = [], 0, 0
    for row in rows:
        counted += int(row["bytes"])
        # A few bytes are not counted: a document ends where its last line does.
        end = raw.find(b"\n", counted - 1) + 1 or len(raw)
        texts.append(raw[begin:end].decode("utf-8"))
        begin = end
    return texts


def articles(text: str) -> list[str]:
    starts = [match.start() for match in _ARTICLE.finditer(text)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]


def beginning(text: str, size: int) -> str:
    return text.strip().encode("utf-8")[:size].decode("utf-8", errors="ignore")


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text.strip()}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
