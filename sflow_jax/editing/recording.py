"""What exact replay needs of a source, kept while its picture is inverted: no batch of edits has its row then.

Exact replay ("residual") evaluates velocities where inversion evaluated them, so what layers lend there is known.
"""

import dataclasses

from sflow_jax.editing.bank import SourceBank, lent_places, needed_bytes, takes_anything
from sflow_jax.editing.branches import Branches
from sflow_jax.editing.editor import Editor, Prompts
from sflow_jax.editing.methods import Method
from sflow_jax.editing.paths import injection
from sflow_jax.models.lending import Lent
from sflow_jax.painter import Painter
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.results import Inversion
from sflow_jax.sampling.solve import Reached


@dataclasses.dataclass
class Recorder:
    """Fills a bank while a picture is inverted.

    lent: what every step hands out; None where edits take nothing. taken: whether they do, an interval, from the
    picture to noise.
    """

    bank: SourceBank
    lent: Lent | None
    taken: list[bool]

    def see(self, reached: Reached) -> None:
        """The end of an interval."""
        self.bank.add(reached, self.taken[len(self.bank.entries)])

    def finished(self, editor: Editor, method: Method, layers: tuple[int, ...]) -> Inversion:
        """The editor's inversion with the bank, for edits by this method."""
        inversion, intervals = editor.inversion, method.steps - method.left_out
        self.bank.reverse(inversion.trajectory, intervals, editor.source_row(method, layers).key)
        return dataclasses.replace(inversion, bank=self.bank)


def recorder(
    painter: Painter,
    canvas: Canvas,
    prompts: Prompts,
    branches: Branches,
    method: Method,
    layers: tuple[int, ...],
    attentions: str,
    bank: SourceBank | None,
) -> Recorder | None:
    """What fills a bank; None where there is none, no room, or an inversion that evaluates something else.

    It evaluates what the source's row would with the same guidance, one branch of it, and no skip-layer guidance.
    """
    same = prompts.branches == 1 and prompts.guidance[0] == method.inversion_guidance and not branches.layers
    if bank is None or not (method.replays_exactly and same):
        return None
    control = injection(method, layers, 1, painter.layers, attentions)
    taken = [takes_anything(control.interventions(i)) for i in reversed(range(method.steps))]
    places = lent_places(control, painter.info.family.own_attentions(painter.info.configs))
    if not bank.begin(None, places, needed_bytes(painter, canvas, places, sum(taken)), painter.mesh):
        return None
    return Recorder(bank, Lent(places) if len(places) else None, taken)
