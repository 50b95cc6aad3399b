"""Every choice a run offers: its name, default and meaning, written once for Python and the command line alike."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from inspect import Parameter, Signature
from ipaddress import ip_address
from textwrap import fill
from typing import Any, ClassVar, Never, Unpack, get_type_hints
from urllib.parse import urlsplit

from selfrepair_nn import values
from selfrepair_nn.corpora import COLUMN, SPLIT, is_texts
from selfrepair_nn.errors import UsageError
from selfrepair_nn.given import Given
from selfrepair_nn.graph import FREEZES, MOST_WORDS, TARGETS, VALUE_BIASES
from selfrepair_nn.paths import local
from selfrepair_nn.prompts import ROWS_ARE
from selfrepair_nn.replacements import REPLACEMENTS
from selfrepair_nn.shown import tell

SELECTS = {
    "all": "every token",
    "top-share": "each head's top share of tokens: other prompts, and what comes after, are left out",
}
CI_OF = {"heads": "each head's mean", "layers": "each layer's mean over its heads"}
COMPONENTS = {
    "none": "only the sums over heads and MLPs",
    "top": "every component's change, on each head's top share of tokens",
    "all": "every component's change, on every token",
}
LOGPROBS = {
    "none": "logits alone",
    "top": "log-probability too, in nats, on each head's top share of tokens",
    "all": "log-probability too, in nats, on every token",
}
RESAMPLES_AS = {
    "all": "what each partner gives, along a dimension resample",
    "moments": "mean and variance over partners: a store as large for many as for two",
}
SPLITS = {
    "sums": "heads, MLPs and norms by themselves",
    "total": "all but the ablated site and the final norm as one sum: only the final residual stream is read",
}
BACKENDS = {
    "local": "the model in this process",
    "simulated": "the model in this process, behind the serialisation a server needs",
}

RENAMED = {"rows": "tokens_per_pass"}
"""Names that options had, and those that they have: the old ones are still taken, and that is told."""

PORTS = {"http": 80, "https": 443}
"""Those that an address need not name."""

_SCHEDULER = re.compile(r"([a-z]+://)?[\w.:\[\]-]+:\d{1,5}/?|[^\0]*\.json")

Kind = Callable[[str, Any], Any]
"""How what a caller writes becomes what is kept: see `values`."""


def option(
    default: Any,
    help: str,
    kind: Kind | None = None,
    choices: Iterable[str] | None = None,
    alone: str | None = None,
    decides: bool = True,
) -> Any:
    """One choice: a value of some `kind`, or one of some `choices`.

    `alone` is what its flag means on the command line when no value follows it; `decides` says whether numbers depend
    on it, so that with another value it is another run.
    """
    known = {"help": help, "kind": kind, "choices": tuple(choices) if choices else None}
    return field(default=default, metadata=known | {"alone": alone, "decides": decides})


def _seed(name: str, value: Any) -> int:
    return values.whole(name, value, 0, 2**63 - 1)


def _processes(name: str, value: Any) -> int:
    return values.whole(name, value, most=1024)


def _words(name: str, value: Any) -> int:
    return values.whole(name, value, 0, MOST_WORDS)


def _seconds(name: str, value: Any) -> int:
    return values.whole(name, value, 1, 10**8)


def _share(name: str, value: Any) -> float:
    found = values.number(name, value)
    if not 0 < found <= 1:
        raise UsageError(f"{name} must lie above 0 and at most at 1, not {values.brief(value)}")
    return found


def _width(name: str, value: Any) -> float:
    found = values.number(name, value)
    if not 0 < found < float("inf"):
        raise UsageError(f"{name} must be a number of logits above 0, not {values.brief(value)}")
    return found


def _out(name: str, value: Any) -> str:
    found = values.place(name, value)
    local(found, name)
    return found


def _addresses(name: str, value: Any) -> tuple[str, ...]:
    """One address or several, each once."""
    given = [value] if isinstance(value, str) else values.several(value)
    if given == []:
        raise UsageError(f"{name} is empty: name a server's address, or leave it out")
    found = [values.text(name, each) for each in ([value] if given is None else given)]
    plain = [address(each) for each in found]
    if twice := [each for each in dict.fromkeys(plain) if plain.count(each) > 1]:
        same = " and ".join(repr(each) for each, other in zip(found, plain, strict=True) if other == twice[0])
        raise UsageError(f"host {twice[0]!r} is named twice ({same}): name each server once")
    return tuple(plain)


def _scheduler(name: str, value: Any) -> str:
    found = values.text(name, value)
    if "@" in found or not _SCHEDULER.fullmatch(found):
        raise UsageError(
            f"{name} {values.brief(value)} is no address of a scheduler: write tcp://HOST:8786, or the path of the file "
            "that it writes (.json)"
        )
    return found


@dataclass(frozen=True, init=False)
class Options:
    """The choices of one run, each in the one form in which it is kept, whatever spelling it came in.

    None stands for the default of any of them. Raises UsageError for a name that is no option, and for a value that
    cannot be.
    """

    __signature__: ClassVar[Signature]

    # fmt: off
    model: Any = option("tiny-neox", "Embedded name, directory, GGUF file or hub name.", values.source)
    prompts: Any = option("sample", "Dataset name, file of text or of records (.jsonl, .json, .csv, .tsv, .parquet), .npy of token ids, or 'sample' (ships with the package).", values.prompts)
    out: Any = option("outputs", "Store to write (NAME.zarr), or the directory to put it in.", _out, decides=False)
    tokens: int | None = option(None, "Total number of tokens to use; default: 16384 of the sample, 100000 of a dataset, all of a file.", values.whole)
    length: int | None = option(None, "Tokens in a prompt; default: 128, where rows are texts at most 1024, or the model's context if that is shorter.", values.whole)
    rows_are: str | None = option(None, "What a row of text is: packed, documents joined and cut into rows of one length; or texts, each document (a record, or in a file of text what a line holding only a form feed ends) a row of its own. Default: packed, but texts for a list of texts in Python with neither tokens nor length.", choices=ROWS_ARE)
    bos: str = option("auto", "Begin each prompt with the BOS token: auto (if there is one), always or never.", choices=("auto", "always", "never"))
    partners: Any = option(None, ".npy of partners: entry i is the prompt whose z replaces prompt i's; or several rows, [resample, prompt].", values.partners)
    resamples: int = option(1, "How many partners each prompt has under resample ablation, one after the other.", _processes)
    resamples_as: str = option("all", "What is stored of several partners.", choices=RESAMPLES_AS)
    layers: str | None = option(None, "Layers to ablate in: 8:12 or 0,5,-1; default: all.", values.layers)
    heads: str | None = option(None, "Heads to ablate: 9.6,10.*; default: all.", values.heads)
    ablation: str = option("resample", "What replaces a head's z.", choices=REPLACEMENTS)
    target: str = option("centred", "Unembedding direction of the target.", choices=TARGETS)
    value_bias: str = option("output", "Where a head's constant part is counted.", choices=VALUE_BIASES)
    freeze: str = option("none", "What keeps its clean value.", choices=FREEZES)
    components: str = option("none", "Store every component's change too; alone: all.", choices=COMPONENTS, alone="all")
    logprob: str = option("none", "Measure log-probability too; alone: top.", choices=LOGPROBS, alone="top")
    words: int = option(0, "Store the tokens that each head, and what reacts to its ablation, promote and demote most: so many of each, of each head's top share of tokens.", _words)
    split: str = option("sums", "Into which parts the self-repair is split (of a dataset: --dataset-split); 'total' where --ci-of layers asks a server.", choices=SPLITS)
    share: float | None = option(None, "Share of tokens that 'top' and 'top-share' mean, by direct effect; default: 0.02, or 1 where the prompts say which tokens count.", _share)
    select: str | None = option(None, "Tokens to ablate and store; default: all, or top-share with --until-ci.", choices=SELECTS)
    until_ci: float | None = option(None, "Stop where the mean self-repair on the top share is known to +- this many logits.", _width)
    ci_of: str = option("heads", "What --until-ci asks to be known.", choices=CI_OF)
    param: Any = option((), "Parameter of the recipe, NAME=VALUE; repeatable.", values.parameters)
    dtype: str = option("float32", "What the model computes in.", values.named, ("float32", "float64", "bfloat16", "float16"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …, or balanced: spread over all GPUs.", values.named, decides=False)
    revision: str | None = option(None, "Branch, tag or commit of a hub model.", values.text)
    revisions: Any = option(None, "Checkpoints along an axis of one store, comma-separated: revisions of a hub model, or directories.", values.revisions)
    dataset_split: str = option(SPLIT, "Split of the dataset.", values.text)
    column: str = option(COLUMN, "Column of the dataset, or of the records, that holds the text.", values.text)
    prompts_revision: str | None = option(None, "Branch, tag or commit of the dataset.", values.text)
    seed: int = option(0, "Seed of what is random: the partners, and the order of the prompts with --until-ci.", _seed)
    mean_prompts: int = option(256, "Prompts whose mean z mean ablation uses.", values.whole)
    batch_size: int | None = option(None, "Prompts in a unit of work; default: about 512 tokens, on a GPU as many as fill it.", values.whole, decides=False)
    tokens_per_pass: int | None = option(None, "Tokens in one forward pass: ablated heads share it until it is full; default: what fits.", values.whole, decides=False)
    workers: int = option(1, "Processes that share the work, each with its own model.", _processes, decides=False)
    dask: str | None = option(None, "Scheduler of a Dask cluster whose workers share the work: tcp://HOST:8786, or its scheduler file (.json).", _scheduler, decides=False)
    threads: int | None = option(None, "Threads of each process; default: torch's own, with --workers as many as pay.", _processes, decides=False)
    shard: str | None = option(None, "Do only part I of N, as I/N: jobs of a cluster fill one store together.", values.part, decides=False)
    backend: str = option("local", "Where the model runs.", choices=BACKENDS, decides=False)
    check: bool = option(True, "Prove at load that the model is decomposed exactly.", values.switch, decides=False)
    remote: bool = option(False, "Run on an NDIF server: no weights are needed here.", values.switch)
    host: Any = option((), "Address of your own NDIF server, such as http://127.0.0.1:8001; implies remote; repeatable: several hosts share the work.", _addresses, decides=False)
    in_flight: int = option(2, "Jobs on each server at a time.", _processes, decides=False)
    patience: int = option(1800, "Seconds to wait for a server that is silent before a job or the server is given up.", _seconds, decides=False)
    tensor_parallel: int | None = option(None, "Processes that a server splits each layer among, for its plan; default: as the server says, else 1.", _processes, decides=False)
    job_seconds: int | None = option(None, "Seconds after which a server ends a job; default: as the server says, else 3600.", _seconds, decides=False)
    yes: bool = option(False, "Start a large remote run without asking.", values.switch, decides=False)
    # fmt: on

    def __init__(self, *unnamed: Never, **given: Unpack[Given]) -> None:
        if unnamed:
            raise UsageError(
                f"options are given by name, not as {values.brief(unnamed[0])}: write for example model=…"
            )
        require_known(given)
        named = renamed(given)
        for each in fields(self):
            object.__setattr__(self, each.name, _kept(each, named.get(each.name)))
        if self.alone and named.get("ablation") is None:
            object.__setattr__(self, "ablation", "mean")
        if self.of_trends and named.get("split") is None:
            object.__setattr__(self, "split", "total")
        self._require_fitting()

    def _require_fitting(self) -> None:
        if values.ragged(self.prompts) and self.rows_are != "texts":
            values.require_one_length("prompts", self.prompts)
        if self.rows_are == "packed" and not isinstance(self.prompts, str) and not is_texts(self.prompts):
            raise UsageError("rows_are 'packed' is for text: token ids and Prompts are rows as they are; leave it out")
        if self.until_ci is None and self.ci_of != type(self).ci_of:
            raise UsageError(f"ci_of {self.ci_of} says what until_ci must know: give --until-ci too")
        if self.revision is not None and not isinstance(self.model, str | os.PathLike):
            raise UsageError(
                f"revision {self.revision!r} is for models of the hub: leave it out with a loaded one"
            )
        if self.revisions is not None:
            self._require_one_after_the_other()
        if self.split == "total" and self.components != "none":
            raise UsageError(f"split 'total' follows no component: leave components {self.components!r} out")
        if self.split == "total" and self.words:
            raise UsageError(f"split 'total' tells no part apart, and words are of parts: leave words {self.words} out")
        if {self.components, self.logprob} == {"all", "top"}:
            raise UsageError(
                f"components {self.components!r} and logprob {self.logprob!r}: what is kept of top tokens is kept of "
                "the same ones: choose 'top' for both, or 'all'"
            )
        self._require_one_kind_of_sharing()
        self._require_right_place()
        if self.served and self.backend != "local":
            raise UsageError(
                f"backend {self.backend!r} is in this process: leave it out, or --remote and --host"
            )
        if self.served and self.dtype != "float32":
            raise UsageError(
                f"dtype {self.dtype!r} cannot be chosen here: the server decides what it computes in"
            )

    def _require_one_after_the_other(self) -> None:
        """What a run of several revisions cannot do."""
        if not isinstance(self.model, str | os.PathLike):
            raise UsageError("revisions are loaded one after the other: give model's name or directory, not a loaded one")
        if self.revision is not None:
            raise UsageError(f"revision {self.revision!r} is one, revisions are several: give only one of both options")
        if self.until_ci is not None:
            raise UsageError("until_ci stops each model elsewhere: leave it out with revisions")
        if self.resamples != type(self).resamples:
            raise UsageError("several partners have an axis of their own: leave resamples out with revisions")
        if self.part:
            raise UsageError("a run of several revisions has no parts: leave --shard out, or run each revision by itself")

    def _require_right_place(self) -> None:
        """What only a server, or only this machine, can take notice of."""
        usual = {each.name: each.default for each in fields(self)}
        for name in ("device", "threads") if self.served else ("in_flight", "patience", "tensor_parallel", "job_seconds", "yes"):
            if getattr(self, name) != usual[name]:
                where = "on this machine" if self.served else "on a server, by --host or --remote"
                raise UsageError(f"{name} is for a model {where}: leave {flag(name)} out")

    def _require_one_kind_of_sharing(self) -> None:
        if self.part and self.until_ci is not None:
            raise UsageError("until_ci looks at all of a run after each round: leave --shard out")
        if self.dask is not None and self.workers > 1:
            raise UsageError("a cluster has workers of its own: leave out workers, or dask")
        for name, asked in {"shard": self.part, "workers": self.workers > 1, "dask": self.dask}.items():
            if asked and (self.served or name != "shard"):
                self.require_lendable(name)

    def require_lendable(self, name: str) -> None:
        """Raise UsageError where others cannot do some of the work, as what is called `name` asks for."""
        if self.served:
            raise UsageError(f"a server shares out the work itself: leave out {name}, see --in-flight")
        if not isinstance(self.model, str | os.PathLike):
            raise UsageError(
                f"{name}: workers load the model themselves, and cannot be given one that is loaded: give its name or "
                "directory"
            )

    @property
    def record(self) -> str:
        """What a graph records of each ablation: graph.RECORDS."""
        return "full" if self.components != "none" else self.split

    @property
    def also(self) -> tuple[str, ...]:
        """What a graph records beside that: its `also`."""
        return () if self.logprob == "none" else ("logprob",)

    @property
    def part(self) -> tuple[int, int] | None:
        """(I, N) of a shard, I from 1 to N."""
        if self.shard is None:
            return None
        first, _, last = self.shard.partition("/")
        return int(first), int(last)

    @property
    def selects(self) -> str:
        """What is ablated; the top share is all that an interval is about."""
        return self.select or ("all" if self.until_ci is None else "top-share")

    @property
    def rows(self) -> str:
        """What a row is: prompts.ROWS_ARE."""
        whole = self.length is None and self.tokens is None
        return self.rows_are or ("texts" if is_texts(self.prompts) and whole else "packed")

    @property
    def alone(self) -> bool:
        """Whether there is one text alone that is not empty, with no other to lend it anything: it is then ablated by its mean."""
        return self.rows == "texts" and isinstance(self.prompts, tuple) and sum(map(bool, self.prompts)) == 1

    @property
    def of_trends(self) -> bool:
        """Whether nothing but layers' means is asked of a server: it is then not split, and little crosses there."""
        whole = self.components == "none" and not self.words
        return self.served and self.until_ci is not None and self.ci_of == "layers" and whole

    @property
    def served(self) -> bool:
        """Whether the model runs on an NDIF server."""
        return self.remote or bool(self.host)

    @property
    def hosts(self) -> tuple[str | None, ...]:
        """Addresses of the servers it runs on; None is the one that nnsight is configured for."""
        return self.host or (None,)


