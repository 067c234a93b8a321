"""The entry point: `python run.py` fine-tunes GPT-2 on film reviews, `python run.py --help` lists all flags."""

import sys

from ft.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
