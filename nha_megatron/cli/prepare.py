"""`nha-megatron prepare`: text into token files for training, PREFIX.bin, PREFIX.idx and the manifest PREFIX.json.

A text file is one document unless --split-documents says otherwise; a JSON line or a parquet row is one document. Each document ends
with the tokenizer's end-of-text token. The result does not depend on the number of workers.
"""

import argparse
import os
import sys

from nha_megatron.exit_status import COMPLETE

NAME = "prepare"
HELP = "turn text (files, folders, or a dataset of the Hugging Face hub) into token files PREFIX.bin, .idx and .json"
EXAMPLE = """\
nha-megatron prepare --input books/ --tokenizer data/tokenizer --output data/books --validation-fraction 0.02
nha-megatron prepare --input 'shards/*.jsonl.gz' --text-field content --tokenizer data/tokenizer --output data/web --workers 16
nha-megatron prepare --dataset HuggingFaceFW/fineweb-edu --subset sample-10BT --tokenizer data/tokenizer --output data/fineweb"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, folders or glob patterns: .txt .md .rst .jsonl .json .parquet; a text file, a JSON line or a row is one document",
    )
    source.add_argument("--dataset", metavar="NAME", help="a dataset of the Hugging Face hub, streamed")
    parser.add_argument("--subset", help="configuration of --dataset")
    parser.add_argument("--split", default="train", help="split of --dataset (default: train)")
    parser.add_argument("--text-field", default="text", help="field with the text in JSON lines, parquet and datasets (default: text)")
    parser.add_argument("--split-documents", choices=["file", "paragraph", "line"], default="file", help="one document in a text file")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a Hugging Face tokenizer directory")
    parser.add_argument("--end-of-text", metavar="TOKEN", help="token that ends a document (default: the tokenizer's eos_token)")
    parser.add_argument(
        "--bos",
        choices=["none", "add"],
        default="none",
        help="begin documents with the tokenizer's bos_token, or with nothing (default: none)",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX")
    parser.add_argument("--validation-documents", type=int, default=0, metavar="N", help="first N documents go to PREFIX_validation")
    parser.add_argument("--validation-fraction", type=float, default=0.0, metavar="F", help="this share of documents, drawn, goes there")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that encode (default: one per core)")


def run(arguments: argparse.Namespace) -> int:
    # Imported here: every worker process imports the main program, and must not wait for torch.
    from tqdm import tqdm

    from nha_megatron.known_warnings import silence_known_warnings

    silence_known_warnings()
    from nha_megatron.data.prepare import ValidationSplit, prepare, validation_prefix
    from nha_megatron.data.sources import expand_inputs, read_dataset, read_files
    from nha_megatron.data.tokenizer import load_tokenizer, put_around_text

    tokenizer = load_tokenizer(arguments.tokenizer, arguments.end_of_text, arguments.bos)
    before, _ = put_around_text(tokenizer.tokenizer)
    if before and arguments.bos == "none":
        token = tokenizer.tokenizer.id_to_token(before[0])
        print(
            f"note: the tokenizer puts {token} before every prompt, documents are prepared without it (--bos none), and the exported "
            "tokenizer will put none. --bos add begins documents with it",
            file=sys.stderr,
        )
    if arguments.dataset is not None:
        texts = read_dataset(arguments.dataset, arguments.subset, arguments.split, arguments.text_field)
        source = f"dataset {arguments.dataset} {arguments.subset or ''} split {arguments.split}"
    else:
        texts = read_files(expand_inputs(arguments.input), arguments.text_field, arguments.split_documents)
        source = f"files {' '.join(arguments.input)}"
    with tqdm(unit=" documents", disable=None) as bar:

        def progress(documents: int, tokens: int) -> None:
            if bar.update(documents - bar.n):
                bar.set_postfix_str(f"{tokens / 1e6:.2f} M tokens")

        result = prepare(
            texts,
            arguments.output,
            tokenizer,
            source=source,
            workers=arguments.workers,
            validation=ValidationSplit(arguments.validation_documents, arguments.validation_fraction),
            progress=progress,
        )
    for name, manifest in ((arguments.output, result.train), (validation_prefix(arguments.output), result.validation)):
        if manifest is not None:
            print(f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype})")
    if result.empty_documents:
        print(f"skipped {result.empty_documents:,} empty documents")
    return COMPLETE
