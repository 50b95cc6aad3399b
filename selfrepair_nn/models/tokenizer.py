"""A model's tokenizer: there, not there, or damaged, which is another thing."""

import json
from pathlib import Path
from typing import Any

from selfrepair_nn.errors import SelfRepairError, one_line

SETTINGS = "tokenizer_config.json"
FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json", SETTINGS, "special_tokens_map.json"),
)
"""What a directory holds of a tokenizer."""

SAFE = {"trust_remote_code": False}
"""Told to every loader: left to itself it asks whoever is at the terminal, and a yes runs the model's code."""

REMEDY = "put the model's own files there, or remove them and give .npy token ids"


def load_tokenizer(source: Any) -> Any:
    """The tokenizer of a `Source`, or None where the model comes without one (then only token ids can be prompts).

    Raises:
        SelfRepairError: its files are there, and cannot be read; the message names the file.
    """
    found = _found(source) if _may_have(source) else None
    if found is None:
        return None
    if not found.vocab_size:
        if _files(source):
            raise SelfRepairError(f"the tokenizer of {source.name!r} is damaged: it has no token; {REMEDY}")
        return None
    found.name_or_path = source.name
    return found


def _found(source: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.location, **SAFE, **source.arguments)
    except ImportError as error:
        if _files(source):
            raise SelfRepairError(
                f"the tokenizer of {source.name!r} needs a package that is missing: {one_line(error)}"
            ) from error
    except Exception as error:
        if _files(source) or not isinstance(error, OSError | ValueError | TypeError | KeyError):
            raise SelfRepairError(
                f"the tokenizer of {source.name!r} is damaged: {_culprit(source, error)}; {REMEDY}"
            ) from error
    return None


def _may_have(source: Any) -> bool:
    """A directory without any of the files would be given the tokenizer of its family, without its words.

    One that holds settings only, which name code of its own, has none here: nothing that comes with a model is run.
    """
    files = _files(source)
    if [file.name for file in files] == [SETTINGS] and _names_code(files[0]):
        return False
    return bool(source.gguf_file or files or not Path(source.location).is_dir())


def _names_code(settings: Path) -> bool:
    try:
        return "auto_map" in json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _files(source: Any) -> list[Path]:
    """Its files in a directory; what the hub or a GGUF file holds is not known."""
    folder = Path(source.location)
    if source.gguf_file or not folder.is_dir():
        return []
    return [folder / name for name in FILES if (folder / name).exists() or (folder / name).is_symlink()]


def _culprit(source: Any, error: Exception) -> str:
    """The first file that is not what its name says, or all that there are."""
    files = _files(source)
    for file in files:
        try:
            content = file.read_bytes()
            if file.suffix == ".json" and not isinstance(json.loads(content.decode()), dict):
                return f"{file.name} holds no JSON object"
        except (OSError, ValueError, RecursionError) as flaw:
            return f"{file.name} ({one_line(flaw)})"
    return f"{', '.join(file.name for file in files) or 'its files'} ({one_line(error)})"
