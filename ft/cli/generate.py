"""The command `generate`: continue a prompt with a model: `python run.py generate RUN [PROMPT]`."""

import sys
import time
from collections.abc import Sequence

from ft.cli.parsers import CommandParser
from ft.cli.predict import add_model
from ft.errors import FtError, UsageError, counted, printable
from ft.inference.sampling import Sampling
from ft.io.standard_streams import LOADING, waiting_line

EXAMPLES = """\
examples:
  python run.py generate runs/rotten_tomatoes "the film"
  python run.py generate openai-community/gpt2 "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
  cat prompt.txt | python run.py generate runs/rotten_tomatoes --max-new-tokens 20
"""


def generate(arguments: Sequence[str]) -> None:
    """Parse the command line, read the prompt, and print its continuation token by token.

    Raises:
        UsageError: the command line is wrong, or there is no prompt.
        FtError: the model cannot be read, or the prompt is too long for it.
    """
    parser = CommandParser("generate", "Continue a prompt, by greedy decoding or sampling.", EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="text to continue (default: standard input, without its last newline)",
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=100, help="generate at most N tokens (default: 100)"
    )
    parser.add_argument(
        "--temperature",
        metavar="X",
        type=float,
        default=0.0,
        help="0 is greedy decoding; otherwise sampling, with the logits divided by X (default: 0)",
    )
    parser.add_argument("--top-k", metavar="N", type=int, help="sample from the N most probable tokens only")
    parser.add_argument(
        "--top-p", metavar="X", type=float, help="sample from the fewest tokens whose probabilities sum to X"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="seed for sampling (default: a new one each time)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: the best present)")
    parser.add_argument("--quiet", action="store_true", help="print the text alone: no speed")
    options = parser.parse_args(arguments)
    problems = list(parser.problems)
    if options.max_new_tokens < 1:
        problems.append(f"--max-new-tokens is {options.max_new_tokens}, it must be at least 1")
    if options.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        problems.append("there is no prompt: pass it as an argument, or through a pipe")
    flags = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    try:
        sampling = Sampling(**{name: value for name, value in flags.items() if value is not None})
    except UsageError as error:
        problems += error.problems
    if problems:
        raise UsageError(*problems)
    prompt = _read_prompt() if options.prompt is None else options.prompt

    with waiting_line(LOADING, quiet=options.quiet):  # only here: --help and usage errors do not wait for torch
        from ft.checkpoint.error_hints import explain_out_of_memory
        from ft.inference.language_model import load_language_model

    on_terminal = sys.stdout.isatty()  # control characters are escaped on a terminal only
    remedy = "a shorter prompt, a smaller --max-new-tokens, a smaller model or another --device"
    with explain_out_of_memory(f"--max-new-tokens {options.max_new_tokens}", remedy):
        model = load_language_model(options.model, device=options.device, base=options.base)
        generation = model.stream(prompt, max_new_tokens=options.max_new_tokens, sampling=sampling)
        started = time.perf_counter()
        for piece in generation:
            print(printable(piece, keep="\n\t") if on_terminal else piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print(flush=True)  # before the figures, where both streams are one file
    if options.quiet:
        return
    count = len(generation.token_ids)
    seed = f", sampled with --seed {sampling.seed}" if sampling.temperature else ""
    print(
        f"{counted(count, 'token')}{seed}, stopped by {generation.stopped_by}; {count / seconds:,.1f} tokens/s, by "
        f"{printable(model.source)}",
        file=sys.stderr,
    )


def _read_prompt() -> str:
    """Read the prompt from standard input.

    Raises:
        FtError: it is empty, or not valid UTF-8.
    """
    try:
        prompt = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FtError(f"standard input is not valid UTF-8: {error.reason} at byte {error.start}") from error
    prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt:
        raise FtError("standard input is empty: there is no prompt")
    return prompt
