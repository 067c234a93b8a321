"""GPT-2, as published: a decoder-only transformer with layer norm before each sub-layer and tied embeddings.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3, on top of the decoder of
Vaswani et al., "Attention Is All You Need" (2017). Parameter names and shapes are those of the published weights, so
that loading and saving map tensors by name and transpose nothing.

Letters in shapes: B sequences, T tokens of the longest, N real tokens of the whole batch (packed), S selected rows,
C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
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
from ft.model.matmul import affine, matrix_products
from ft.model.packing import Packing, Selection

ActivationCheckpointing = Literal["none", "full", "selective"]

# What DistributedDataParallel, `torch.compile` and `transformers` put before the names of tensors.
_PREFIXES = re.compile(r"^((module|_orig_mod|transformer)\.)+")
# The heads that `transformers` puts on a GPT-2 in place of the language model's.
_OTHER_HEADS = {
    "score": "GPT2ForSequenceClassification",
    "classifier": "GPT2ForTokenClassification",
    "qa_outputs": "GPT2ForQuestionAnswering",
    "multiple_choice_head": "GPT2DoubleHeadsModel",
}

# Up to so many rows the head computes in fp32 under autocast too. For each number of the (V, C) table, forward and
# backward move 12 bytes in fp32 (read, read, write the gradient), and 18 with a cast (read 4, write 2, read 2, read 2,
# write 2, and the gradient's cast 6). With S rows they compute 6 S operations per number, which the 12 bytes hide up to
# S = 2 x operations per byte of the device: 40 on an H100, 20 on an A100; both are equal at 1.5 times as many rows.
FP32_HEAD_ROWS = 32


@dataclass(frozen=True)
class GPT2Config:
    """The numbers that make a GPT-2, named as in a published `config.json`; defaults are those of the 124M model."""

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

    # What the published configuration may say of variants, and the values that this module computes: a model trained
    # another way would load without complaint and predict nonsense. GELU's tanh approximation has several names.
    FIXED = {  # noqa: RUF012
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }

    # Far above any GPT-2: what lies beyond is a mistake, and is to be told before memory is asked for.
    LARGEST = {  # noqa: RUF012
        "vocab_size": 2**22,
        "n_positions": 2**20,
        "n_embd": 2**16,
        "n_layer": 2**10,
        "n_head": 2**10,
        "n_inner": 2**18,
    }

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> "GPT2Config":
        """Reads a published `config.json`.

        Raises:
            FtError: it is not a GPT-2 that this module computes, or a size is impossible.
        """
        problems = [
            f"{key} is {published[key]!r}, this program computes {values[0]!r}"
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
            raise FtError("not a GPT-2 configuration that this program can run: " + "; ".join(problems))
        return config


class Linear(nn.Module):
    """y = x W + b with W kept as (in, out), the layout of the published files (`nn.Linear` keeps the transpose)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.half_copies: tuple[Tensor, Tensor] | None = None  # what `HalfWeights` puts in place of the two

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """W (in, out) and b (out,), in the dtype to multiply in."""
        return self.half_copies or (self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        return affine(x, *self.weight_and_bias())


class Attention(nn.Module):
    """Causal multi-head self-attention: softmax(Q K^T / sqrt(D)) V, each row seeing itself and the rows before it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_embd, self.n_head = config.n_embd, config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one matrix product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.attn_pdrop = config.attn_pdrop
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor, packing: Packing, selection: Selection | None = None) -> Tensor:
        """(N, C) -> (N, C), or (S, C) for a selection: its queries against everybody's keys and values."""
        if selection is None:
            queries, keys, values = packing.unpack(self.c_attn(hidden_states)).chunk(3, dim=-1)  # (B, T, C) each
        else:
            weight, bias = self.c_attn.weight_and_bias()
            query_weight, key_value_weight = weight.split((self.n_embd, 2 * self.n_embd), dim=1)
            query_bias, key_value_bias = bias.split((self.n_embd, 2 * self.n_embd))
            selected = hidden_states.index_select(0, selection.rows)
            queries = selection.packing.unpack(affine(selected, query_weight, query_bias))  # (B, Q, C)
            keys, values = packing.unpack(affine(hidden_states, key_value_weight, key_value_bias)).chunk(2, dim=-1)
        keys, values = packing.with_past(self, keys, values)

        # Padding stands behind every real row, so that the causal mask alone keeps real rows from seeing it. A row by
        # itself has nothing behind it, but perhaps a past, all of which it sees.
        attended = F.scaled_dot_product_attention(
            self._by_head(queries),
            self._by_head(keys),
            self._by_head(values),
            attn_mask=None if selection is None else selection.mask,
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
    """Two linear layers with GPT-2's tanh approximation of GELU between them (Hendrycks & Gimpel, 2016)."""

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
    """One layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor, packing: Packing, selection: Selection | None = None) -> Tensor:
        """(N, C) -> (N, C), or (S, C) for the rows of a selection only."""
        residual = hidden_states if selection is None else hidden_states.index_select(0, selection.rows)
        residual = residual + self.attn(self.ln_1(hidden_states), packing, selection)
        return residual + self.mlp(self.ln_2(residual))


class TiedEmbedding(torch.autograd.Function):
    """The look-up of tokens, and the same table once more for the head, whose two gradients become one array.

    That of the head is dense, (V, C). Of the look-up's only N rows are not 0: they are added into the head's where it
    lies. Without this, autograd makes a second (V, C) array, 154 MB for the 124M model, and a third for the sum.
    """

    @staticmethod
    def forward(context: Any, table: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """(V, C) and (N,) -> the tokens' rows (N, C), and the table (V, C) as the head is to take it."""
        context.save_for_backward(input_ids)
        return table.index_select(0, input_ids), table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(context: Any, of_rows: Tensor, of_head: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """(N, C) and (V, C), an array that the head's backward pass has made for this and nobody else has -> (V, C)."""
        (input_ids,) = context.saved_tensors
        return of_head.index_add_(0, input_ids, of_rows), None


class GPT2(nn.Module):
    """Token and position embeddings, `n_layer` blocks, a last layer norm, and the token embeddings once more as head.

    The parameters are left uninitialised: fill them with `init_weights` or with published ones.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
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
        """Keep copies of the blocks' weights in `dtype` from now on, to be used under autocast to that dtype.

        The weights must lie on their device. Who changes them calls `half_weights.refresh`, as `AdamW` does.
        """
        layers = {block: [m for m in block.modules() if isinstance(m, Linear)] for block in self.h}
        self.half_weights = HalfWeights(layers, dtype)

    def forward(
        self,
        input_ids: Tensor,
        packing: Packing,
        selection: Selection | None = None,
        candidates: Tensor | None = None,
    ) -> Tensor:
        """The logits of the token that follows each row.

        Args:
            input_ids: (N,) int64, the tokens of all sequences, packed.
            packing: which row belongs to which sequence.
            selection: the rows whose logits are wanted; all when left out.
            candidates: (K,) int64, the tokens whose logits are wanted; the whole vocabulary when left out.

        Returns:
            (S, V) logits of the selected rows, or (N, V) of all; with candidates K columns instead of V.
        """
        tokens, table = TiedEmbedding.apply(self.wte.weight, input_ids)  # (N, C), (V, C)
        hidden_states = self.drop(tokens + self.wpe(packing.positions))  # (N, C)
        call = self._checkpointed_call()
        for block in self.h[:-1]:
            hidden_states = call(block, hidden_states, packing)
        hidden_states = call(self.h[-1], hidden_states, packing, selection)  # (S, C)
        return self.logits(hidden_states, table if candidates is None else table[candidates])

    def logits(self, hidden_states: Tensor, table: Tensor) -> Tensor:
        """The last norm and the head: (S, C) and the rows of the token table, (V, C) -> (S, V)."""
        hidden_states = self.ln_f(hidden_states)
        device_type = hidden_states.device.type
        if len(hidden_states) <= FP32_HEAD_ROWS and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return affine(hidden_states.float(), table.T)
        return affine(hidden_states, table.T)

    def _checkpointed_call(self) -> Callable[..., Tensor]:
        """How to call a block: as it is, or so that its activations are recomputed in the backward pass.

        Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016) keeps each block's
        input and computes the rest anew; `selective` also keeps the results of matrix products, the dear part. The
        random state is restored for the second pass, so that dropout drops the same and gradients are the same.
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
    def load_published(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies published weights into the parameters, one tensor at a time, converted to the parameters' dtype.

        Published files differ: some prefix every name (`_PREFIXES`), some carry the causal masks that the first code
        kept as buffers (`h.0.attn.bias`, `h.0.attn.masked_bias`), some the head, which must be the embedding.

        Raises:
            FtError: a tensor is missing, superfluous or of another shape than the configuration says.
        """
        missing, problems = dict(self.named_parameters()), []
        head: Tensor | None = None
        for published_name, tensor in tensors:
            name = _PREFIXES.sub("", published_name)
            other = _OTHER_HEADS.get(name.partition(".")[0])
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue
            if name == "lm_head.weight":
                head = tensor
            elif other is not None:
                problems.append(
                    f"{published_name} is the head of a {other}, where this program needs the language model's: load "
                    "the folder by AutoModelForCausalLM in transformers, which leaves it out, and save_pretrained"
                )
            elif name not in missing:
                problems.append(f"{published_name} is no tensor of a GPT-2 with {self.config.n_layer} layers")
            else:
                problems += self._fill(missing.pop(name), tensor, published_name)
        if head is not None and "wte.weight" in missing:  # safetensors' save_model keeps one name of a shared tensor
            problems += self._fill(missing.pop("wte.weight"), head, "lm_head.weight")
        problems += [f"{name} is missing" for name in missing]
        if head is not None and not problems and not torch.equal(head.to(self.wte.weight), self.wte.weight):
            problems.append("lm_head.weight differs from wte.weight: the head is not tied to the embeddings")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise FtError("the weights do not fit the configuration: " + "; ".join(problems[:5]) + more)

    def _fill(self, parameter: Tensor, tensor: Tensor, published_name: str) -> list[str]:
        """Copy a published tensor into a parameter; returns what is wrong with it, if anything is."""
        if tensor.shape != parameter.shape:
            shapes = tuple(tensor.shape), tuple(parameter.shape)
            return [f"{published_name} has shape {shapes[0]}, the configuration says {shapes[1]}"]
        if not tensor.is_floating_point():
            return [f"{published_name} holds {tensor.dtype}, not floating-point numbers"]
        if not torch.isfinite(parameter.copy_(tensor).sum()):  # a sum is finite only if all its terms are
            return [f"{published_name} holds infinities or values that are no numbers"]
        return []

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter with GPT-2's initialisation (section 2.3 of the paper; 0.02 is from its released code).

        Weights and embeddings are normal with standard deviation `initializer_range`; those that write into the
        residual stream are scaled by 1/sqrt(2 n_layer), as that many are added up there. Biases are 0, norms 1 and 0.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name or name.startswith("ln_"):
                parameter.fill_(1.0)
            else:
                scale = 1 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                parameter.copy_(
                    torch.empty(parameter.shape).normal_(
                        0.0, self.config.initializer_range * scale, generator=generator
                    )
                )


def _run(block: nn.Module, *inputs: Any) -> Tensor:  # noqa: ANN401
    """`block(*inputs)`."""
    return block(*inputs)


def _keep_matrix_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ANN401
    """What selective activation checkpointing keeps of a block."""
    return CheckpointPolicy.MUST_SAVE if op in matrix_products() else CheckpointPolicy.PREFER_RECOMPUTE
