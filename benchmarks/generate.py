"""Tokens per second of greedy decoding, compared with `generate` of `transformers` on the same weights.

    python -m benchmarks.generate --tokenizer DIR

Both continue the same prompts by the same number of tokens, in turns, with random weights of the 124M model's size: the
time per token does not depend on their values. Both must generate the same tokens. The time is that of the full call:
prefill, every token, and for ft decoding the tokens to text as they are generated.
"""

import statistics
import tempfile
from pathlib import Path

import torch
import transformers

from benchmarks.common import benchmark_parser, markdown_table, precision_of, wall_clock, write_result
from ft.inference.language_model import LanguageModel, load_language_model
from tests.reference.synthetic import SIZES, write_model

REVIEW = (
    "a gorgeous , witty , seductive film that holds the interest from its first scene to its last , and a good deal "
)
PROMPTS = (16, 512)
TOKENS = 100


def main() -> None:
    """Measure prompts of each length in turns, and write the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with GPT-2's tokenizer.json")
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--tokens", type=int, help=f"new tokens of each turn (default {TOKENS}, or what fits)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side, after one that warms up (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:1")
    parser.set_defaults(precision="fp32")  # in which ft generates
    options = parser.parse_args()
    n_positions = SIZES[options.size]["n_positions"]
    options.tokens = options.tokens or min(TOKENS, n_positions - min(PROMPTS))
    if not 0 < options.tokens <= n_positions - min(PROMPTS):
        parser.error(
            f"--tokens must be from 1 to {n_positions - min(PROMPTS)}: {options.size} has {n_positions} positions"
        )
    precision = precision_of(options)
    device = precision.device
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.size, tokenizer_from=options.tokenizer)
        ours = load_language_model(folder, device=str(device))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
    words = ours.tokenizer.encode(REVIEW * 60, add_special_tokens=False).ids
    figures = []
    lengths = [length for length in PROMPTS if length + options.tokens <= n_positions]
    for length in lengths:
        prompt = ours.tokenizer.decode(words[:length])
        seconds: dict[str, list[float]] = {"ft": [], "transformers": []}
        for turn in range(options.rounds + 1):
            our_seconds, our_tokens = turn_of_ours(ours, prompt, options.tokens)
            their_seconds, their_tokens = turn_of_transformers(theirs, words[:length], options.tokens)
            if our_tokens != their_tokens or len(our_tokens) != options.tokens:
                raise SystemExit(f"after {length} tokens ft wrote {our_tokens}, transformers {their_tokens}")
            if turn > 0:
                seconds["ft"].append(our_seconds)
                seconds["transformers"].append(their_seconds)
        rates = {name: options.tokens / statistics.median(values) for name, values in seconds.items()}
        ratio = statistics.median(seconds["transformers"]) / statistics.median(seconds["ft"])
        figures.append({"prompt_tokens": length, "seconds": seconds, "tokens_per_second": rates, "ratio": ratio})
        print(figures[-1], flush=True)

    rows = [
        [
            f"{each['prompt_tokens']} tokens",
            f"{each['tokens_per_second']['transformers']:.1f} tokens/s",
            f"{each['tokens_per_second']['ft']:.1f} tokens/s",
            f"{each['ratio']:.2f} x",
        ]
        for each in figures
    ]
    table = markdown_table([f"{options.size}, {options.tokens} new tokens after", "transformers", "ft", ""], rows)
    settings = {"size": options.size, "new_tokens": options.tokens, "rounds": options.rounds}
    write_result(options.output, "generate", {**settings, "prompts": figures}, table, precision=precision)


def turn_of_ours(model: LanguageModel, prompt: str, new_tokens: int) -> tuple[float, list[int]]:
    """Seconds and tokens of ft's continuation."""
    device = model.model.wte.weight.device
    started = wall_clock(device)
    generation = model.stream(prompt, max_new_tokens=new_tokens)
    "".join(generation)
    return wall_clock(device) - started, generation.token_ids


def turn_of_transformers(
    model: transformers.PreTrainedModel, prompt_ids: list[int], new_tokens: int
) -> tuple[float, list[int]]:
    """Seconds and tokens of the continuation by `transformers`, whose cache is on by default."""
    started = wall_clock(model.device)
    prompt = torch.tensor([prompt_ids], device=model.device)
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False)
    return wall_clock(model.device) - started, written[0, len(prompt_ids) :].tolist()


if __name__ == "__main__":
    main()