def require_known(names: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise UsageError, with what is nearest and all there are, for a name that is neither an option nor one of others."""
    valid = [*(each.name for each in fields(Options)), *others]
    for name in names:
        if name == "tokenizer":
            raise UsageError("a tokenizer goes with its model: write model=sr.wrap(module, tokenizer)")
        if name not in valid and name not in RENAMED:
            raise UsageError(
                f"there is no option {name!r}{values.nearest(name, valid)}; there are {', '.join(valid)}"
            )


def current(named: Mapping[str, Any]) -> dict[str, Any]:
    """What stands under names that options have, or once had, under those that they have now."""
    found = {RENAMED.get(name, name): value for name, value in named.items()}
    if found.get("split", "sums") not in SPLITS:  # as a dataset's split was once called
        found |= {"split": "sums", "dataset_split": found["split"]}
    return found


def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller gave, under the names that options have now. An old name is told.

    Raises UsageError for an option that is given under both names.
    """
    if given.get("split") not in (None, *SPLITS):
        said = values.brief(given["split"])
        raise UsageError(f"split {said} is not known: choose one of {', '.join(SPLITS)}; a dataset's is dataset_split")
    old = [name for name in given if name in RENAMED and given[name] is not None]
    for name in old:
        if given.get(RENAMED[name]) is not None:
            raise UsageError(f"{name} is the old name of {RENAMED[name]}: give only {RENAMED[name]}")
        tell(f"{name} is called {RENAMED[name]} now: write {flag(RENAMED[name])}, or {RENAMED[name]}=… in Python")
    kept = {name: value for name, value in given.items() if name not in RENAMED}
    return kept | {RENAMED[name]: given[name] for name in old}


def parameters() -> list[Parameter]:
    """Each option as a function takes it: by name, with its default, and what may be written for it."""
    kinds = get_type_hints(Given)
    return [
        Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=kinds[each.name])
        for each in fields(Options)
    ]


