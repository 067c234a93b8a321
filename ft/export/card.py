"""The model card of an export: that of the model, with how to use the export and other metadata."""

import re
from collections.abc import Mapping
from pathlib import Path

from ft.io.plain_files import read_regular

USAGE_HEADING = "## How to use it"


def export_card(model: Path, usage: str, metadata: Mapping[str, str | list[str]]) -> str:
    """The text of README.md.

    Args:
        model: the directory of the model. Without a readable README.md in it the card is a short one.
        usage: the content of the section on use.
        metadata: fields of the header that replace those of the model's.
    """
    from huggingface_hub import ModelCard, ModelCardData  # here: the import takes half a second

    try:
        card = ModelCard(read_regular(model / "README.md").decode())
    except Exception:  # it cannot be read, or someone has edited it: whatever the parser of its header raises
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n# A GPT-2\n")
    for key, value in metadata.items():
        setattr(card.data, key, value)
    section = f"{USAGE_HEADING}\n\n{usage}\n"
    before, heading, after = card.text.partition(f"{USAGE_HEADING}\n")
    following = re.search(r"^## ", after, re.MULTILINE)
    rest = after[following.start() :] if following else ""
    text = f"{before}{section}{rest}" if heading else f"{card.text.rstrip()}\n\n{section}"
    return f"---\n{card.data.to_yaml()}\n---\n{text}"
