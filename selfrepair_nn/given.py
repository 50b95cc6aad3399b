"""What may be written for each option, for people and checkers; `options` has what is kept of it, with its meaning.

Whole numbers are whatever counts (Python's, NumPy's, a tensor of one), and None stands for an option's default.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypedDict

Whole = SupportsIndex | None
Real = SupportsFloat | None
Place = str | PathLike[str] | None
Layers = str | SupportsIndex | slice | Iterable[Any] | None


class Given(TypedDict, total=False):
    """The options of a run, by name."""

    model: Any
    prompts: Any
    out: Place
    tokens: Whole
    length: Whole
    rows_are: Literal["packed", "texts"] | None
    bos: Literal["auto", "always", "never"] | None
    partners: Any
    resamples: Whole
    resamples_as: Literal["all", "moments"] | None
    layers: Layers
    heads: Any
    ablation: str | None
    target: str | None
    value_bias: Literal["output", "head"] | None
    freeze: str | None
    components: Literal["none", "top", "all"] | None
    logprob: Literal["none", "top", "all"] | None
    words: Whole
    split: Literal["sums", "total"] | None
    share: Real
    select: Literal["all", "top-share"] | None
    until_ci: Real
    ci_of: Literal["heads", "layers"] | None
    param: str | Iterable[str] | Mapping[str, Any] | None
    dtype: Any
    device: Any
    revision: str | None
    revisions: str | Iterable[str] | None
    dataset_split: str | None
    column: str | None
    prompts_revision: str | None
    seed: Whole
    mean_prompts: Whole
    batch_size: Whole
    tokens_per_pass: Whole
    workers: Whole
    dask: str | None
    threads: Whole
    shard: str | tuple[int, int] | None
    backend: Literal["local", "simulated"] | None
    check: bool | None
    remote: bool | None
    host: str | Iterable[str] | None
    in_flight: Whole
    patience: Whole
    tensor_parallel: Whole
    job_seconds: Whole
    yes: bool | None
