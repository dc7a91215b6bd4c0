"""What Linux says of this process. The same files, read at the same moments, as `ferrotune bench` reads."""


def status_bytes(key):
    """`VmRSS` (resident now) or `VmHWM` (largest so far), in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def reset_peak():
    """Lets VmHWM begin anew from what is resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _stat(index):
    with open("/proc/self/stat") as file:
        after_name = file.read().rpartition(")")[2].split()
    return int(after_name[index - 2]) / 100


def seconds_since_exec():
    """Seconds since the kernel started this process, to a hundredth."""
    with open("/proc/uptime") as file:
        return float(file.read().split()[0]) - _stat(21)


def cpu_seconds():
    """Processor time of all threads."""
    return _stat(13) + _stat(14)
