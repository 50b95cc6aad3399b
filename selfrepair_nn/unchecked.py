"""What can be told of the damage of stores of format 1: no checksums, and chunks of blanks are left out."""

from collections.abc import Iterator

import numpy as np

from selfrepair_nn.contents import Contents, Damage, Marks, attempted
from selfrepair_nn.quantities import recorded


def unreadable(contents: Contents, deep: bool) -> Iterator[Damage]:
    """What is lost, cut or, if `deep`, not to be decoded, and then also blanks in what is marked done."""
    for each in contents.fixed if deep else ():
        if attempted(contents, each.name) is None:
            yield Damage(each.files()[0], "damaged", each.name)
    marks, selected = Marks(contents), attempted(contents, "selected")
    for block in range(contents.blocks):
        marked = marks.block(block)
        if marked is None:
            yield Damage(contents.mark(block), "damaged", "done", block)
        elif marked.any():
            counted = marked if selected is None else marked & selected[..., None]
            yield from _of_block(contents, block, counted if deep else None)


def _of_block(contents: Contents, block: int, counted: np.ndarray | None) -> Iterator[Damage]:
    always = recorded(("always",), "clean", "ablated", "derived")
    full = () if "kept_share" in contents.attributes else {each.name for each in always}
    for name, file in contents.block_files(block):
        path = contents.path / file
        if not path.exists():
            what = "missing" if name in full else None
        elif counted is None:
            what = None if path.stat().st_size else "empty"
        else:
            what = _flaw(contents, name, file, counted if name in full else None)
        if what:
            yield Damage(file, what, name, block)


def _flaw(contents: Contents, name: str, file: str, counted: np.ndarray | None) -> str | None:
    """Of one chunk; `counted` [layer, head, prompt] or [case, prompt] is where it must hold numbers, if it must."""
    metadata = contents.metadata[name]
    steps, index = metadata["chunk_grid"]["configuration"]["chunk_shape"], file.split("/")[2:]
    here = tuple(slice(int(i) * n, (int(i) + 1) * n) for i, n in zip(index, steps, strict=True))
    values = attempted(contents, name, here)
    if values is None:
        return "damaged"
    if counted is None:
        return None
    if not {"layer", "case"} & set(metadata["dimension_names"]):
        return _blank(values, np.any(counted.reshape(-1, counted.shape[-1]), axis=0))
    return _blank(values, counted)


def _blank(values: np.ndarray, counted: np.ndarray) -> str | None:
    return "blank where it is marked done" if (np.isnan(values).any(-1) & counted).any() else None
