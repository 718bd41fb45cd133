"""The tokenizer of an exported model: that of the training, which begins and ends texts as the documents of the training did.

tokenizer.json is copied byte by byte unless its template puts other tokens around a text than the documents had.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from nha_megatron.config import ConfigError
from nha_megatron.data.identity import TrainedTokens
from nha_megatron.data.tokenizer import load_tokenizer, put_around_text, read_tokenizer, tokenizer_sha256

# Files by which transformers knows a tokenizer, beside tokenizer.json and tokenizer_config.json. Weights or code beside them stay there.
OTHER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")

# What would run code, call for another class, or rebuild the template: tokenizer.json alone decides, as it did in the training.
_DROPPED = ("auto_map", "add_bos_token", "add_eos_token", "name_or_path", "tokenizer_file", "special_tokens_map_file")


class ExportedTokenizer(NamedTuple):
    """Files by name, and the ids of special tokens by their name in Hugging Face configurations."""

    files: dict[str, bytes]
    ids: dict[str, int | None]


def special_ids(end_of_text: int | None, bos: int | None = None, pad: int | None = None) -> dict[str, int | None]:
    """Without a padding token of its own the model pads with end-of-text."""
    return {"bos_token_id": bos, "eos_token_id": end_of_text, "pad_token_id": end_of_text if pad is None else pad}


def exported_tokenizer(
    directory: Path, vocab_size: int, trained: TrainedTokens | None, end_of_text: str | None, say: Callable[[str], None]
) -> ExportedTokenizer:
    """What is exported of the tokenizer in `directory`.

    Args:
        trained: what the checkpoint knows; None where it is too old to know.
        end_of_text: token that the caller names.
        say: gets a sentence about each thing that had to be changed.

    Raises:
        ConfigError: it cannot be read, is not the tokenizer of the training, has more tokens than the model, or nothing says which token
            ends documents.
    """
    settings = {name: value for name, value in _settings(directory).items() if name not in _DROPPED}
    tokenizer, eos = _end_of_text(directory, vocab_size, _text(settings.get("eos_token")), trained, end_of_text)
    _drop_unknown(settings, tokenizer)
    bos = None if trained is None else trained.bos
    _name(settings, "eos_token", tokenizer, eos)
    if bos is not None:
        _name(settings, "bos_token", tokenizer, bos)
    elif trained is not None and _text(settings.get("bos_token")) != tokenizer.id_to_token(eos):
        settings.pop("bos_token", None)  # the model has never seen it
    if "pad_token" not in settings:
        settings["pad_token"] = _text(settings.get("unk_token")) or tokenizer.id_to_token(eos)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    settings.setdefault("padding_side", "left")  # what generation needs

    files = {name: (directory / name).read_bytes() for name in ("tokenizer.json", *OTHER_FILES) if (directory / name).is_file()}
    if _begin_with(tokenizer, bos, say):
        files["tokenizer.json"] = tokenizer.to_str(pretty=True).encode()
    files["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    named = {name: _text(settings.get(f"{name}_token")) for name in ("bos", "pad")}
    ids = {name: None if text is None else tokenizer.token_to_id(text) for name, text in named.items()}
    return ExportedTokenizer(files, special_ids(eos, ids["bos"], ids["pad"]))


def _settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, and what only the older special_tokens_map.json says."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"tokenizer: {path} is not valid JSON ({error}). Save the tokenizer again.") from None
        if not isinstance(content, dict):
            raise ConfigError(f"tokenizer: {path} holds a {type(content).__name__}, not an object with fields. Save the tokenizer again.")
        settings |= {key: value for key, value in content.items() if value is not None}
    return settings


def _text(token: object) -> str | None:
    """A token as files name it: its text, or an AddedToken."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _end_of_text(
    directory: Path, vocab_size: int, named: str | None, trained: TrainedTokens | None, given: str | None
) -> tuple[Tokenizer, int]:
    """The tokenizer, once it is known to be that of the training, and the id that ends documents."""
    token = given
    if trained is not None:
        found = tokenizer_sha256(directory)
        if found != trained.tokenizer_sha256:
            raise ConfigError(
                f"the tokenizer in {directory} is not the one that the model was trained with: the sha256 of its tokenizer.json is "
                f"{found[:12]}..., the data of the checkpoint was prepared with {trained.tokenizer_sha256[:12]}... Give that one "
                "(--tokenizer), or export without (--no-tokenizer)"
            )
        token = read_tokenizer(directory).id_to_token(trained.end_of_text)
        if token is None:
            raise ConfigError(f"the checkpoint ends documents with token {trained.end_of_text}, which the tokenizer in {directory} lacks")
    elif given is None and named is None:
        read_tokenizer(directory)
        raise ConfigError(
            f"the tokenizer in {directory} names no eos_token, and the checkpoint, of an earlier version, does not know: say which token "
            "ends documents (--end-of-text)"
        )
    loaded = load_tokenizer(directory, token or named)
    if given is not None and loaded.tokenizer.token_to_id(given) != loaded.end_of_text:
        raise ConfigError(
            f"--end-of-text {given!r}: the documents of the training end with {token!r} (token {loaded.end_of_text}). Leave the option out"
        )
    if loaded.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer in {directory} has {loaded.vocab_size} tokens, the model {vocab_size}: give the tokenizer that the model "
            "was trained with (--tokenizer)"
        )
    return loaded.tokenizer, loaded.end_of_text


def _drop_unknown(settings: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Names of tokens that tokenizer.json does not have: transformers would add them, with ids beyond the model's vocabulary."""

    def known(token: object) -> bool:
        text = _text(token)
        return text is not None and tokenizer.token_to_id(text) is not None

    for name, value in [*settings.items()]:
        if name.endswith("_token") and not isinstance(value, bool) and not known(value):
            del settings[name]
        elif name in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
            settings[name] = [token for token in value if known(token)]
        elif name in ("added_tokens_decoder", "extra_special_tokens") and isinstance(value, dict):
            settings[name] = {key: token for key, token in value.items() if known(token)}


def _name(settings: dict[str, Any], name: str, tokenizer: Tokenizer, identity: int) -> None:
    text = tokenizer.id_to_token(identity)
    if _text(settings.get(name)) != text:
        settings[name] = text


def _begin_with(tokenizer: Tokenizer, bos: int | None, say: Callable[[str], None]) -> bool:
    """Make the template put `bos`, or nothing, before a text, and nothing after it. Whether that changed it."""
    wanted = [] if bos is None else [bos]
    before, after = put_around_text(tokenizer)
    if (before, after) == (wanted, []):
        return False
    if bos is None:
        tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    else:
        token = tokenizer.id_to_token(bos)
        tokenizer.post_processor = TemplateProcessing(single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, bos)])

    def described(ids: list[int]) -> str:
        return " ".join(str(tokenizer.id_to_token(token)) for token in ids) or "nothing"

    say(
        f"the tokenizer puts {described(before)} before and {described(after)} after every text, the documents of the training begin with "
        f"{described(wanted)} (data.bos {'none' if bos is None else 'add'}): the exported tokenizer does as the documents"
    )
    return True
