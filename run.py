"""The door: `python run.py` fine-tunes GPT-2 on film reviews, `python run.py --help` lists what can be changed."""

import sys

from ft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
