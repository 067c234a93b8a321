"""The section of a model card on use: how other programs and this one load the model, one snippet for each."""

from collections.abc import Sequence

_CLASSIFY = """\
The label is the next token after the input and `<|endoftext|>`:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source = "."  # this directory, or the model's id on the Hub
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source).eval()
labels = {labels}
label_ids = {label_ids}  # the token that stands for each

text = "an input like the training data"
ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][-{length}:]
with torch.inference_mode():
    logits = model(torch.tensor([ids])).logits[0, -1, label_ids]
print(dict(zip(labels, logits.softmax(dim=-1).tolist())))
```

The same with ft, in Python and on the command line:

```python
import ft

classifier = ft.load(".")
print(classifier.predict(["an input like the training data"]))
```

```sh
python run.py predict . "an input like the training data"
```

A pipeline for text classification needs the head of a classifier, which this directory does not have: `transformers`
would add an untrained one. ft writes a copy whose head is the rows of the label tokens, with the same probabilities:

```sh
python run.py export . --to classifier --output ../classifier
```

```python
from transformers import pipeline

classify = pipeline("text-classification", model="../classifier", truncation=True, top_k=None)
print(classify(["an input like the training data"]))
```
"""

_COMPLETE = """\
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source = "."  # this directory, or the model's id on the Hub
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source).eval()

prompt = tokenizer("an input like the training data", return_tensors="pt")
with torch.inference_mode():
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

The same by a pipeline, and with ft, in Python and on the command line:

```python
from transformers import pipeline

complete = pipeline("text-generation", model=".", return_full_text=False)
print(complete("an input like the training data", max_new_tokens=20, do_sample=False)[0]["generated_text"])
```

```python
import ft

print(ft.load(".").generate("an input like the training data", max_new_tokens=20))
```

```sh
python run.py generate . "an input like the training data" --max-new-tokens 20
```
"""

_OTHERS = """\
For llama.cpp and the programs built on it, ft writes one file, with its own card:

```sh
python run.py export . --to gguf --output ../gguf
```

`peft` adds adapters to this model as to any GPT-2. vLLM lists GPT-2 among its models (`vllm serve .`); it has not been
run on this one.
"""


def usage(label_names: Sequence[str], label_ids: Sequence[int], max_length: int) -> str:
    """The section in Markdown, without its heading.

    Args:
        label_names: the label names; empty for completions.
        label_ids: the token of each label.
        max_length: tokens of an example in training, end-of-text and label included.
    """
    if not label_names:
        return f"{_COMPLETE}\n{_OTHERS}"
    classify = _CLASSIFY.format(labels=repr(list(label_names)), label_ids=list(label_ids), length=max_length - 1)
    return f"{classify}\n{_OTHERS}"
