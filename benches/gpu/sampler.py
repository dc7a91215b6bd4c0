"""What nvidia-smi sees of the GPU while a program runs: the same for every side."""

import statistics
import threading

import record

FIELDS = ["memory.used", "clocks.sm", "power.draw", "temperature.gpu"]
PERIOD = 0.5


class Sampler:
    """Samples the first GPU from `with` to its end; nothing where there is none."""

    def __enter__(self):
        self.rows, self.stop = [], threading.Event()
        self.before = self._sample()
        self.thread = threading.Thread(target=self._run, daemon=True)
        if self.before:
            self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        if self.before:
            self.thread.join()

    def summary(self):
        """Bytes above what was taken before the program, and the median clock and power while it computed."""
        if not self.rows:
            return {}
        memory, clock, power, temperature = zip(*self.rows)
        # The upper half by power: while it loads, the GPU idles.
        busy = [i for i in range(len(power)) if power[i] >= statistics.median(power)]
        return {
            "gpu_memory": int((max(memory) - self.before[0]) * (1 << 20)),
            "sm_mhz": statistics.median(clock[i] for i in busy),
            "watts": statistics.median(power[i] for i in busy),
            "celsius": max(temperature),
        }

    def _run(self):
        while not self.stop.wait(PERIOD):
            row = self._sample()
            if row:
                self.rows.append(row)

    def _sample(self):
        rows = record.query_gpu(*FIELDS)
        try:
            return [float(word) for word in rows[0]] if rows else None
        except ValueError:  # "[N/A]" on some virtual machines
            return None
