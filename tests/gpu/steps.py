"""The steps of tests/gpu/run.py: what each runs, and when it counts as passed."""

import dataclasses
import os
import pathlib
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable

import failures
import ranks
import record
import training
from ledger import run_limited
from outcome import Failed, Skipped, fail_unless

SECONDS_TESTS, SECONDS_PARITY, SECONDS_TRAINING, SECONDS_SANITIZER, SECONDS_FAILURE = 240, 120, 120, 400, 120
SANITIZERS = ["memcheck", "racecheck"]
SANITIZER_ERROR = 97
# Part of the name of a test that asks for more memory than there is: until the driver has refused, it has what others
# need, so it runs alone.
GREEDY = "memory_that_runs_out"
# Part of the name of one that reads the source tree, and touches no device.
OF_SOURCES = "every_kernel_source"
# Tests that print rates, and the share of a copy's rate that elementwise kernels should reach.
SPEED, BANDWIDTH = "cuda::tests::speed::speed", "cuda::tests::bandwidth::bandwidth"
BANDWIDTH_GOAL = 0.85
# What compute-sanitizer says where the virtual machine does not let it in.
NO_SANITIZER = "Device not supported"


@dataclasses.dataclass(frozen=True)
class Step:
    """`check(pack, limit)` returns a note, or raises."""

    name: str
    limit: int
    check: Callable


class Pack:
    """The folder under test, and where its programs run."""

    def __init__(self, folder, work, device):
        self.folder, self.work, self.device = folder, work, device
        self.binary = folder / "bin" / "ferrotune"
        self.kernel_tests, self.engine_tests = folder / "bin" / "kernel-tests", folder / "bin" / "engine-tests"
        self.log = work / "log.txt"
        self.environment = record.with_cuda_libraries(os.environ)
        # Where tests look for fixtures and the binary, as cargo would have it.
        self.environment |= {"CARGO_MANIFEST_DIR": str(folder), "CARGO_BIN_EXE_ferrotune": str(self.binary)}
        # Tests take the stand-ins for a GPU unless they are told that there is one.
        if device == "cuda":
            self.environment["FERROTUNE_TEST_DEVICE"] = "cuda"
        if (folder / "kernels").is_dir():
            self.environment.setdefault("FERROTUNE_KERNELS", str(folder / "kernels"))

    def run(self, command, limit, **environment):
        """(exit code, stdout, seconds) of a program started in the pack; the log has what it printed too."""
        environment = self.environment | environment
        code, output, seconds = run_limited(command, limit, self.log, cwd=self.folder, env=environment)
        with open(self.log, "a") as log:
            log.write(output)
        return code, output, seconds

    def checked(self, command, limit, **environment):
        """Standard output of a program that must end with 0."""
        code, output, _ = self.run(command, limit, **environment)
        if code != 0:
            raise Failed(f"exit code {code}: {last_line(output) or 'see the log'}")
        return output


def run(step, pack):
    begin = time.monotonic()
    try:
        status, note = "passed", step.check(pack, step.limit)
    except Skipped as reason:
        status, note = "skipped", str(reason)
    except Failed as reason:
        status, note = "failed", str(reason)
    except subprocess.TimeoutExpired:
        status, note = "failed", f"ran past {step.limit} s"
    return {"status": status, "note": note, "seconds": time.monotonic() - begin}


def steps(pack):
    suites = {"kernels": pack.kernel_tests, "engine": pack.engine_tests}
    found = [test_step(suite, program, module) for suite, program in suites.items() for module in modules(program)]
    for group in ("arch", "adapters", "train", "quant"):
        found.append(Step(f"parity/{group}", SECONDS_PARITY, lambda p, limit, g=group: parity(p, limit, g)))
    for name, check in (training.CHECKS | ranks.CHECKS | failures.CHECKS).items():
        limit = SECONDS_FAILURE if name in failures.CHECKS else SECONDS_TRAINING
        found.append(Step(name, limit, check))
    found.append(Step("speed/kernels", SECONDS_TESTS, longest))
    found.append(Step("speed/elementwise", SECONDS_TESTS, elementwise))
    for tool in SANITIZERS:
        for op in modules(pack.kernel_tests):
            check = lambda p, limit, tool=tool, op=op: sanitize(p, limit, tool, op)  # noqa: E731
            found.append(Step(f"{tool}/{op}", SECONDS_SANITIZER, check))
    return found


def test_step(suite, program, module):
    return Step(f"{suite}/{module}", SECONDS_TESTS, lambda pack, limit: tests(pack, limit, program, module))


def gpu_tests(program):
    """Names of the tests that touch a device: of the kernels those of `cuda` in their path, and of `copy`; of the
    engine all."""
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout
    names = [line.removesuffix(": test") for line in listed.splitlines() if line.endswith(": test")]
    if program.name == "kernel-tests":
        names = [name for name in names if "cuda" in name or name.startswith("copy::")]
    return [name for name in names if OF_SOURCES not in name]


def modules(program):
    """Modules with such tests, in order; a module's tests share a process."""
    return list(dict.fromkeys(name.split("::")[0] for name in gpu_tests(program)))


