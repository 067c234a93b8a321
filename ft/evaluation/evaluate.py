"""Loss and accuracy over a whole split."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ft.data.batches import batches_by_length, collate
from ft.data.examples import Example
from ft.device import Precision
from ft.distributed.ranks import SINGLE_PROCESS, Ranks
from ft.model.gpt2 import GPT2


class Evaluation(NamedTuple):
    """What came out of evaluating a split.

    Attributes:
        loss: the mean over supervised tokens, in nats.
        accuracy: the share of examples with the right label; of completions, the share of target tokens that are the
            likeliest of the whole vocabulary.
        probabilities: of each label for each example, shape (examples, labels), in their order; None without labels.
    """

    loss: float
    accuracy: float
    probabilities: Tensor | None = None


@torch.no_grad()  # not inference_mode(), in which a sharded model would gather weights that training cannot use
def evaluate(
    model: GPT2,
    examples: Sequence[Example],
    label_ids: Sequence[int],
    *,
    batch_size: int,
    precision: Precision,
    stopping: Callable[[], bool] = lambda: False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Evaluation | None:
    """Loss and accuracy of `model` on all examples; None if `stopping` says, before some batch, that the run is to end.

    The prediction is the likeliest of the label tokens, and of all tokens where there are none. Nothing here draws
    random numbers, and the model is left in the mode it was found in: a run that evaluates ends in the same weights as
    one that does not. Several processes share the examples, `batch_size` each at a time, and all get the whole result.
    """
    device = precision.device
    candidates = torch.tensor(label_ids, device=device)
    loss_sums, hits, label_logits, own_rows = [], [], [], []
    was_training = model.training
    model.eval()
    for rows in batches_by_length(examples, batch_size, ranks.size):
        if stopping():
            model.train(was_training)
            return None
        batch = collate(ranks.local_examples([examples[row] for row in rows])).to(device)
        own_rows += ranks.local_items(rows)
        with precision.autocast():
            logits = model(batch.input_ids, batch.packing, batch.selection)  # (S, V)
        loss_sums.append(F.cross_entropy(logits.float(), batch.target_ids, reduction="sum"))
        if label_ids:
            label_logits.append(logits[:, candidates].float())  # (S, labels)
            predicted = candidates[label_logits[-1].argmax(dim=-1)]
        else:
            predicted = logits.argmax(dim=-1)
        hits.append((predicted == batch.target_ids).sum())
    model.train(was_training)
    # Read once, at the end: on an accelerator every read waits for all work that is queued.
    sums = torch.stack([torch.stack(each).cpu().double().sum() for each in (loss_sums, hits)])
    num_targets = sum(len(example.target_ids) for example in examples)
    loss, accuracy = (ranks.sum(sums) / num_targets).tolist()
    if not label_ids:
        return Evaluation(loss, accuracy)
    probabilities = torch.zeros(len(examples), len(label_ids))
    probabilities[own_rows] = torch.cat(label_logits).softmax(dim=-1).cpu()[: len(own_rows)]
    return Evaluation(loss, accuracy, ranks.sum(probabilities))
