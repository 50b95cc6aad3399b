"""How far the residual stream behind whole layers moved, where they are deleted or composed anew."""

from selfrepair_nn.tracing.readouts import widen


class StreamReadings:
    """Readings of a plan: the distance in lengths of what the layers write in the clean run."""

    def clean(self, block, scale):
        """Nothing that is stored: the length of what each block of layers writes, [prompt, position]."""
        blocks = {(site.layer, site.stop) for case in block.plan["cases"] for site in case}
        return {"block_lengths": {each: _length(block, *each) for each in sorted(blocks)}}

    def read(self, *given):
        """Of neurons nothing."""

    def changes(self, changes, batch, effects, scale, state, block):
        """stream_distance [row, position]."""
        return {"stream_distance": batch.in_rows(lambda case: _distance(case, state)).to(scale)}


def _length(block, first, stop):
    entering, leaving = (widen(block.home(block.clean["input"][layer])) for layer in (first, stop))
    return (leaving - entering).norm(dim=-1)


def _distance(case, state):
    [(site, edit)] = case.edits.items()
    clean = state["block_lengths"][site.layer, site.stop]
    return edit.written.norm(dim=-1).to(clean.device) / clean
