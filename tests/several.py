"""Runs the program in several processes at once, as torchrun does, without importing PyTorch for each.

Reads two JSON lists per line: the command line and the working directory of each process. Forks them, prints their
process numbers, and when all have ended their exit statuses. What they print goes to files `out-RANK` in the folder
that the environment names.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed.fsdp  # (imported before the fork, so that no fork has to)

from ft import finetune  # noqa: F401
from ft.cli.main import main

FOLDER = Path(os.environ["FOLDER"])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


for line in sys.stdin:
    commands, folders = json.loads(line)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(commands))}
    processes = []
    for rank, (command, folder) in enumerate(zip(commands, folders, strict=True)):
        process = os.fork()
        if process == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.chdir(folder)
            torch.set_num_threads(1)
            output = os.open(FOLDER / f"out-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = main(command)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        processes.append(process)
    print(json.dumps(processes), flush=True)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    print(json.dumps(statuses), flush=True)
