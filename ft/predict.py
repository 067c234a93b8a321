"""What a fine-tuned model says of a text."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ft.data import Split, by_length, encode, in_batches, require_utf8
from ft.gpt2 import GPT2


@torch.inference_mode()
def predict(
    model: GPT2,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    label_ids: Sequence[int],
    *,
    max_length: int,
    batch_size: int = 64,
) -> Tensor:
    """The probability of each label for each text, shape (texts, labels): the label tokens' logits through softmax.

    No other token's logit is computed. The model is left in the mode it was found in.

    Raises:
        FtError: a text cannot be written as UTF-8.
    """
    if not texts:
        return torch.empty(0, len(label_ids))
    for number, text in enumerate(texts, start=1):
        require_utf8(text, f"text {number:,}")
    device = model.wte.weight.device
    # The label of an example is only its target, so that any will do here.
    examples = encode(Split("given", list(texts), [0] * len(texts)), tokenizer, label_ids, max_length)
    candidates = torch.tensor(label_ids, device=device)
    order = by_length(examples)
    was_training = model.training
    model.eval()
    logits = [
        model(batch.input_ids, batch.packing, batch.selection, candidates)
        for batch in (batch.to(device) for batch in in_batches(examples, order, batch_size))
    ]
    model.train(was_training)
    probabilities = torch.empty(len(texts), len(label_ids))
    probabilities[order] = torch.cat(logits).float().softmax(dim=-1).cpu()
    return probabilities