def described() -> str:
    """A line or more for each option: its name, its meaning, what there is to choose, its default."""
    return "\n".join(["Options, each by name; None stands for the default:", *map(_described, fields(Options))])


def _described(each: Any) -> str:
    choices, default = each.metadata["choices"], each.default
    one_of = f" One of {', '.join(choices)}." if choices else ""
    usual = "" if default is None or default == () else f" Default: {default!r}."
    text = f"{each.name}: {each.metadata['help']}{one_of}{usual}"
    return fill(text, 100, initial_indent="    ", subsequent_indent=" " * 8, break_on_hyphens=False)


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return f"--{name.replace('_', '-')}"


def _kept(each: Any, value: Any) -> Any:
    """What is kept of an option that a caller gave; None, which stands for the default, and the default as they are."""
    if value is None or value is each.default:
        return each.default
    kind, choices = each.metadata["kind"], each.metadata["choices"]
    found = kind(each.name, value) if kind else value
    return values.one_of(each.name, found, choices) if choices else found


def address(host: str) -> str:
    """A server's address in the one form that all its spellings have.

    Raises UsageError for what cannot be one, or holds a secret.
    """
    try:
        parts = urlsplit(host.strip())
        name, port = parts.hostname or "", parts.port
        if "[" in parts.netloc:
            name = f"[{ip_address(name)}]"
        fits = parts.scheme in PORTS and name.encode("idna") and port != 0
    except ValueError:  # UnicodeError is one: a label that is empty, or longer than names may be
        fits, parts, name, port = False, urlsplit(""), "", None
    if parts.username or parts.password:
        raise UsageError("the host's address must not hold a name or a password: keys come from NDIF_API_KEY")
    if not fits or parts.query or parts.fragment:
        raise UsageError(f"host {host!r} is not an address: write for example http://127.0.0.1:8001")
    at = "" if port in (None, PORTS[parts.scheme]) else f":{port}"
    return f"{parts.scheme}://{name}{at}{parts.path.rstrip('/')}"


Options.__signature__ = Signature(parameters())
Options.__doc__ = f"{Options.__doc__}\n{described()}\n"
