"""Claim: a GPU is used as well as it can be, and what it computes is right.

    python -m benchmarks.gpu [--quick]

Also tells whether a machine is set up well, and how many trials at once are best on each of its
GPUs: the last line but one has the flags to use. Takes ten minutes at most, with --quick a few.
Each check runs in a process of its own with a deadline: a crash is a failure, and what was not
reached or cannot be judged here is null. Timings are not judged while other programs use the GPU.
Synthetic lines; checks of one GPU take the first.

JSON: ok: no check has failed; checks: name → pass, value, bar; advice: trials_per_gpu, n_jobs,
flags, seconds_per_trial (resnet18, the default epochs on these lines, so many at once), warnings.
Exit code 0, 1 when a check has failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, gpu_checks, gpu_searches, gpu_trials
from benchmarks.gpu_checks import Found, Setting, asked, nvidia_smi
from writer_search.common.errors import UserError
from writer_search.processes.child import open_device
from writer_search.processes.questions import find_gpus

BUDGET_SECONDS = 600.0  # for all checks
WRITERS, PAGES = 16, 16  # of the lines; 1,056 train
EPOCHS = 100  # the default of a search, whose trials may end sooner
MOST_USED = 0.05  # of a GPU's memory, where no other program uses it
SHARED = 256  # MiB of /dev/shm


@dataclass(frozen=True)
class Check:
    """One check: what it runs, how long that may take, whether it is one of time."""

    name: str
    run: Callable[[Setting], Found]
    seconds: float
    is_quick: bool = False
    is_timing: bool = False


CHECKS = (
    Check("setup", gpu_checks.setup, 90, is_quick=True),
    Check("logits", gpu_checks.logits, 60, is_quick=True),
    Check("batches", gpu_checks.batches, 60, is_quick=True),
    Check("trials_a_gpu", gpu_trials.trials_at_once, 150, is_quick=True, is_timing=True),
    Check("steps", gpu_checks.twenty_steps, 120),
    Check("kill_and_continue", gpu_trials.kill_and_continue, 150),
    Check("ranks", gpu_searches.ranks, 120),
    Check("epoch_over_ceiling", gpu_checks.epoch_over_ceiling, 60, is_timing=True),
    Check("roofline", gpu_checks.roofline, 90, is_timing=True),
    Check("host_syncs", gpu_checks.host_syncs, 40),
    Check("checkpoints", gpu_trials.checkpoints, 90, is_timing=True),
    Check("start", gpu_searches.start, 90, is_timing=True),
    Check("idle", gpu_searches.idle, 150, is_timing=True),
    Check("out_of_memory", gpu_searches.out_of_memory, 150),
    Check("device_fault", gpu_searches.device_fault, 90),
    Check("host_strip", gpu_checks.host_strip, 60, is_timing=True),
    Check("prediction", gpu_trials.prediction, 60),
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the setup, and trials at once alone")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        gpus, left_out = find_gpus("auto")
        if not gpus:
            why = left_out or [f"torch {torch.__version__} sees no CUDA device"]
            raise UserError(why[0].removeprefix("no GPU can be used, the search runs on the CPU: "))
    except UserError as error:
        print(f"error: there is no GPU to measure: {error}", file=sys.stderr)
        return 2
    # This process itself opens no GPU: one in exclusive mode would be closed to all others.
    names = ", ".join(gpu.name for gpu in gpus)
    print(common.describe_machine(names), flush=True)
    entries = tuple(gpu.entry for gpu in gpus)
    uuids = tuple(asked(uuid_of, entry) for entry in entries)
    chosen = [check for check in CHECKS if check.is_quick or not args.quick]
    lines = argparse.Namespace(data_root=None, writers=WRITERS, pages=PAGES)
    print("drawing and decoding synthetic lines", flush=True)
    with common.line_images(lines) as (root, _), tempfile.TemporaryDirectory() as work:
        precision = "bfloat16" if gpus[0].bfloat16 else "float32"
        setting = Setting("cuda", root, Path(work), precision=precision, gpus=entries, uuids=uuids)
        setting.data(setting.config())  # decoded before any deadline
        result = run_all(chosen, setting, other_programs(uuids), left_out)
    print(f"flags to use: {shown_flags(result['advice'])}")
    print(json.dumps(result), flush=True)
    return 0 if result["ok"] else 1


def shown_flags(said: dict[str, Any]) -> str:
    if said["trials_per_gpu"] is None:
        return "not known, trials at once could not be measured"
    return said["flags"] or "none, the defaults are best"


def uuid_of(entry: str) -> str:
    """Give a GPU's own name, for nvidia-smi. Runs in a process of its own."""
    return f"GPU-{getattr(torch.cuda.get_device_properties(open_device(entry)), 'uuid', '')}"


