"""Export a fine-tuned model as `GPT2ForSequenceClassification` of `transformers`, with the same probabilities.

The head of the language model is tied: the logit of a token is the product of the last hidden state and the token's row
of the embedding. The rows of the label tokens are therefore the classifier's head, `score.weight`, and nothing is
trained. What a run feeds is left to the tokenizer: it appends end-of-text, whose hidden state the classifier reads, and
of a longer text it keeps the end.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from ft.checkpoint.store import copied_fields
from ft.checkpoint.tokenizer_files import GENERAL_CLASS
from ft.data.examples import END_OF_TEXT
from ft.errors import FtError
from ft.export.weights import exported_weights
from ft.inference.classifier import Classifier
from ft.io.atomic import StagedDirectory
from ft.io.model_layout import CLASSIFIER, CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from ft.io.safetensors_file import safetensors_chunks

# A padding token of its own: the classifier reads the last token that is not padding, which is end-of-text. It must not
# be one that the tokenizer has already, as texts may contain that.
PADDING = "<|padding|>"

CLASSIFIER_METADATA = {"library_name": "transformers", "pipeline_tag": "text-classification"}
CLASSIFIER_USAGE = """\
```python
from transformers import pipeline

source = "."  # this directory, or the model's id on the Hub
classify = pipeline("text-classification", model=source, truncation=True, top_k=None)
print(classify(["an input like the training data"], batch_size=8))
```

`truncation=True` keeps the end of an input that is longer than in training.
"""


def write_classifier(staged: StagedDirectory, classifier: Classifier) -> None:
    """Write a classifier that `transformers` loads by AutoModelForSequenceClassification and AutoTokenizer.

    Args:
        staged: the directory.
        classifier: a model with label names, on the CPU.

    Raises:
        FtError: the label names are unknown, or the tokenizer has no end-of-text.
        OSError: the disk is full, or the system refuses.
    """
    names = classifier.label_names
    tokenizer, padding = _tokenizer(classifier.tokenizer)
    ids = tokenizer.get_vocab()
    weights = _weights(classifier, ids[padding])
    config: dict[str, Any] = copied_fields(classifier.published, classifier.model.config.vocab_size)
    config |= asdict(replace(classifier.model.config, vocab_size=len(weights["transformer.wte.weight"])))
    config |= {
        "model_type": "gpt2",
        "architectures": [CLASSIFIER],
        "dtype": "float32",
        "eos_token_id": ids[END_OF_TEXT],
        "pad_token_id": ids[padding],
        "problem_type": "single_label_classification",
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }
    staged.write_json(CONFIG, config)
    staged.write(TOKENIZER, [tokenizer.to_str().encode()])
    staged.write_json(
        TOKENIZER_CONFIG,
        {
            "tokenizer_class": GENERAL_CLASS,
            "model_max_length": classifier.max_length - 1,  # without the label, which is a target only
            "truncation_side": "left",
            "padding_side": "right",
            "eos_token": END_OF_TEXT,
            "pad_token": padding,
            "clean_up_tokenization_spaces": False,
            # The class adds token_type_ids otherwise, whose embeddings GPT-2 would add to those of the tokens.
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    staged.write(WEIGHTS, safetensors_chunks(weights, metadata={"format": "pt"}))


def _weights(classifier: Classifier, padding_id: int) -> dict[str, Tensor]:
    """The tensors by the names of `transformers`, with a row of the embedding for the padding token."""
    weights = {f"transformer.{name}": tensor for name, tensor in exported_weights(classifier.model).items()}
    embedding = weights["transformer.wte.weight"]
    new_rows = embedding.new_zeros(max(0, padding_id + 1 - len(embedding)), embedding.shape[1])
    weights["transformer.wte.weight"] = torch.cat([embedding, new_rows])
    weights["score.weight"] = embedding[classifier.label_ids]
    return weights


def _tokenizer(trained: Tokenizer) -> tuple[Tokenizer, str]:
    """A copy of a tokenizer that appends end-of-text, and its padding token.

    Raises:
        FtError: it has no end-of-text.
    """
    end = trained.token_to_id(END_OF_TEXT)
    if end is None:
        raise FtError(f"the tokenizer has no token {END_OF_TEXT}; it is not a GPT-2 tokenizer")
    tokenizer = Tokenizer.from_str(trained.to_str())
    content = PADDING
    while tokenizer.token_to_id(content) is not None:
        content = f"<{content}>"
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END_OF_TEXT}", pair=f"$A $B:1 {END_OF_TEXT}:1", special_tokens=[(END_OF_TEXT, end)]
    )
    return tokenizer, content
