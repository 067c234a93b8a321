"""GPT-2 and its parts."""
