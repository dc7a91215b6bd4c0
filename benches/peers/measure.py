"""Times and memory of steps in PyTorch, on a CPU or a GPU."""

import time

import procfs
import torch


class Clock:
    """Times one step: events of the GPU, else the wall."""

    def __init__(self, device):
        self.cuda = device == "cuda"

    def start(self):
        if self.cuda:
            self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.begin.record()
        else:
            self.begin = time.perf_counter()

    def seconds(self):
        if not self.cuda:
            return time.perf_counter() - self.begin
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1000


class Memory:
    """Largest memory of the steps above what was there before the model; CPU: resident, GPU: the driver's."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        if self.cuda:
            torch.zeros(1, device="cuda")
        self.start_rss, self.start_gpu = procfs.status_bytes("VmRSS"), self._gpu()

    def loaded(self):
        self.loaded_rss, self.load_peak = procfs.status_bytes("VmRSS"), procfs.status_bytes("VmHWM")
        self.loaded_gpu = self._gpu()
        procfs.reset_peak()

    def report(self):
        step_peak = procfs.status_bytes("VmHWM")
        report = {
            "start_rss": self.start_rss,
            "loaded_rss": self.loaded_rss,
            "step_peak_rss": step_peak,
            "peak_rss": max(self.load_peak, step_peak),
            "memory_above_start": step_peak - self.start_rss,
            "memory_above_loaded": step_peak - self.loaded_rss,
        }
        if self.cuda:
            # The caching allocator gives nothing back by itself: what is taken now is the peak.
            report |= {
                "gpu_memory_above_start": self._gpu() - self.start_gpu,
                "gpu_memory_above_loaded": self._gpu() - self.loaded_gpu,
                "gpu_allocated": torch.cuda.max_memory_allocated(),
                "gpu_reserved": torch.cuda.max_memory_reserved(),
            }
        return report

    def _gpu(self):
        if not self.cuda:
            return None
        free, total = torch.cuda.mem_get_info()
        return total - free


def count_launches(step):
    """Kernels, copies and fills that `step()` starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type != torch.autograd.DeviceType.CPU)
