"""Loss, accuracy and macro F1 over all examples of a split."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ft.data.batches import batches_by_length, collate
from ft.data.examples import Example
from ft.device import Precision
from ft.distributed.ranks import SINGLE_PROCESS, Ranks
from ft.evaluation.classification import count_confusions, macro_f1
from ft.io.progress import Count, no_progress
from ft.model.gpt2 import GPT2


class Evaluation(NamedTuple):
    """The result of evaluating a split.

    Attributes:
        loss: mean cross-entropy over the target tokens, in nats.
        accuracy: the fraction of examples whose label is predicted correctly; for completions, the fraction of target
            tokens that are the most likely of the vocabulary.
        macro_f1: the unweighted mean of the F1 of each label; None without labels.
        probabilities: (examples, labels), of each label for each example, in order; None without labels.
    """

    loss: float
    accuracy: float
    macro_f1: float | None = None
    probabilities: Tensor | None = None


@torch.no_grad()  # not inference_mode(), in which a sharded model would gather weights that training cannot use
def evaluate(
    model: GPT2,
    examples: Sequence[Example],
    label_ids: Sequence[int],
    *,
    batch_size: int,
    precision: Precision,
    stop_requested: Callable[[], bool] = lambda: False,
    ranks: Ranks = SINGLE_PROCESS,
    progress: Count = no_progress,
) -> Evaluation | None:
    """Compute the loss, accuracy and macro F1 of `model` on all examples.

    The prediction is the most likely label token, or without labels the most likely token. No random number is drawn
    and the mode of the model is restored: a run ends in the same weights whether or not it evaluates.

    Args:
        model: the model, on the device of `precision`.
        examples: the examples; all ranks are given the same and share the work.
        label_ids: the token of each label; empty for completions.
        batch_size: examples per forward pass and rank.
        precision: device and autocast dtype.
        stop_requested: called before each batch; evaluation ends early if it returns true.
        ranks: the processes that evaluate together.
        progress: called with the number of examples of each batch when it is computed, or queued on a GPU.

    Returns:
        The result over all examples, the same on all ranks; None if `stop_requested` returned true.
    """
    device = precision.device
    candidates = torch.tensor(label_ids, device=device)
    loss_sums, hits, label_logits, own_rows = [], [], [], []  # of each batch
    was_training = model.training
    model.eval()
    for rows in batches_by_length(examples, batch_size, ranks.size):
        if stop_requested():
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
        progress(len(rows))
    model.train(was_training)
    # Read the results once, at the end: each read from an accelerator waits for all queued work.
    sums = torch.stack([torch.stack(values).cpu().double().sum() for values in (loss_sums, hits)])
    num_targets = sum(len(example.target_ids) for example in examples)
    loss, accuracy = (ranks.sum(sums) / num_targets).tolist()
    if not label_ids:
        return Evaluation(loss, accuracy)
    own_logits = torch.cat(label_logits).cpu()  # the last row may be of an example that only fills a batch
    labels = [label_ids.index(token) for row in own_rows for token in examples[row].target_ids]
    predicted = own_logits.argmax(dim=-1)[: len(labels)]
    confusion = ranks.sum(count_confusions(torch.tensor(labels, dtype=torch.int64), predicted, len(label_ids)))
    probabilities = torch.zeros(len(examples), len(label_ids))
    probabilities[own_rows] = own_logits.softmax(dim=-1)[: len(own_rows)]
    return Evaluation(loss, accuracy, macro_f1(confusion), ranks.sum(probabilities))
