"""GPT-2: a decoder-only transformer with layer norm before each sub-layer and tied embeddings.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3; the decoder itself is from
Vaswani et al., "Attention Is All You Need" (2017). Parameter names and shapes are those of the published weights, so
that tensors are loaded and saved by name and none is transposed.

The sequences of a batch are packed: concatenated along one dimension, without padding (see `packing.py`). Shapes in
comments use these letters:

    B  sequences in the batch               C  n_embd, the width of the hidden states
    T  tokens of the longest sequence       H  n_head
    N  tokens of all sequences together     D  C / H, the width of a head
    S  rows selected for the loss           V  vocab_size     (N and S with spare rows, see `Packing`)
    Q  selected rows of one sequence, at most
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ft.errors import FtError, shown
from ft.model.dropout import Dropout
from ft.model.half_weights import HalfWeights
from ft.model.matmul import affine, attention, compiles_shapes, matrix_products, rounds_inputs, rounds_inputs_of
from ft.model.packing import Packing, Selection

ActivationCheckpointing = Literal["none", "full", "selective"]

# Up to this many rows the head computes in fp32 under autocast too: with few rows its time is that of moving the
# (V, C) table, and casting moves more: per element, forward and backward, 18 bytes instead of 12. S rows take 6 S
# operations per element, which memory traffic hides up to S = 2 x the device's operations per byte, about 40 on an H100
# and 20 on an A100; the cast pays off from 1.5 times as many rows. With AMX nothing is cast.
FP32_HEAD_ROWS = 32


@dataclass(frozen=True)
class GPT2Config:
    """Hyperparameters, named as in a published `config.json`; the defaults are those of the 124M model."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    # Options of `transformers` that change the computation, and the values that this module implements. A model trained
    # with another value would load without an error and predict nonsense. GELU's tanh approximation has several names.
    FIXED = {  # noqa: RUF012
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }

    # Far above any GPT-2. A larger value is a mistake, to be reported before memory is allocated.
    LARGEST = {"vocab_size": 2**22, "n_positions": 2**20, "n_embd": 2**16, "n_inner": 2**18}  # noqa: RUF012
    LARGEST |= {"n_layer": 2**10, "n_head": 2**10}

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> "GPT2Config":
        """Reads a published `config.json`.

        Raises:
            FtError: it is not a GPT-2 that this module implements, or a value is out of range; lists all problems.
        """
        problems = [
            f"{key} is {shown(published[key])}, this program computes {values[0]!r}"
            for key, values in cls.FIXED.items()
            if key in published and published[key] not in values
        ]
        config = cls(**{field.name: published[field.name] for field in fields(cls) if field.name in published})
        for name, most in cls.LARGEST.items():
            value = getattr(config, name)
            if not (name == "n_inner" and value is None) and (type(value) is not int or not 1 <= value <= most):
                problems.append(f"{name} is {shown(value)}, it must be a whole number from 1 to {most}")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon", "initializer_range"):
            value = getattr(config, name)
            if type(value) not in (int, float) or not 0 <= value < 1:
                problems.append(f"{name} is {shown(value)}, it must be a number from 0 to below 1")
        if not problems and config.n_embd % config.n_head:
            problems.append(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
        if problems:
            problems.append("openai-community/gpt2 in all sizes, distilbert/distilgpt2 and their fine-tunings work")
            raise FtError("not a GPT-2 configuration that this program can run: " + "; ".join(problems))
        return config


class Linear(nn.Module):
    """y = x W + b with W stored as (in, out), as in the published files; `nn.Linear` stores the transpose."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.half_copies: tuple[Tensor, ...] | None = None  # of all parameters, by `HalfWeights`

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """W (in, out) and b (out,), in the dtype of the matrix product."""
        weight, bias, *_ = self.half_copies or (self.weight, self.bias)
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        return affine(x, *self.weight_and_bias())

    def forward_in_parts(self, x: Tensor, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """(N, in) -> (S, n), the first n columns for the selected rows, and (N, out - n), the others for all rows."""
        weight, bias = self.weight_and_bias()
        sizes = (n, len(bias) - n)
        (first, others), biases = weight.split(sizes, dim=1), bias.split(sizes)
        return affine(x.index_select(0, rows), first, biases[0]), affine(x, others, biases[1])


class Attention(nn.Module):
    """Causal multi-head self-attention: softmax(Q K^T / sqrt(D)) V, where a row attends to itself and earlier rows."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_embd, self.n_head = config.n_embd, config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one matrix product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.attn_pdrop = config.attn_pdrop
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor, packing: Packing, selection: Selection | None = None) -> Tensor:
        """(N, C) -> (N, C); with a selection (S, C): queries of the selected rows, keys and values of all rows."""
        # Attention is the only layer that mixes rows of a sequence, and so the only one that needs the padded form.
        if selection is None:
            queries, keys, values = packing.unpack(self.c_attn(hidden_states)).chunk(3, dim=-1)  # (B, T, C) each
        else:
            selected, others = self.c_attn.forward_in_parts(hidden_states, selection.rows, self.n_embd)
            queries = selection.packing.unpack(selected)  # (B, Q, C)
            keys, values = packing.unpack(others).chunk(2, dim=-1)  # (B, T, C) each
        keys, values = packing.with_past(self, keys, values)

        # Padding follows the real rows, so that the causal mask alone hides it from them. With a KV cache a single new
        # row attends to all cached rows and needs no mask. Selected rows have a mask of their own: `is_causal` would
        # take them for the first rows of their sequences.
        attended = attention(
            self._by_head(queries),
            self._by_head(keys),
            self._by_head(values),
            None if selection is None else selection.mask,
            is_causal=selection is None and queries.shape[1] > 1,
            dropout_p=self.attn_pdrop if self.training else 0.0,
        )
        attended = attended.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        packed = packing.pack(attended) if selection is None else selection.packing.pack(attended)
        return self.resid_dropout(self.c_proj(packed))

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers with the tanh approximation of GELU between them (Hendrycks & Gimpel, 2016)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, n_inner)
        self.c_proj = Linear(n_inner, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(hidden_states), approximate="tanh")))


