"""Work done step by step: results kept by name, so that the same command goes on where it stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time


class Ledger:
    """Results by name in one JSON file. Another `subject` (commit, machine) begins anew."""

    def __init__(self, path, subject):
        self.path = pathlib.Path(path)
        self.subject = subject
        self.results = {}
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept["subject"] == subject:
                self.results = kept["results"]

    def put(self, name, result):
        self.results[name] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps({"subject": self.subject, "results": self.results}, indent=1) + "\n")
        temporary.replace(self.path)


class Budget:
    """Seconds that the whole command may take; `None` for no end."""

    def __init__(self, seconds):
        self.end = None if seconds is None else time.monotonic() + seconds

    def allows(self, seconds):
        return self.end is None or time.monotonic() + seconds <= self.end


def end_children_on_sigterm():
    """SIGTERM ends this program as Ctrl-C does, and what it runs with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run_limited(command, limit, log, **options):
    """Runs a program with all it starts; returns (exit code, stdout, seconds), 124 if it ran past `limit`.

    Its standard error goes to the file `log`, after the command itself.
    """
    command = [str(word) for word in command]
    begin = time.monotonic()
    with open(log, "a") as errors:
        errors.write("$ " + " ".join(command) + "\n")
        errors.flush()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, **options
        )
        try:
            output, _ = process.communicate(timeout=limit)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            code = 124
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        errors.write(f"= {code}\n")
    return code, output, time.monotonic() - begin
