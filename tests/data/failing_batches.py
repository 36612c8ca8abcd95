"""Batches that cannot be delivered; imported by loader workers."""

import os
import signal
import threading
import time

import torch
from torch.utils.data import Dataset

from data.errors import DataError


class Unsendable:
    """Its pickling fails where a queue's thread does it."""

    def __reduce__(self):
        raise RuntimeError("no way to send <Unsendable object at 0x7f0011223344>")


class FailingBatches(Dataset):
    """Good batches 0 and 1 of 40 bytes, and from 2 on what `kind` names.

    Kinds: `raise`, `mistake`, `no_memory`, `kill`, `exit`, `unsendable`, `thread`, `hang`, and `half_sent`, where the
    worker dies while a batch is on its way.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __getitem__(self, item: int) -> dict:
        if item < 2:
            return {"numbers": torch.arange(5) + item, "text": "x" * (1 << 21 if self.kind == "half_sent" else 1)}
        return getattr(self, f"_{self.kind}")()

    def _raise(self):
        raise ZeroDivisionError("a bug")

    def _mistake(self):
        raise DataError("this shard is wrong")

    def _no_memory(self):
        raise MemoryError

    def _kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    _half_sent = _kill

    def _exit(self):
        os._exit(7)

    def _unsendable(self):
        return {"thing": Unsendable()}

    def _thread(self):
        threading.Thread(target=self._raise).start()
        return self._hang()

    def _hang(self):
        time.sleep(600)
        return {}
