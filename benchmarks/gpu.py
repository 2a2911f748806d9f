"""Claim: a GPU is used as well as it can be, and what it computes is right.

    python -m benchmarks.gpu [--quick]

Also tells whether a machine is set up well, and how many trials at once are best on each of its
GPUs. Takes some eight minutes, with --quick one or two. Each check runs in a process of its own
with a deadline: a crash is a failure, and what was not reached or cannot be judged here is null.
Timings are not judged while other programs use the GPU. Synthetic lines.

JSON: ok: no check has failed; checks: name → pass, value, bar; advice: trials_per_gpu, n_jobs,
start_seconds, warnings. Exit code 0, 1 when a check has failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import common, gpu_checks, gpu_trials
from benchmarks.gpu_checks import Found, Setting
from writer_search.common.text import one_line

BUDGET_SECONDS = 480.0  # for all checks


@dataclass(frozen=True)
class Check:
    """One check: what it runs, how long that may take, whether it is one of time."""

    name: str
    run: Callable[[Setting], Found]
    seconds: float
    is_quick: bool = False
    is_timing: bool = False


CHECKS = (
    Check("setup", gpu_checks.setup, 60, is_quick=True),
    Check("logits", gpu_checks.logits, 60, is_quick=True),
    Check("batches", gpu_checks.batches, 40, is_quick=True),
    Check("trials_a_gpu", gpu_trials.trials_at_once, 120, is_quick=True, is_timing=True),
    Check("steps", gpu_checks.twenty_steps, 60),
    Check("kill_and_continue", gpu_trials.kill_and_continue, 120),
    Check("ranks", gpu_trials.one_rank, 60),
    Check("epoch_over_ceiling", gpu_checks.epoch_over_ceiling, 60, is_timing=True),
    Check("roofline", gpu_checks.roofline, 60, is_timing=True),
    Check("host_syncs", gpu_checks.host_syncs, 40),
    Check("checkpoints", gpu_trials.checkpoints, 60, is_timing=True),
    Check("start", gpu_trials.start, 90, is_timing=True),
    Check("idle", gpu_trials.idle, 120, is_timing=True),
    Check("out_of_memory", gpu_trials.out_of_memory, 60),
    Check("device_fault", gpu_trials.device_fault, 60),
    Check("host_strip", gpu_checks.host_strip, 60, is_timing=True),
    Check("prediction", gpu_checks.prediction, 60),
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser_for(__doc__)
    common.add_data_flags(parser)
    parser.add_argument("--quick", action="store_true", help="the setup, and trials at once alone")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    why = why_no_gpu()
    if why:
        print(f"error: there is no GPU to measure: {why}", file=sys.stderr)
        return 2
    print(common.describe_machine())
    chosen = [check for check in CHECKS if check.is_quick or not args.quick]
    with common.line_images(args) as (root, _), tempfile.TemporaryDirectory() as work:
        result = run_all(chosen, Setting("cuda", root, Path(work)), other_programs())
    print(json.dumps(result), flush=True)
    return 0 if result["ok"] else 1


def why_no_gpu() -> str:
    """Say why this process cannot compute on a GPU; nothing when it can. Another one finds out."""
    code = "import torch; torch.zeros(1, device='cuda').cpu()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return "" if done.returncode == 0 else one_line((done.stderr.splitlines() or ["?"])[-1], 150)


def other_programs() -> list[str]:
    """Name what else uses the GPUs, as far as nvidia-smi tells."""
    return gpu_checks.nvidia_smi("--query-compute-apps=process_name")


def run_all(chosen: Sequence[Check], setting: Setting, others: Sequence[str]) -> dict[str, Any]:
    """Run the checks one after the other; give what the JSON line holds."""
    found: dict[str, dict[str, Any]] = {}
    ends = time.monotonic() + BUDGET_SECONDS
    for check in chosen:
        left = min(check.seconds, ends - time.monotonic())
        result = in_a_child(check, setting, left) if left > 0 else Found(None, "not reached")
        if check.is_timing and others and result.passes is not None:
            result = Found(None, result.value, result.bar)
        found[check.name] = {"pass": result.passes, "value": result.value, "bar": result.bar}
        verdict = {True: "passed", False: "FAILED", None: "not judged"}[result.passes]
        print(f"{check.name:20} {verdict:10} {json.dumps(result.value)} (bar: {result.bar})")
    return {
        "ok": all(result["pass"] is not False for result in found.values()),
        "checks": found,
        "advice": advice(found, others),
    }


def in_a_child(check: Check, setting: Setting, seconds: float) -> Found:
    """Run a check in a process of its own; one that crashes or takes too long has failed."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, check.run, setting))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return Found(False, f"no answer within {seconds:.0f} s")
        answer: Found = ours.recv()
        return answer
    except EOFError:
        process.join(10)
        return Found(False, f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join(10)
        ours.close()


def _answer(connection: Connection, run: Callable[[Setting], Found], setting: Setting) -> None:
    try:
        connection.send(run(setting))
    except Exception as error:
        connection.send(Found(False, one_line(f"{type(error).__name__}: {error}")))


def advice(found: dict[str, dict[str, Any]], others: Sequence[str]) -> dict[str, Any]:
    """Say how to start a search on this machine."""
    rates = (found.get("trials_a_gpu") or {}).get("value")
    gpus = ((found.get("setup") or {}).get("value") or {}) if found.get("setup") else {}
    count = len(gpus.get("gpus", [])) if isinstance(gpus, dict) else 0
    best = gpu_trials.best_number(rates["images_per_second"]) if isinstance(rates, dict) else None
    start = (found.get("start") or {}).get("value")
    warnings = [f"other programs use a GPU: {', '.join(others)}"] if others else []
    warnings += [f"{name}: {own['value']}" for name, own in found.items() if own["pass"] is False]
    return {
        "trials_per_gpu": best,
        "n_jobs": best * count if best and count else None,
        "start_seconds": start if isinstance(start, float) else None,
        "warnings": warnings,
    }


if __name__ == "__main__":
    raise SystemExit(main())
