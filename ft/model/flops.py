"""The floating-point operations that a training step needs: the usual formula without what the loss does not need.

A matrix product of (R, A) and (A, B) takes 2 R A B operations. With N parameters in matrices a forward pass takes 2 N
of them per token, and a backward pass twice as many, for the gradients of inputs and of weights: 6 N per token (Kaplan
et al., "Scaling Laws for Neural Language Models", 2020, section 2.1). Attention adds 4 C for each pair of a query and a
key, 2 C for Q K^T and 2 C for the product with V, and three times as many with the backward pass (Chowdhery et al.,
"PaLM", 2022, appendix B, which counts all T^2 pairs; here only those that causal attention uses).

That counts what the loss does not need. Not counted here, as the model does not compute it either:

- the head, and all of the last block but its keys and values, at positions without a target (`Selection`);
- gradients of frozen weights, and gradients of inputs below the first block with a trained parameter.

Not counted, although it may be computed: padding, pairs that the causal mask hides, activations that are computed twice
with `--activation-checkpointing`, and everything that is not a matrix product. So it is the work of the model, not that
of the hardware: divided by the time of a step it compares machines and settings.
"""

from collections.abc import Iterable

from ft.model.gpt2 import GPT2


def training_flops(model: GPT2, examples: Iterable[tuple[int, int]]) -> float:
    """The operations of a forward and backward pass over examples.

    Args:
        model: its parameters are trained if they require gradients.
        examples: the number of input tokens T and of targets S of each; the last S positions have the targets.
    """
    tokens = targets = pairs = last_pairs = 0
    for length, count in examples:
        tokens += length
        targets += count
        pairs += length * (length + 1) // 2
        last_pairs += count * length - count * (count - 1) // 2
    width, num_blocks = model.config.n_embd, model.config.n_layer
    is_trained_below = model.wte.weight.requires_grad or model.wpe.weight.requires_grad
    total = 0.0
    for number, block in enumerate(model.h):
        is_last = number == num_blocks - 1
        is_trained_below = is_trained_below or any(parameter.requires_grad for parameter in block.parameters())
        for name, weight in block.named_parameters():
            if weight.dim() != 2:
                continue
            rows: float = targets if is_last else tokens
            if is_last and name == "attn.c_attn.weight":
                rows = (targets + 2 * tokens) / 3  # queries of the targets; keys and values of all tokens
            passes = 1 + weight.requires_grad + is_trained_below
            total += 2.0 * weight.numel() * rows * passes
        total += 4.0 * width * (last_pairs if is_last else pairs) * (3 if is_trained_below else 1)
    is_trained_below = is_trained_below or any(parameter.requires_grad for parameter in model.ln_f.parameters())
    return total + 2.0 * model.wte.weight.numel() * targets * (1 + model.wte.weight.requires_grad + is_trained_below)
