"""`nha-megatron prepare`: text into token files for training, PREFIX.bin, PREFIX.idx and the manifest PREFIX.json.

A text file is one document unless --split-documents says otherwise; a JSON line or a parquet row is one document. Each document ends
with the tokenizer's end-of-text token. The result does not depend on the number of workers.

A large input is made in parts of about 1 GiB of its files, in PREFIX.parts: after an interruption the same command goes on there. With
--share I/N this process makes every N-th part; when all N have ended, the same command without --share joins the parts.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nha_megatron.exit_status import COMPLETE

if TYPE_CHECKING:
    from nha_megatron.data.prepare import Share
    from nha_megatron.data.tokenizer import LoadedTokenizer

NAME = "prepare"
HELP = "turn text (files, folders, or a dataset of the Hugging Face hub) into token files PREFIX.bin, .idx and .json"
EXAMPLE = """\
nha-megatron prepare --input books/ --tokenizer data/tokenizer --output data/books --validation-fraction 0.02
nha-megatron prepare --input 'shards/*.jsonl.gz' --text-field content --tokenizer data/tokenizer --output data/web --workers 16
nha-megatron prepare --input shards/ --tokenizer data/tokenizer --output data/web --share 3/8
nha-megatron prepare --megatron data/pile_text_document --tokenizer data/tokenizer
nha-megatron prepare --dataset HuggingFaceFW/fineweb-edu --subset sample-10BT --tokenizer data/tokenizer --output data/fineweb"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, folders or glob patterns: .txt .md .rst .jsonl .json (also .gz .zst .xz .bz2) .parquet; a text file, a JSON line or a "
        "row is one document",
    )
    source.add_argument("--dataset", metavar="NAME", help="a dataset of the Hugging Face hub, streamed")
    source.add_argument("--megatron", metavar="PREFIX", help="Megatron's own PREFIX.bin and .idx: only the manifest is written beside them")
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
    parser.add_argument("--output", metavar="PREFIX", help="token files to write; needed with --input and --dataset")
    parser.add_argument("--overwrite", action="store_true", help="replace token files at PREFIX, and those of PREFIX_validation with them")
    parser.add_argument(
        "--allow-missing", type=float, default=0.01, metavar="SHARE", help="of the rows, may lack the text field (default: 0.01)"
    )
    parser.add_argument("--share", metavar="I/N", help="make only every N-th part of a large input, from the I-th (from 0) on")
    parser.add_argument("--validation-documents", type=int, default=0, metavar="N", help="first N documents go to PREFIX_validation")
    parser.add_argument("--validation-fraction", type=float, default=0.0, metavar="F", help="this share of documents, drawn, goes there")
    parser.add_argument("--workers", type=int, default=_cores(), help="processes that encode (default: one per core)")


def _cores() -> int:
    """Those that this process may use, which a job may have fewer of than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(arguments: argparse.Namespace) -> int:
    # Imported here: every worker process imports the main program, and must not wait for torch.
    from tqdm import tqdm

    from nha_megatron.known_warnings import silence_known_warnings

    silence_known_warnings()
    from nha_megatron.config import ConfigError
    from nha_megatron.data.prepare import Prepared, ValidationSplit, prepare, prepare_files, validation_prefix
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
    if arguments.megatron is not None:
        return _adopt(arguments, tokenizer)
    if arguments.output is None:
        raise ConfigError("--output is missing: give the prefix of the token files to write.")
    validation = ValidationSplit(arguments.validation_documents, arguments.validation_fraction)
    with tqdm(unit=" documents", disable=None) as bar:

        def progress(documents: int, tokens: int) -> None:
            if bar.update(documents - bar.n):
                bar.set_postfix_str(f"{tokens / 1e6:.2f} M tokens")

        result: Prepared | None
        if arguments.dataset is not None:
            from nha_megatron.data.hub import read_dataset

            if arguments.share is not None:
                raise ConfigError("--share divides files: give --input, such as the parquet files of the dataset.")
            result = prepare(
                read_dataset(arguments.dataset, arguments.subset, arguments.split, arguments.text_field, arguments.allow_missing),
                arguments.output,
                tokenizer,
                source=f"dataset {arguments.dataset} {arguments.subset or ''} split {arguments.split}",
                workers=arguments.workers,
                validation=validation,
                overwrite=arguments.overwrite,
                progress=progress,
            )
        else:
            result = prepare_files(
                files_of(arguments.input),
                arguments.output,
                tokenizer,
                source=f"files {' '.join(arguments.input)}",
                text_field=arguments.text_field,
                unit=arguments.split_documents,
                allow_missing=arguments.allow_missing,
                workers=arguments.workers,
                validation=validation,
                overwrite=arguments.overwrite,
                share=_share(arguments.share),
                progress=progress,
                say=note,
            )
    if result is None:
        print(f"share {arguments.share} of {arguments.output} is made; the same command without --share joins all of them")
        return COMPLETE
    for name, manifest in ((arguments.output, result.train), (validation_prefix(arguments.output), result.validation)):
        if manifest is not None:
            print(f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype})")
    if result.empty_documents:
        print(f"skipped {result.empty_documents:,} empty documents")
    if result.missing:
        print(f"skipped {result.missing:,} rows without the field {arguments.text_field!r}")
    return COMPLETE


def note(line: str) -> None:
    """Something worth knowing, on standard error."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def files_of(inputs: list[str]) -> list[Path]:
    """The files of --input; says on standard error what is left out of folders, and what is taken twice."""
    from nha_megatron.data.sources import expand_inputs

    left_out: list[Path] = []
    files = expand_inputs(inputs, left_out)
    if left_out:
        names = f"{', '.join(map(str, left_out[:5]))}{' ...' if left_out[5:] else ''}"
        note(f"{len(left_out)} files of folders are left out, hidden ones and those about the data: {names}. Name them to take them")
    if len(set(files)) < len(files):
        note(f"{len(files) - len(set(files))} files are given more than once, and are taken as often")
    return files


def _share(text: str | None) -> "Share | None":
    from nha_megatron.config import ConfigError
    from nha_megatron.data.prepare import Share

    if text is None:
        return None
    number, _, of = text.partition("/")
    if not (number.isascii() and number.isdigit() and of.isascii() and of.isdigit()):
        raise ConfigError(f"--share {text!r}: give I/N, such as 0/8.")
    return Share(int(number), int(of))


def _adopt(arguments: argparse.Namespace, tokenizer: "LoadedTokenizer") -> int:
    from nha_megatron.config import ConfigError
    from nha_megatron.data.megatron_files import adopt

    if arguments.output is not None or arguments.validation_documents or arguments.validation_fraction or arguments.share:
        raise ConfigError(
            "--megatron takes token files as they are: leave out --output, --validation-documents, --validation-fraction, --share."
        )
    manifest = adopt(arguments.megatron, tokenizer, overwrite=arguments.overwrite)
    print(f"{arguments.megatron}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype})")
    return COMPLETE
