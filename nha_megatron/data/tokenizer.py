"""Tokenizers: a Hugging Face tokenizer directory, and training one."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nha_megatron.config import ConfigError
from nha_megatron.data.checksum import file_sha256

END_OF_TEXT = "<|endoftext|>"


def tokenizer_sha256(directory: str | Path) -> str:
    """SHA-256 (hex) of the directory's tokenizer.json, which identifies a tokenizer. Raises ConfigError if there is none."""
    return file_sha256(_tokenizer_json(directory))


def _tokenizer_json(directory: str | Path) -> Path:
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"tokenizer {str(directory)!r}: there is no file {path}. Give a directory made by `nha-megatron train-tokenizer`, or by "
            "save_pretrained of a Hugging Face tokenizer."
        )
    return path


@dataclasses.dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what token files record about it. vocab_size counts added tokens and is one more than the largest id."""

    path: str
    sha256: str
    tokenizer: Tokenizer
    vocab_size: int
    end_of_text: int
    bos: int | None = None  # put before every document; None: nothing is


def read_tokenizer(directory: str | Path) -> Tokenizer:
    """The directory's tokenizer.json. Raises ConfigError if it is missing or cannot be read."""
    path = _tokenizer_json(directory)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"tokenizer: {path} cannot be read ({error}). Save the tokenizer again.") from error


def load_tokenizer(directory: str | Path, end_of_text: str | None = None, bos: Literal["none", "add"] = "none") -> LoadedTokenizer:
    """Load a Hugging Face tokenizer directory; nothing in it is executed.

    end_of_text: the token that ends documents; None takes `eos_token` of tokenizer_config.json.
    bos: `add` begins documents with `bos_token` of tokenizer_config.json.
    Raises ConfigError if files are missing or unreadable, or a token is not in the vocabulary.
    """
    tokenizer = read_tokenizer(directory)
    token = end_of_text if end_of_text is not None else _eos_token(Path(directory))
    identity = tokenizer.token_to_id(token)
    if identity is None:
        raise ConfigError(f"tokenizer {str(directory)!r}: the end-of-text token {token!r} is not in its vocabulary. Choose another.")
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    begin = _bos_token(directory, tokenizer) if bos == "add" else None
    return LoadedTokenizer(str(directory), tokenizer_sha256(directory), tokenizer, vocab_size, identity, begin)


def put_around_text(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer's template puts before and after every text, such as a bos token."""
    encoding = tokenizer.encode("a")
    inner = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    return (encoding.ids[: inner[0]], encoding.ids[inner[-1] + 1 :]) if inner else ([], [])


def _bos_token(directory: str | Path, tokenizer: Tokenizer) -> int:
    token = _named_token(Path(directory), "bos_token")
    identity: int | None = None if token is None else tokenizer.token_to_id(token)
    if identity is None:
        named = "tokenizer_config.json names no bos_token" if token is None else f"its bos_token {token!r} is not in its vocabulary"
        raise ConfigError(f"tokenizer {str(directory)!r}: {named}. Name one there, or prepare with --bos none.")
    return identity


def _eos_token(directory: Path) -> str:
    token = _named_token(directory, "eos_token")
    if token is None:
        raise ConfigError(
            f"tokenizer {str(directory)!r}: tokenizer_config.json names no eos_token. Say which token ends documents (--end-of-text)."
        )
    return token


def _named_token(directory: Path, name: str) -> str | None:
    path = directory / "tokenizer_config.json"
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None
    except ValueError as error:
        raise ConfigError(f"tokenizer: {path} is not valid JSON ({error}). Save the tokenizer again.") from error
    if isinstance(token, dict):  # saved as an AddedToken
        token = token.get("content")
    return token if isinstance(token, str) else None


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, directory: str | Path) -> int:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face directory that AutoTokenizer loads.

    vocab_size: target size, with the 256 bytes and the token <|endoftext|> (id 0); at least 257.
    Returns the size reached, which is smaller when the texts hold too few different pairs.
    """
    if vocab_size < 257:
        raise ConfigError(f"vocabulary size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need at least 257.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # imported here: it takes seconds, and reading token files does not need it
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, unk_token=None)
    Path(directory).mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(directory))
    return tokenizer.get_vocab_size()
