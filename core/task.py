"""States what a model is trained to do, for whatever reports on a run without knowing its model."""

from dataclasses import dataclass
from typing import Any

LOSS = "loss"
NATS_PER_TOKEN = "nats per token"


@dataclass(frozen=True)
class Task:
    """Says what the figures of a run are of. Every LightningModule here has one, as `task`.

    Attributes:
        loss_unit: of each loss, in words.
        counted: what the length and the speed of a run are counted in, as a model's `count` does: `train/COUNTED` and
            `train/COUNTED_per_second` are the scalars.
        position: what the blocks take one vector for.
        predicted: what the model is asked for, in words.
        sample: what a batch has several of.
        documents: what held-out figures are of that does not depend on each other, and intervals are drawn over.
        predicts_next: whether it is the next token of a text that is predicted: then the model can write one, and bits
            per byte and counted pairs say something of it.
        figures: what is measured of held-out data beside the loss, as val/FIGURE; summaries, records and the reports on
            studies have them.
        main: the one of them that runs are compared by, of which more is better; or the loss.
    """

    loss_unit: str
    counted: str
    position: str
    predicted: str = "something of its own"
    sample: str = "sequence"
    documents: str = "documents"
    predicts_next: bool = False
    figures: tuple[str, ...] = ()
    main: str = LOSS


OF_LANGUAGE = Task(
    NATS_PER_TOKEN, counted="tokens", position="token", predicted="the next token of a text", predicts_next=True
)


def task_of(module: Any) -> Task:
    """Return the task of a LightningModule; of one of the user's own that states none, that of a language model."""
    return getattr(module, "task", OF_LANGUAGE)
