"""`nha-megatron train-tokenizer`: a byte-level BPE tokenizer in a Hugging Face tokenizer directory.

Its one special token is <|endoftext|>, id 0; `nha-megatron prepare` ends documents with it.
"""

import argparse
import sys
from collections.abc import Iterator

from nha_megatron.exit_status import COMPLETE

NAME = "train-tokenizer"
HELP = "train a byte-level BPE tokenizer and save it as a Hugging Face tokenizer directory"
EXAMPLE = "nha-megatron train-tokenizer --input books/ corpus.jsonl --vocab-size 8192 --output data/tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or patterns: .txt .md .rst .jsonl .json (also .gz .zst .xz .bz2) .parquet",
    )
    parser.add_argument("--text-field", default="text", help="field with the text in JSON lines and parquet (default: text)")
    parser.add_argument("--vocab-size", type=int, required=True, help="size of the vocabulary, at least 257")
    parser.add_argument("--max-characters", type=int, help="read no more than this much text")
    parser.add_argument(
        "--allow-missing", type=float, default=0.01, metavar="SHARE", help="of the rows, may lack the text field (default: 0.01)"
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it holds a tokenizer")


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from nha_megatron.cli.prepare import files_of
    from nha_megatron.config import ConfigError
    from nha_megatron.data.sources import check_files, read_files
    from nha_megatron.data.tokenizer import require_replaceable, train_byte_level_bpe

    require_replaceable(arguments.output, arguments.overwrite)
    files = files_of(arguments.input)
    check_files(files, arguments.text_field)
    characters = 0

    def texts() -> Iterator[str]:
        nonlocal characters
        read = read_files(files, arguments.text_field, allow_missing=arguments.allow_missing)
        for text in tqdm(read, unit=" documents", disable=None):
            if arguments.max_characters is not None and characters >= arguments.max_characters:
                return
            characters += len(text)
            yield text
        if not characters:
            raise ConfigError(f"files {' '.join(arguments.input)}: no document has any text. Check the input and the text field.")

    size = train_byte_level_bpe(texts(), arguments.vocab_size, arguments.output, overwrite=arguments.overwrite)
    print(f"{arguments.output}: {size:,} tokens, trained on {characters:,} characters")
    if size < arguments.vocab_size:
        print(
            f"warning: only {size:,} of the {arguments.vocab_size:,} tokens asked for were reached: the {characters:,} characters hold no "
            f"more pairs that repeat. Give more text, or set --vocab-size (and model.vocab_size) to {size:,}.",
            file=sys.stderr,
            flush=True,
        )
    return COMPLETE
