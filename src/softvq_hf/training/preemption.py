"""Signals that end a run before its time: the update is finished, a checkpoint written, a code of its own returned."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from accelerate import Accelerator


# EX_TEMPFAIL of sysexits.h: try again. The run is whole, and `--resume_from_checkpoint latest` goes on with it.
PREEMPTED_EXIT_CODE = 75

# Job managers send SIGTERM, or SIGUSR1 where asked for a warning (`sbatch --signal`); a terminal sends SIGINT.
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def preemption_handler() -> Iterator[Callable[[Accelerator], bool]]:
    """
    Inside, SIGTERM, SIGINT and SIGUSR1 are remembered instead of ending the process.

    A second SIGINT raises `KeyboardInterrupt` at once, as the first one does elsewhere. Signals that the process was
    started with as ignored (`nohup`, jobs in the background of a script) stay ignored. For the main thread.

    Yields:
        `Callable[[Accelerator], bool]`: Whether a signal has reached any process. To be called on all processes after
        every update; the answer is the same on all of them.
    """
    received = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)
        # print could be interrupted by itself here
        message = f"\n{signal.Signals(number).name}: a checkpoint follows this update, then the run ends.\n"
        os.write(2, message.encode())

    def preempted(accelerator: Accelerator) -> bool:
        if accelerator.num_processes == 1:
            return bool(received)
        if received:
            accelerator.set_trigger()
        return accelerator.check_trigger()

    handlers = {number: signal.getsignal(number) for number in PREEMPTION_SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, remember)
    try:
        yield preempted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_interrupts(worker_id: int) -> None:
    """
    For `DataLoader(worker_init_fn=...)`: signals that reach all processes of a run end no worker.

    Terminals, launchers and job managers send their signals to whole groups of processes. Workers that end before the
    update and its checkpoint are done would take the run with them. Only the SIGTERM of the process that loads, which
    ends its workers by it, is obeyed (on Linux; elsewhere every SIGTERM).
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_request, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _exit_on_request(parent: int) -> None:
    """Wait for the SIGTERM that `parent` sends; a handler would not be told who sent it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
