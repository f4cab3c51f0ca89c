"""Two processes on one machine that communicate by gloo."""

import contextlib
import datetime
import gc
import os

import torch
import torch.distributed as dist


@contextlib.contextmanager
def joined(rank, folder, **environment):
    """Join the group of two as `rank`; the processes find each other by a file in the folder."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # required, and not used
    os.environ |= environment
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=2),
    )
    yield
    # DDP's reducer must not be the last to hold gloo's group: it would end gloo's thread with the
    # GIL held, which that thread may be waiting for.
    gc.collect()
    dist.destroy_process_group()
