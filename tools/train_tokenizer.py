#!/usr/bin/env python
"""Train a byte-level BPE tokenizer and save it as a Hugging Face tokenizer directory.

    python tools/train_tokenizer.py --input books/ corpus.jsonl --vocab-size 8192 --output data/tokenizer

The one special token is <|endoftext|>, id 0; prepare_data.py ends documents with it.
"""

import argparse
import sys
from collections.abc import Iterator

from tqdm import tqdm

from nha_megatron.config import ConfigError
from nha_megatron.data.sources import expand_inputs, read_files
from nha_megatron.data.tokenizer import train_byte_level_bpe


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, folders or patterns: .txt .md .rst .jsonl .json .parquet"
    )
    parser.add_argument("--text-field", default="text", help="field with the text in JSON lines and parquet (default: text)")
    parser.add_argument("--vocab-size", type=int, required=True, help="size of the vocabulary, at least 257")
    parser.add_argument("--max-characters", type=int, help="read no more than this much text")
    parser.add_argument("--output", required=True, metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    characters = 0

    def texts() -> Iterator[str]:
        nonlocal characters
        for text in tqdm(read_files(expand_inputs(args.input), args.text_field), unit=" documents", disable=None):
            if args.max_characters is not None and characters >= args.max_characters:
                return
            characters += len(text)
            yield text

    try:
        size = train_byte_level_bpe(texts(), args.vocab_size, args.output)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {size:,} tokens, trained on {characters:,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
