"""What the search asks child processes before its first trial. This file imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from writer_search.common.errors import UserError
from writer_search.common.text import one_line
from writer_search.processes.messages import Gpu, MachineQuestion, Message
from writer_search.processes.parent import ChildProcess, exit_text

MACHINE = "writer_search.processes.machine:"
OPEN_SECONDS = 60.0  # that a GPU may take to open; a broken one may hang
BUSY = re.compile("out of memory|busy or unavailable")  # a fault that passes


class Question:
    """A child process that is asked one thing. Raises UserError where none starts.

    `work` names the function that answers there, as "module:function".
    """

    def __init__(self, work: str, argument: Any) -> None:
        try:
            self._child = ChildProcess(work, argument)
        except OSError as error:
            raise UserError(f"torch cannot be used here: {one_line(error)}") from None

    def answer(
        self, seconds: float | None = None, begin: Callable[[str], None] = lambda step: None
    ) -> Message:
        """Wait for the answer; ("failed", …) where none comes.   begin: told of steps meanwhile."""
        code, message, is_late = None, None, False
        try:
            is_late = not self._child.connection.poll(seconds)
            message = None if is_late else self._child.receive()
            while message is not None and message[0] == "step":
                step, message = message[1]["step"], None  # an interruption from here on: none came
                begin(step)
                message = self._child.receive()
        finally:
            if message is None:
                self._child.kill()
            code = self._child.end()
        cause = f"no answer within {seconds:g} s" if is_late else exit_text(code)
        return message or ("failed", {"cause": cause})


def await_torch() -> None:
    """Wait until the fork server has imported torch, and can answer. Raises UserError."""
    _told(Question(MACHINE + "say_ready", None).answer())


def ask_machine(question: MachineQuestion, begin: Callable[[str], None]) -> dict[str, Any]:
    """Let a child process find out weights and precision.

    begin: told of each step that may take long. Raises UserError.
    """
    return _told(Question(MACHINE + "answer_question", question).answer(begin=begin))


def _told(message: Message) -> dict[str, Any]:
    kind, content = message
    if kind == "mistake":
        raise UserError(content["cause"])
    if kind == "failed":
        raise UserError("torch cannot be used here; see the messages above")
    return content


def find_gpus(device: str) -> tuple[tuple[Gpu, ...], list[str]]:
    """Let a process for each GPU open it; give those that work, and warnings of the others.

    device: auto, cpu, cuda or cuda:N. None are found where `auto` comes down to the CPU. What a
    driver counts CUDA may be unable to use, and a process sees one MIG instance of several.
    Raises UserError where an explicit device, or one that is busy, cannot be used.
    """
    if device == "cpu":
        return (), []
    entries = _told(Question(MACHINE + "list_devices", device).answer())["entries"]
    questions = {entry: Question(MACHINE + "name_device", entry) for entry in entries}
    answers = {entry: question.answer(OPEN_SECONDS) for entry, question in questions.items()}
    if mistake := next((answer for answer in answers.values() if answer[0] == "mistake"), None):
        _told(mistake)
    working = tuple(content["gpu"] for kind, content in answers.values() if kind == "gpu")
    causes = {
        e: one_line(content["cause"]) for e, (kind, content) in answers.items() if kind != "gpu"
    }
    if working or not causes:
        return working, [f"GPU {e} cannot be used and is left out: {c}" for e, c in causes.items()]
    why = "; ".join(f"GPU {entry}: {cause}" for entry, cause in causes.items())
    if device != "auto" or BUSY.search(why):
        raise UserError(f"--device {device}: {why}; fix or free it, or give --device cpu")
    return (), [f"no GPU can be used, the search runs on the CPU: {why}"]
