"""Runs the program again and again in processes that can be killed, without importing PyTorch for each.

Reads one command line per line, as JSON, and starts it in a fork of its own; prints the process's number, and when it
has ended its exit status (negative for the signal that killed it). The test kills from outside.
"""

import json
import os
import sys
import time

import torch

from ft import finetune  # noqa: F401  (imported before the fork, so that no fork has to)
from ft.cli.main import main

SLOWER = float(os.environ.get("SECONDS_PER_FSYNC", "0"))
fsync = os.fsync


def slow_fsync(descriptor):
    time.sleep(SLOWER)
    fsync(descriptor)


for line in sys.stdin:
    process = os.fork()
    if process == 0:
        torch.set_num_threads(int(os.environ.get("THREADS", "1")))
        os.fsync = slow_fsync
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = open(os.environ.get("ERRORS", os.devnull), "a")  # noqa: SIM115
        os._exit(main(json.loads(line)))
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
