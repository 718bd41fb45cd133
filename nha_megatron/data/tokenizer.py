"""Tokenizers: a Hugging Face tokenizer directory, and training one."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nha_megatron.config import ConfigError
from nha_megatron.config.json_text import read_json
from nha_megatron.data.checksum import file_sha256
from nha_megatron.publish import published_directory, remove_leftovers, writing

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
    if vocab_size > 2**31:
        raise ConfigError(
            f"tokenizer {str(directory)!r} has token id {vocab_size - 1}; token files hold ids below 2^31. Save the tokenizer again."
        )
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


def read_tokenizer_config(directory: str | Path) -> dict[str, Any]:
    """The fields of tokenizer_config.json, none where there is no such file. Raises ConfigError if it cannot be read."""
    path = Path(directory) / "tokenizer_config.json"
    try:
        fields = read_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except OSError as error:
        raise ConfigError(f"tokenizer: {path} cannot be read ({error.strerror}). Check its rights.") from error
    except ValueError as error:
        raise ConfigError(f"tokenizer: {path} is not valid JSON ({error}). Save the tokenizer again.") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"tokenizer: {path} holds a {type(fields).__name__}, not an object with fields. Save the tokenizer again.")
    return fields


def _named_token(directory: Path, name: str) -> str | None:
    token = read_tokenizer_config(directory).get(name)
    if isinstance(token, dict):  # saved as an AddedToken
        token = token.get("content")
    return token if isinstance(token, str) else None


def require_replaceable(directory: str | Path, overwrite: bool) -> None:
    """Raises ConfigError when a tokenizer may not be written there. Called before any work is done."""
    path = Path(directory)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir() or path.is_symlink():
        raise ConfigError(f"{path} exists and is not a directory: choose another output.")
    if not (path / "tokenizer.json").is_file():
        raise ConfigError(f"{path} is not empty and holds no tokenizer.json, so it is not replaced: choose another output.")
    if not overwrite:
        raise ConfigError(f"{path} holds a tokenizer: choose another output, or pass --overwrite to replace the directory.")


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, directory: str | Path, *, overwrite: bool = False) -> int:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face directory that AutoTokenizer loads.

    vocab_size: target size, with the 256 bytes and the token <|endoftext|> (id 0); at least 257.
    overwrite: whether a tokenizer that is there may be replaced, with its whole directory.
    Returns the size reached, which is smaller when the texts hold too few different pairs.

    Raises ConfigError for a size that is too small, an output that may not be replaced or written, and whatever reading `texts` raises;
    then nothing has changed.
    """
    if vocab_size < 257:
        raise ConfigError(f"vocabulary size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need at least 257.")
    remove_leftovers(Path(directory))
    require_replaceable(directory, overwrite)
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
    with writing(f"tokenizer {directory}", Path(directory).parent), published_directory(Path(directory)) as partial:
        _save(fast, partial)
    return tokenizer.get_vocab_size()


def _save(fast: Any, directory: Path) -> None:
    try:
        fast.save_pretrained(str(directory))
    except OSError:
        raise
    except Exception as error:  # tokenizers says with a bare Exception that the disk is full
        raise OSError(str(error)) from error