def other_programs(uuids: Sequence[str]) -> list[str]:
    """Say what else uses the GPUs, as far as nvidia-smi tells, which may not see all of it."""
    found = []
    for uuid in uuids:
        found += nvidia_smi("--query-compute-apps=process_name", "-i", uuid)
        for line in nvidia_smi("--query-gpu=memory.used,memory.total", "-i", uuid):
            used, total = (word.strip() for word in line.split(","))
            if used.isdigit() and total.isdigit() and int(used) > MOST_USED * int(total):
                found.append(f"{used} of {total} MiB are in use")
    return found


def run_all(
    chosen: Sequence[Check], setting: Setting, others: Sequence[str], left_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the checks one after the other; give what the JSON line holds.

    others: programs on the GPUs;  left_out: warnings of GPUs that cannot be used.
    """
    found: dict[str, dict[str, Any]] = {}
    ends = time.monotonic() + BUDGET_SECONDS
    for check in chosen:
        left = min(check.seconds, ends - time.monotonic())
        result = in_a_child(check, setting, left) if left > 0 else Found(None, "not reached")
        if check.is_timing and others and result.passes is not None:
            result = Found(None, result.value, result.bar)
        found[check.name] = {"pass": result.passes, "value": result.value, "bar": result.bar}
        verdict = {True: "passed", False: "FAILED", None: "not judged"}[result.passes]
        shown = f"{json.dumps(result.value)} (bar: {json.dumps(result.bar)})"
        print(f"{check.name:20} {verdict:10} {shown}", flush=True)
        setting = taking_advice(setting, found)
    return {
        "ok": all(result["pass"] is not False for result in found.values()),
        "checks": found,
        "advice": advice(found, setting, others, left_out),
    }


def in_a_child(check: Check, setting: Setting, seconds: float) -> Found:
    """Run a check in a process of its own; one that crashes or takes too long has failed."""
    try:
        found: Found = asked(check.run, setting, seconds)
    except RuntimeError as error:
        return Found(False, str(error))
    return found


def taking_advice(setting: Setting, found: dict[str, dict[str, Any]]) -> Setting:
    """Let later checks run as many trials at once as were best."""
    measured = (found.get("trials_a_gpu") or {}).get("value")
    if not isinstance(measured, dict):
        return setting
    best = measured["best"]
    rate = measured["images_per_second"][str(best)]
    return replace(setting, trials_at_once=best, images_per_second=rate)


def advice(
    found: dict[str, dict[str, Any]],
    setting: Setting,
    others: Sequence[str],
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Say how to start a search on this machine."""
    rate = setting.images_per_second
    best = setting.trials_at_once if rate else None
    jobs = best * len(setting.gpus) if best else None
    warnings = [*left_out, *([f"other programs use a GPU: {', '.join(others)}"] if others else [])]
    setup = (found.get("setup") or {}).get("value")
    if isinstance(setup, dict) and not setup["nvidia_smi"]:
        warnings.append("nvidia-smi does not answer: other programs would not be noticed")
    if isinstance(setup, dict) and len(setting.gpus) > 1 and setup["shared_memory_mib"] < SHARED:
        warnings.append("/dev/shm is small: NCCL (--gpus_per_trial) may need more of it")
    warnings += [f"{name}: {own['value']}" for name, own in found.items() if own["pass"] is False]
    images = EPOCHS * found["trials_a_gpu"]["value"]["lines"] if best else 0
    return {
        "trials_per_gpu": best,
        "n_jobs": jobs,
        "flags": f"--n_jobs {jobs}" if best and best > 1 else "",
        "seconds_per_trial": round(images * best / rate, 1) if best and rate else None,
        "warnings": warnings,
    }


if __name__ == "__main__":
    raise SystemExit(main())
