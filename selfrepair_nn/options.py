"""Every choice a run offers: its name, default and meaning, written once for Python and the command line alike."""

import os
from dataclasses import dataclass, field, fields
from math import log10
from typing import Any
from urllib.parse import urlsplit

from selfrepair_nn.corpora import COLUMN, SPLIT
from selfrepair_nn.errors import UsageError
from selfrepair_nn.graph import FREEZES, REPLACEMENTS, TARGETS, VALUE_BIASES, one_of
from selfrepair_nn.paths import local

SELECTS = {
    "all": "every token",
    "top-share": "each head's top share of tokens: other prompts, and what comes after, are left out",
}
COUNTS = (
    "tokens", "length", "mean_prompts", "batch_size", "rows", "workers", "threads", "in_flight", "patience"
)  # fmt: skip
LARGEST = 10**12
MOST = {"workers": 1024, "threads": 1024}
CI_OF = {"heads": "each head's mean", "layers": "each layer's mean over its heads"}
COMPONENTS = {
    "none": "only the sums over heads and MLPs",
    "top": "every component's change, on each head's top share of tokens",
    "all": "every component's change, on every token",
}
BACKENDS = {
    "local": "the model in this process",
    "simulated": "the model in this process, behind the serialisation a server needs",
}


def option(
    default: Any, help: str, choices: dict[str, str] | tuple[str, ...] | None = None, alone: str | None = None
) -> Any:
    """One choice; `alone` is what its flag means on the command line when no value follows it."""
    return field(
        default=default,
        metadata={"help": help, "choices": tuple(choices) if choices else None, "alone": alone},
    )


