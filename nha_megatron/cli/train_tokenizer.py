"""`nha-megatron train-tokenizer`: a byte-level BPE tokenizer in a Hugging Face tokenizer directory.

Its one special token is <|endoftext|>, id 0; `nha-megatron prepare` ends documents with it.
"""

import argparse
from collections.abc import Iterator

from nha_megatron.exit_status import COMPLETE

NAME = "train-tokenizer"
HELP = "train a byte-level BPE tokenizer and save it as a Hugging Face tokenizer directory"
EXAMPLE = "nha-megatron train-tokenizer --input books/ corpus.jsonl --vocab-size 8192 --output data/tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, folders or patterns: .txt .md .rst .jsonl .json .parquet"
    )
    parser.add_argument("--text-field", default="text", help="field with the text in JSON lines and parquet (default: text)")
    parser.add_argument("--vocab-size", type=int, required=True, help="size of the vocabulary, at least 257")
    parser.add_argument("--max-characters", type=int, help="read no more than this much text")
    parser.add_argument("--output", required=True, metavar="DIR")


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from nha_megatron.data.sources import expand_inputs, read_files
    from nha_megatron.data.tokenizer import train_byte_level_bpe

    characters = 0

    def texts() -> Iterator[str]:
        nonlocal characters
        for text in tqdm(read_files(expand_inputs(arguments.input), arguments.text_field), unit=" documents", disable=None):
            if arguments.max_characters is not None and characters >= arguments.max_characters:
                return
            characters += len(text)
            yield text

    size = train_byte_level_bpe(texts(), arguments.vocab_size, arguments.output)
    print(f"{arguments.output}: {size:,} tokens, trained on {characters:,} characters")
    return COMPLETE
