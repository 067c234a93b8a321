"""A text continued, token by token: the model says what follows, one token is chosen, and is read in its turn."""

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer

from ft.data.examples import END_OF_TEXT, require_utf8
from ft.errors import FtError, UsageError
from ft.inference.kv_cache import Continuation
from ft.inference.sampling import Sampling
from ft.model.gpt2 import GPT2, Linear
from ft.model.matmul import laid_out_for_one_row
from ft.model.packing import Selection


class Generation:
    """A continuation of a prompt. Iterate over it for the text, which comes in pieces as it is written.

    Attributes:
        prompt_ids: the tokens of the prompt; an empty one is end-of-text, after which a new text begins.
        token_ids: the tokens generated so far, without the end-of-text that ends them.
        stopped_by: what ended it, in words: end-of-text, `max_new_tokens`, or the last of the model's positions. Empty
            until then.
    """

    def __init__(
        self, model: GPT2, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, sampling: Sampling
    ) -> None:
        """Read the prompt; nothing is generated yet.

        The model must be in evaluation mode.

        Raises:
            UsageError: `max_new_tokens` is less than 1.
            FtError: the prompt is no UTF-8 or has more tokens than the model has positions, or the tokenizer knows no
                end-of-text.
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
        self._pieces = whole_characters(tokenizer, self._tokens())

    def __iter__(self) -> Iterator[str]:
        """The text, in pieces of whole characters; once, as from a file."""
        return self._pieces

    @torch.inference_mode()
    def _tokens(self) -> Iterator[int]:
        model, length = self._model, len(self.prompt_ids)
        device = model.wte.weight.device
        generator = torch.Generator().manual_seed(self._sampling.seed)
        for module in model.modules():
            if isinstance(module, Linear):
                module.weight.data = laid_out_for_one_row(module.weight.data)

        # The last token chosen is not read any more, so that there may be one more than positions.
        room = min(length - 1 + self._max_new_tokens, model.config.n_positions)
        rows = Continuation.of_prompt(length, room, device)
        input_ids = torch.tensor(self.prompt_ids, device=device)
        logits = model(input_ids, rows, Selection.last([length], [1]).to(device))  # (1, V), of the last row only
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


def whole_characters(tokenizer: Tokenizer, token_ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come. Bytes of a character that is not complete wait for the others.

    A token of byte-level BPE may end in the middle of a character, which then decodes to the replacement character.
    """
    waiting: list[int] = []
    shown = 0  # characters of what is waiting
    text = ""
    for token in token_ids:
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False)
        whole = text.removesuffix("\ufffd")
        yield whole[shown:]
        shown = len(whole)
        if whole == text:
            waiting, shown, text = [], 0, ""
    yield text[shown:]