class Block(nn.Module):
    """One transformer block: x = x + attention(norm(x)), then x = x + MLP(norm(x))."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor, packing: Packing, selection: Selection | None = None) -> Tensor:
        """(N, C) -> (N, C); with a selection (S, C), the selected rows only."""
        residual = hidden_states if selection is None else hidden_states.index_select(0, selection.rows)
        residual = residual + self.attn(self.ln_1(hidden_states), packing, selection)
        return residual + self.mlp(self.ln_2(residual))


class TiedEmbedding(torch.autograd.Function):
    """Embedding look-up and head weight from one table, with one gradient tensor for both.

    The head's gradient is dense, (V, C). The look-up's gradient has at most N non-zero rows, which are added to the
    head's in place. Without this, autograd allocates a second (V, C) tensor, 154 MB for the 124M model, to sum the two.
    """

    @staticmethod
    def forward(context: Any, table: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """(V, C) table and (N,) tokens -> (N, C) token embeddings and (V, C) head weight, a view of the table."""
        context.save_for_backward(input_ids)
        return table.index_select(0, input_ids), table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad_tokens: Tensor, grad_head: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """(N, C) and (V, C) gradients of the two outputs -> (V, C) gradient of the table."""
        (input_ids,) = context.saved_tensors
        # In place: `grad_head` is fresh from the head's backward pass, and nothing else refers to it.
        return grad_head.index_add_(0, input_ids, grad_tokens), None


class GPT2(nn.Module):
    """Token and position embeddings, `n_layer` blocks, a final layer norm, and the token embeddings again as the head.

    The constructor leaves the parameters uninitialized: call `init_weights` or load published weights.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        # Token table, look-up and head at once, and position table. `_weight` skips PyTorch's own initialization.
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, _weight=torch.empty(config.vocab_size, config.n_embd))
        self.wpe = nn.Embedding(
            config.n_positions, config.n_embd, _weight=torch.empty(config.n_positions, config.n_embd)
        )
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.half_weights: HalfWeights | None = None

    def keep_half_weights(self, dtype: torch.dtype) -> None:
        """Keep copies of the blocks' weights in `dtype` and use them under autocast to that dtype.

        Does nothing where products under that autocast read fp32 weights (`rounds_inputs`). The weights must be on
        their final device. Call `half_weights.refresh` after each update, as `AdamW` does.
        """
        if rounds_inputs(self.wte.weight.device.type, dtype):
            return
        layers = {block: [m for m in block.modules() if isinstance(m, Linear)] for block in self.h}
        self.half_weights = HalfWeights(layers, dtype)

    def forward(
        self,
        input_ids: Tensor,
        packing: Packing,
        selection: Selection | None = None,
        candidates: Tensor | None = None,
    ) -> Tensor:
        """Compute the logits of the next token at each row.

        Args:
            input_ids: (N,) int64, the tokens of all sequences, packed.
            packing: the sequence and position of each row.
            selection: the S rows to compute logits for. Default: all N rows.
            candidates: (K,) int64, the tokens to compute logits for. Default: the full vocabulary.

        Returns:
            (S, V) logits, or (N, V) without a selection; with candidates K columns instead of V.
        """
        if compiles_shapes(input_ids):
            packing = packing.with_spare_rows()
            input_ids = F.pad(input_ids, (0, packing.spare))
            selection = None if selection is None else selection.with_spare_rows()
        tokens, table = TiedEmbedding.apply(self.wte.weight, input_ids)  # (N, C), (V, C)
        # Positions count from 0 in each sequence, although all sequences are in one tensor.
        hidden_states = self.drop(tokens + self.wpe(packing.positions))  # (N, C)
        run_block = self._block_runner()
        for block in self.h[:-1]:
            hidden_states = run_block(block, hidden_states, packing)  # (N, C)
        # Nothing after the last block mixes rows, so that from its queries on only the selected rows are computed.
        hidden_states = run_block(self.h[-1], hidden_states, packing, selection)  # (S, C)
        logits = self.logits(hidden_states, table if candidates is None else table[candidates])
        spare = (packing if selection is None else selection.packing).spare
        return logits[:-spare] if spare else logits

    def logits(self, hidden_states: Tensor, table: Tensor) -> Tensor:
        """Final layer norm and head: hidden_states (S, C), rows of the token table (V, C) -> (S, V)."""
        hidden_states = self.ln_f(hidden_states)
        # The head has no weight of its own: a logit is the dot product of a hidden state and a token embedding.
        device_type = hidden_states.device.type
        casts = torch.is_autocast_enabled(device_type) and not rounds_inputs_of(hidden_states)
        if casts and len(hidden_states) <= FP32_HEAD_ROWS:
            with torch.autocast(device_type, enabled=False):
                return affine(hidden_states.float(), table.T)
        return affine(hidden_states, table.T)

    def _block_runner(self) -> Callable[..., Tensor]:
        """The function that runs a block: directly, or with activation checkpointing.

        Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016) stores only the
        input of each block and recomputes its activations in the backward pass; `selective` also stores the results of
        matrix products, the most expensive to recompute. PyTorch restores the random state for the recomputation, so
        that dropout drops the same elements and the gradients are equal.
        """
        run = _run if self.half_weights is None else self.half_weights.run
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return run
        if self.activation_checkpointing == "full":
            return partial(checkpoint, run, use_reentrant=False)
        return partial(
            checkpoint,
            run,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, _keep_matrix_products),
        )

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialize all parameters as `transformers` does, after section 2.3 of the paper.

        Weights and embeddings are drawn from a normal distribution with standard deviation `initializer_range`. The
        2 n_layer projections that add to the residual stream are scaled by 1/sqrt(2 n_layer), which keeps the variance
        of their sum independent of depth. Biases are 0, layer norm weights 1.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name or name.startswith("ln_"):
                parameter.fill_(1.0)
            else:
                scale = 1 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                std = self.config.initializer_range * scale
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def _run(block: nn.Module, *inputs: Any) -> Tensor:  # noqa: ANN401
    """Run a block without half-precision copies."""
    return block(*inputs)


def _keep_matrix_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ANN401
    """Policy of selective activation checkpointing: store results of matrix products, recompute all else."""
    return CheckpointPolicy.MUST_SAVE if op in matrix_products() else CheckpointPolicy.PREFER_RECOMPUTE