@dataclass(frozen=True)
class Options:
    """The choices of one run. Raises UsageError for a value that cannot be."""

    # fmt: off
    model: Any = option("tiny-neox", "Embedded name, directory, GGUF file or hub name.")
    prompts: Any = option("sample", "Dataset name, file of text or of records (.jsonl, .json, .csv, .tsv, .parquet), .npy of token ids, or 'sample' (ships with the package).")
    out: Any = option("outputs", "Store to write (NAME.zarr), or the directory to put it in.")
    tokens: int | None = option(None, "Total number of tokens to use; default: 16384 of the sample, 100000 of a dataset, all of a file.")
    length: int | None = option(None, "Tokens in a prompt; default: 128, or the model's context if that is shorter.")
    bos: str = option("auto", "Begin each prompt with the BOS token: auto (if there is one), always or never.", ("auto", "always", "never"))
    partners: Any = option(None, ".npy of partners: entry i is the prompt whose z replaces prompt i's.")
    layers: str | None = option(None, "Layers to ablate in: 8:12 or 0,5,-1; default: all.")
    heads: str | None = option(None, "Heads to ablate: 9.6,10.*; default: all.")
    ablation: str = option("resample", "What replaces a head's z.", REPLACEMENTS)
    target: str = option("centred", "Unembedding direction of the target.", TARGETS)
    value_bias: str = option("output", "Where a head's constant part is counted.", VALUE_BIASES)
    freeze: str = option("none", "What keeps its clean value.", FREEZES)
    components: str = option("none", "Store every component's change too; alone: all.", COMPONENTS, "all")
    share: float = option(0.02, "Share of tokens that 'top' and 'top-share' mean, by direct effect.")
    select: str | None = option(None, "Tokens to ablate and store; default: all, or top-share with --until-ci.", SELECTS)
    until_ci: float | None = option(None, "Stop where the mean self-repair on the top share is known to +- this many logits.")
    ci_of: str = option("heads", "What --until-ci asks to be known.", CI_OF)
    param: Any = option((), "Parameter of the recipe, NAME=VALUE; repeatable.")
    dtype: str = option("float32", "What the model computes in.", ("float32", "float64", "bfloat16", "float16"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    split: str = option(SPLIT, "Split of the dataset.")
    column: str = option(COLUMN, "Column of the dataset, or of the records, that holds the text.")
    prompts_revision: str | None = option(None, "Branch, tag or commit of the dataset.")
    seed: int = option(0, "Seed of what is random: the partners, and the order of the prompts with --until-ci.")
    mean_prompts: int = option(256, "Prompts whose mean z mean ablation uses.")
    batch_size: int | None = option(None, "Prompts in a unit of work; default: about 512 tokens.")
    rows: int | None = option(None, "Tokens in one forward pass: ablated heads ride together until it is full; default: what fits.")
    workers: int = option(1, "Processes that share the work, each with its own model.")
    threads: int | None = option(None, "Threads of each process; default: torch's own, with --workers as many as pay.")
    shard: str | None = option(None, "Do only part I of N, as I/N: jobs of a cluster fill one store together.")
    backend: str = option("local", "Where the model runs.", BACKENDS)
    check: bool = option(True, "Prove at load that the model is decomposed exactly.")
    remote: bool = option(False, "Run on an NDIF server: no weights are needed here.")
    host: str | None = option(None, "Address of your own NDIF server, such as http://127.0.0.1:8001; implies remote.")
    in_flight: int = option(2, "Jobs on the server at a time.")
    patience: int = option(1800, "Seconds to wait for a server that is silent before a job or the server is given up.")
    yes: bool = option(False, "Start a large remote run without asking.")
    # fmt: on

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.metadata["choices"] and getattr(self, each.name) is not each.default:
                one_of(each.name, getattr(self, each.name), dict.fromkeys(each.metadata["choices"], ""))
        if self.until_ci is not None and not 0 < self.until_ci < float("inf"):
            raise UsageError(f"until_ci must be a number of logits above 0, not {self.until_ci!r}")
        if self.until_ci is None and self.ci_of != type(self).ci_of:
            raise UsageError(f"ci_of {self.ci_of} says what until_ci must know: give --until-ci too")
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}")
            require_sane(name, value, MOST.get(name, LARGEST))
        require_sane("seed", self.seed, 2**63 - 1)
        if not 0 < self.share <= 1:
            raise UsageError(f"share must lie above 0 and at most at 1, not {self.share!r}")
        local(self.out, "out")
        if self.revision is not None and not isinstance(self.model, str | os.PathLike):
            raise UsageError(
                f"revision {self.revision!r} is for models of the hub: leave it out with a loaded one"
            )
        if self.host is not None:
            require_address(self.host)
        self._require_one_kind_of_sharing()
        if self.served and self.backend != "local":
            raise UsageError(
                f"backend {self.backend!r} is in this process: leave it out, or --remote and --host"
            )
        if self.served and self.dtype != "float32":
            raise UsageError(
                f"dtype {self.dtype!r} cannot be chosen here: the server decides what it computes in"
            )

    def _require_one_kind_of_sharing(self) -> None:
        if self.part and self.until_ci is not None:
            raise UsageError("until_ci looks at all of a run after each round: leave --shard out")
        if self.served and (self.workers > 1 or self.part):
            raise UsageError(
                "a server shares out the work itself: leave out workers and shard, see --in-flight"
            )
        if self.workers > 1 and not isinstance(self.model, str):
            raise UsageError("workers load the model themselves: give its name or directory")

    @property
    def part(self) -> tuple[int, int] | None:
        """(I, N) of a shard, I from 1 to N. Raises UsageError if `shard` is misspelt."""
        if self.shard is None:
            return None
        first, _, last = self.shard.partition("/")
        fits = all(each.isdecimal() and len(each) < 10 for each in (first, last))
        if fits and 1 <= int(first) <= int(last):
            return int(first), int(last)
        raise UsageError(f"shard {self.shard!r} is not one of N: write 1/8 to 8/8")

    @property
    def selects(self) -> str:
        """What is ablated; the top share is all that an interval is about."""
        return self.select or ("all" if self.until_ci is None else "top-share")

    @property
    def served(self) -> bool:
        """Whether the model runs on an NDIF server."""
        return self.remote or self.host is not None


def require_sane(name: str, value: Any, most: int) -> None:
    """UsageError for a whole number that no run can mean: it would be computed until memory or patience ends."""
    if isinstance(value, int) and abs(value) > most:
        digits = round(value.bit_length() * log10(2))
        size = f"{value:,}" if digits < 30 else f"a number of about {digits} digits"
        raise UsageError(f"{name} must be at most {most:,}, not {size}")


def require_address(host: str) -> None:
    """Raises UsageError for a server's address that cannot be one, or that holds a secret."""
    try:
        parts = urlsplit(host)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fits, parts = False, urlsplit("")
    if parts.username or parts.password:
        raise UsageError("the host's address must not hold a name or a password: keys come from NDIF_API_KEY")
    if not fits or parts.query or parts.fragment:
        raise UsageError(f"host {host!r} is not an address: write for example http://127.0.0.1:8001")
