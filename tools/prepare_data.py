#!/usr/bin/env python
"""Turn text into token files for training: PREFIX.bin, PREFIX.idx and the manifest PREFIX.json.

    python tools/prepare_data.py --input books/ --tokenizer data/tokenizer --output data/books --validation-fraction 0.02
    python tools/prepare_data.py --input 'shards/*.jsonl.gz' --text-field content --tokenizer T --output data/web --workers 16
    python tools/prepare_data.py --dataset HuggingFaceFW/fineweb-edu --subset sample-10BT --tokenizer T --output data/fineweb

A text file is one document unless --split-documents says otherwise; a JSON line or a parquet row is one document. Each
document ends with the tokenizer's end-of-text token. The result does not depend on the number of workers.
"""

import argparse
import os
import sys


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="files, folders or glob patterns: .txt .md .rst .jsonl .json .parquet")
    source.add_argument("--dataset", metavar="NAME", help="a dataset of the Hugging Face hub, streamed")
    parser.add_argument("--subset", help="configuration of --dataset")
    parser.add_argument("--split", default="train", help="split of --dataset (default: train)")
    parser.add_argument("--text-field", default="text", help="field with the text in JSON lines, parquet and datasets (default: text)")
    parser.add_argument("--split-documents", choices=["file", "paragraph", "line"], default="file", help="one document in a text file")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a Hugging Face tokenizer directory")
    parser.add_argument("--end-of-text", metavar="TOKEN", help="token that ends a document (default: the tokenizer's eos_token)")
    parser.add_argument("--output", required=True, metavar="PREFIX")
    parser.add_argument("--validation-documents", type=int, default=0, metavar="N", help="first N documents go to PREFIX_validation")
    parser.add_argument("--validation-fraction", type=float, default=0.0, metavar="F", help="this share of documents, drawn, goes there")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that encode (default: one per core)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)

    # Imported here: every worker process imports this file, and must not wait for torch.
    from tqdm import tqdm

    from nha_megatron.config import ConfigError
    from nha_megatron.known_warnings import silence_known_warnings

    silence_known_warnings()
    from nha_megatron.data.prepare import ValidationSplit, prepare, validation_prefix
    from nha_megatron.data.sources import expand_inputs, read_dataset, read_files
    from nha_megatron.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(args.tokenizer, args.end_of_text)
        if args.dataset is not None:
            texts = read_dataset(args.dataset, args.subset, args.split, args.text_field)
            source = f"dataset {args.dataset} {args.subset or ''} split {args.split}"
        else:
            texts = read_files(expand_inputs(args.input), args.text_field, args.split_documents)
            source = f"files {' '.join(args.input)}"
        with tqdm(unit=" documents", disable=None) as bar:

            def progress(documents: int, tokens: int) -> None:
                if bar.update(documents - bar.n):
                    bar.set_postfix_str(f"{tokens / 1e6:.2f} M tokens")

            result = prepare(
                texts,
                args.output,
                tokenizer,
                source=source,
                workers=args.workers,
                validation=ValidationSplit(args.validation_documents, args.validation_fraction),
                progress=progress,
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, manifest in ((args.output, result.train), (validation_prefix(args.output), result.validation)):
        if manifest is not None:
            print(f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype})")
    if result.empty_documents:
        print(f"skipped {result.empty_documents:,} empty documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
