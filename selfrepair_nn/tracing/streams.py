"""How far the residual stream behind whole layers moved, where they are deleted or composed anew."""

from selfrepair_nn.tracing.objects import Bundle
from selfrepair_nn.tracing.readouts import widen


class StreamReadings:
    """Readings of a plan: the distance in lengths of what the layers write in the clean run."""

    def clean(self, block, scale):
        """Nothing that is stored: the length of what each block of layers writes, [prompt, position]."""
        blocks = {(site.layer, site.stop) for case in block.plan["cases"] for site in case}
        return {"block_lengths": {each: _length(block, *each) for each in sorted(blocks)}}

    def changes(self, changes, batch, effects, scale, state, plan):
        """stream_distance [row, position]."""
        return {"stream_distance": batch.in_rows(lambda case: _distance(case, state)).to(scale)}


class SeveralReadings(Bundle):
    """Several readings of a plan, as one."""

    parts: list

    def clean(self, *given):
        return {name: x for part in self.parts for name, x in part.clean(*given).items()}

    def changes(self, *given):
        return {name: x for part in self.parts for name, x in part.changes(*given).items()}


def _length(block, first, stop):
    entering, leaving = (widen(block.home(block.clean["input"][layer])) for layer in (first, stop))
    return (leaving - entering).norm(dim=-1)


def _distance(case, state):
    [(site, edit)] = case.edits.items()
    clean = state["block_lengths"][site.layer, site.stop]
    return edit.written.norm(dim=-1).to(clean.device) / clean
