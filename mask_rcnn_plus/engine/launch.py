"""Starts the processes of a run, or joins those of torchrun."""

import argparse
import os
import re
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm

from mask_rcnn_plus.errors import UserError


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, device: str):
    """Runs ``main(args)`` in every process of the run.

    Under torchrun this process joins the others, with "gloo" on the CPU and "nccl" on GPUs.
    Otherwise detectron2's ``launch`` starts ``args.num_gpus`` processes on each of
    ``args.num_machines`` machines.

    Args:
        main: the function to run in each process.
        args: from detectron2's argument parser.
        device: the resolved device, "cpu" or "cuda...".

    Raises:
        UserError: this machine has fewer GPUs than requested, or several processes on the CPU are
            requested without torchrun.
        SystemExit: a process ended with this exit code.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        _join_torchrun(device)
        try:
            main(args)
        except BaseException:
            # Destroying an NCCL group waits for the other processes, which may wait for gradients
            # of this one. torchrun ends them after this process.
            if dist.get_backend() != "nccl":
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()
        return
    if args.num_gpus < 1 or args.num_machines < 1:
        raise UserError("--num-gpus and --num-machines must be 1 or more (1 on a CPU)")
    if args.num_gpus * args.num_machines > 1:
        _check_gpus(args, device)
    try:
        detectron2_launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except torch.multiprocessing.ProcessExitedException as error:
        # The process has printed its error.
        sys.exit(error.exit_code)


class LostProcessError(UserError):
    """Another process of the run has ended."""

    exit_code = 5


def lost_process(error: BaseException) -> bool:
    """Whether a collective operation failed because another process of the run has ended."""
    signs = "gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe"
    return (
        comm.get_world_size() > 1
        and isinstance(error, RuntimeError)
        and re.search(signs, str(error), re.IGNORECASE) is not None
    )


def _join_torchrun(device: str) -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda"):
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started at least {local_rank + 1} processes on this machine, which has "
                f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
        return
    # detectron2 0.6 only creates this group in its own launch.
    for first in range(0, dist.get_world_size(), local_size):
        ranks = list(range(first, first + local_size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def _check_gpus(args: argparse.Namespace, device: str) -> None:
    if not device.startswith("cuda"):
        raise UserError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines} needs GPUs, but the "
            f"device is '{device}': start several CPU processes with "
            "'torchrun --nproc-per-node N train_net.py ...'"
        )
    if args.num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} GPUs"
        )
