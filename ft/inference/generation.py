"""Text generation: compute the logits of the next token, choose a token, append it, repeat."""

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer

from ft.data.examples import END_OF_TEXT, require_utf8
from ft.errors import FtError, UsageError
from ft.inference.kv_cache import Continuation
from ft.inference.sampling import Sampling
from ft.model.gpt2 import GPT2
from ft.model.packing import Selection
from ft.model.transfer import to_device


class Generation:
    """The continuation of a prompt: an iterator over pieces of text, generated as they are read.

    Attributes:
        prompt_ids: the tokens of the prompt; an empty prompt becomes end-of-text, after which a new text begins.
        token_ids: the tokens generated so far, without the final end-of-text.
        stopped_by: why generation ended: end-of-text, `max_new_tokens`, or the last of the model's positions. Empty
            until then.
    """

    def __init__(
        self, model: GPT2, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, sampling: Sampling
    ) -> None:
        """Tokenize the prompt. Generation starts with the first iteration.

        Args:
            model: in evaluation mode.
            tokenizer: that of the model.
            prompt: the text to continue.
            max_new_tokens: the most tokens to generate, at least 1.
            sampling: how tokens are chosen.

        Raises:
            UsageError: `max_new_tokens` is less than 1.
            FtError: the prompt is not valid UTF-8 or has more tokens than the model has positions, or the tokenizer has
                no end-of-text.
        """
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens is {max_new_tokens}, it must be at least 1")
        end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise FtError(f"the tokenizer has no token {END_OF_TEXT}; it is not a GPT-2 tokenizer")
        require_utf8(prompt, "the prompt")
        self.prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [end_of_text]
        n_positions = model.config.n_positions
        if len(self.prompt_ids) > n_positions:
            raise FtError(
                f"the prompt has {len(self.prompt_ids):,} tokens and the model {n_positions:,} positions: shorten it"
            )
        self.token_ids: list[int] = []
        self.stopped_by = ""
        self._model, self._sampling = model, sampling
        self._end_of_text, self._max_new_tokens = end_of_text, max_new_tokens
        self._pieces = decode_stream(tokenizer, self._tokens())

    def __iter__(self) -> Iterator[str]:
        """Pieces of text that end at character boundaries; can be iterated over once."""
        return self._pieces

    @torch.inference_mode()
    def _tokens(self) -> Iterator[int]:
        model, length = self._model, len(self.prompt_ids)
        device = model.wte.weight.device
        generator = torch.Generator().manual_seed(self._sampling.seed)

        # The last token is not an input, so that there may be one more token than positions.
        capacity = min(length - 1 + self._max_new_tokens, model.config.n_positions)
        rows = Continuation.of_prompt(length, capacity, device)
        input_ids = torch.tensor(self.prompt_ids, device=device)
        logits = model(input_ids, rows, to_device(Selection.last([length], [1]), device))  # (1, V), for the last token
        while (token := self._sampling.choose(logits[0], generator)) != self._end_of_text:
            self.token_ids.append(token)
            yield token
            if len(self.token_ids) == self._max_new_tokens:
                self.stopped_by = "--max-new-tokens"
                return
            if length + len(self.token_ids) > model.config.n_positions:
                self.stopped_by = f"the last of the model's {model.config.n_positions:,} positions"
                return
            rows = rows.next()
            logits = model(torch.tensor([token], device=device), rows)
        self.stopped_by = "end-of-text"


def decode_stream(tokenizer: Tokenizer, token_ids: Iterable[int]) -> Iterator[str]:
    """Decode a stream of tokens into pieces of text that end at character boundaries.

    A token of byte-level BPE may end inside a UTF-8 character, which then decodes to the replacement character; it is
    held back until the following tokens complete it.
    """
    pending: list[int] = []
    num_yielded = 0  # characters of `pending` that have been yielded
    text = ""
    for token in token_ids:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        complete = text.removesuffix("\ufffd")
        yield complete[num_yielded:]
        num_yielded = len(complete)
        if complete == text:
            pending, num_yielded, text = [], 0, ""
    yield text[num_yielded:]