def tests(pack, limit, program, module):
    """Those of the kernels draw other inputs in every run. A fault breaks the device for all tests of its process: what
    failed is tried once more, alone, on the same inputs."""
    begin, seed = time.monotonic(), str(1 + secrets.randbits(63))
    drawn = f", inputs of FERROTUNE_TEST_SEED={seed}" if program == pack.kernel_tests else ""
    names = [name for name in gpu_tests(program) if name.split("::")[0] == module]
    greedy = [name for name in names if GREEDY in name]
    together = [name for name in names if name not in greedy]
    command = [program, "--exact", "--test-threads=4", "--show-output", *together]
    code, output, _ = pack.run(command, limit, FERROTUNE_TEST_SEED=seed)
    if code == 0 and not greedy:
        return f"{tally(output, names)}{beside_pytorch(output)}{drawn}"
    passed = set(re.findall(r"^test (\S+) \.\.\. ok$", output, re.MULTILINE))
    failed = [name for name in names if name not in passed]
    alone = []
    for name in failed:
        left = max(1, limit - (time.monotonic() - begin))
        if pack.run([program, "--exact", name], left, FERROTUNE_TEST_SEED=seed)[0] != 0:
            alone.append(name)
    if alone:
        raise Failed(f"{len(alone)} of {len(names)} fail: {', '.join(alone)}{drawn}")
    return f"{len(names)} pass, {len(failed)} of them only in a process of their own{drawn}"


def beside_pytorch(output):
    """The largest ratio of an error in bf16 to PyTorch's own, if the tests say any."""
    ratios = re.findall(r"^(\w+_bf16 \w+) on \w+: .*, ratio ([\d.]+)$", output, re.MULTILINE)
    if not ratios:
        return ""
    what, ratio = max(ratios, key=lambda found: float(found[1]))
    return f", at most {ratio} times PyTorch's own error ({what})"


def tally(output, names):
    ran = re.search(r"(\d+) passed; 0 failed; (\d+) ignored", output)
    if not ran or int(ran[1]) + int(ran[2]) != len(names):
        raise Failed(f"{len(names)} tests are there, but the program says: {last_line(output)}")
    return f"{ran[1]} tests" + (f", {ran[2]} ignored" if ran[2] != "0" else "")


def parity(pack, limit, group):
    """The golden cases of PyTorch, Transformers and PEFT, recomputed on the device."""
    cases = sorted(path.parent for path in pack.folder.glob(f"tests/fixtures/golden/{group}/[!_]*/case.json"))
    command = [pack.binary, "parity", "--device", pack.device, *cases]
    code, output, _ = pack.run(command, limit)
    (pack.work / f"parity-{group}.txt").write_text(output)
    if code != 0:
        failed = re.findall(r"(\S+)  \[\S+\]  FAILED", output)
        raise Failed(f"exit code {code}: {', '.join(pathlib.Path(path).name for path in failed) or last_line(output)}")
    return last_line(output)


def longest(pack, limit):
    """Rates of the kernels that a step waits for longest."""
    rates = re.findall(r"^(\S+) .* us +[\d.]+ (?:TFLOP|GB)/s$", printed(pack, limit, SPEED), re.MULTILINE)
    fail_unless(rates, "no rates")
    return f"{len(rates)} rates are in the log"


def printed(pack, limit, test):
    return pack.checked([pack.kernel_tests, "--ignored", "--nocapture", "--exact", test], limit)


def elementwise(pack, limit):
    """Rates of the elementwise kernels beside that of a copy in the same process: a note, as no time decides a test."""
    output = printed(pack, limit, BANDWIDTH)
    shares = {name: float(share) for name, share in re.findall(r"^(\S+) .* ([\d.]+) of a copy$", output, re.MULTILINE)}
    fail_unless(shares, f"no rates: {last_line(output)}")
    below = [f"{name} {share:.2f}" for name, share in shares.items() if share < BANDWIDTH_GOAL]
    lowest = min(shares, key=shares.get)
    found = f"{len(shares)} kernels, the slowest {lowest} at {shares[lowest]:.2f} of a copy's rate"
    return found + (f"; below the goal of {BANDWIDTH_GOAL}: {', '.join(below)}" if below else "")


def sanitize(pack, limit, tool, op):
    if not shutil.which("compute-sanitizer"):
        raise Skipped("no compute-sanitizer on this machine")
    names = [name for name in gpu_tests(pack.kernel_tests) if name.split("::")[0] == op]
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", SANITIZER_ERROR, "--target-processes", "all"]
    if tool == "memcheck":
        # Tests make calls fail on purpose.
        sanitizer += ["--report-api-errors", "no"]
    code, output, _ = pack.run([*sanitizer, pack.kernel_tests, "--exact", "--test-threads=1", *names], limit)
    if NO_SANITIZER in output:
        raise Skipped("compute-sanitizer cannot reach the GPU of this machine")
    report = re.findall(r"========= (?:ERROR|RACECHECK) SUMMARY: .*", output)
    if code != 0:
        raise Failed(f"exit code {code}: {(report or [last_line(output)])[-1]}")
    return (report or ["no error"])[-1].removeprefix("========= ")


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
