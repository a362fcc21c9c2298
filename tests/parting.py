"""Pairs of processes that find each other as those of a training run do, exchange something, and end: SIGABRT is theirs
if they end while gloo's threads still hold what was sent. On one core, and with a lock that is given up only by who
sleeps, about every third pair has that fault.
"""

import gc
import os
import socket
import sys

import torch

from diffusion import trainer


def live(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.setswitchinterval(100)
    processes = trainer._processes()
    assert trainer._gather(rank) == [0, 1]
    for _ in range(3):
        torch.distributed.all_reduce(torch.ones(1))
        processes.wait_for_everyone()


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    gc.freeze()
    for _ in range(int(sys.argv[1])):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in (0, 1):
            if (child := os.fork()) == 0:
                live(rank, port)
                sys.exit()
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(*codes, flush=True)
