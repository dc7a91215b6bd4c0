"""Steps that make the program fail: exit code and message must be the promised ones."""

import json
import subprocess

from outcome import fail_unless

OUT_OF_MEMORY, BAD_CONFIG = 71, 78
# Activations of half a million tokens of this shape: some 200 GB, in fewer blocks than a launch can have.
TOO_MUCH = ["--shape", "768x12", "--batch", 512, "--seq", 1024, "--steps", 1, "--warmup", 0]
SMALL = ["--shape", "256x4", "--steps", 5, "--warmup", 1, "--json"]


def out_of_memory(pack, limit):
    return expect(pack, limit, OUT_OF_MEMORY, "out of memory", TOO_MUCH)


def no_visible_gpu(pack, limit):
    return expect(pack, limit, BAD_CONFIG, "no usable GPU", SMALL, CUDA_VISIBLE_DEVICES="")


def unknown_ordinal(pack, limit):
    return expect(pack, limit, BAD_CONFIG, "no usable GPU", SMALL, CUDA_VISIBLE_DEVICES="99")


def without(library):
    def check(pack, limit):
        hide = {"LD_AUDIT": str(pack.folder / "lib" / "libhide.so"), "HIDE_LIBRARY": library}
        # Neither kernels compiled before nor carried ones: NVRTC must be asked for.
        empty = pack.work / "empty"
        empty.mkdir(exist_ok=True)
        hide |= {"FERROTUNE_KERNELS": "", "FERROTUNE_KERNEL_CACHE": str(empty)}
        return expect(pack, limit, BAD_CONFIG, library, SMALL, **hide)

    return check


def two_processes_share_a_gpu(pack, limit):
    """Both end well, with the losses of a process alone."""
    command = [str(word) for word in bench(pack, SMALL)]
    alone = json.loads(pack.checked(command, limit))["losses"]
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": pack.folder, "env": pack.environment}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    for process in both:
        try:
            output, _ = process.communicate(timeout=limit)
        finally:
            process.kill()
        fail_unless(process.returncode == 0, f"one of two ended with {process.returncode}")
        fail_unless(json.loads(output)["losses"] == alone, "losses are not those of a process alone")
    return "both have the losses of a process alone"


CHECKS = {
    "failures/out of memory": out_of_memory,
    "failures/no visible GPU": no_visible_gpu,
    "failures/unknown ordinal": unknown_ordinal,
    "failures/no libcuda": without("libcuda"),
    "failures/no libcublasLt": without("libcublasLt"),
    "failures/no libnvrtc": without("libnvrtc"),
    "failures/two processes": two_processes_share_a_gpu,
}


def bench(pack, options):
    return [pack.binary, "bench", "--device", pack.device, *options]


def expect(pack, limit, code, words, options, **environment):
    """The program ends with `code` and says `words` on one line that begins with `error:`."""
    command = [str(word) for word in bench(pack, options)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=limit, cwd=pack.folder, env=pack.environment | environment
    )
    with open(pack.log, "a") as log:
        log.write(f"$ {' '.join(command)}  {environment}\n{done.stderr}= {done.returncode}\n")
    error = next((line for line in done.stderr.splitlines() if line.startswith("error: ")), "no line of `error:`")
    fail_unless(done.returncode == code, f"exit code {done.returncode}, {code} expected: {error}")
    fail_unless(words in error, f"the message does not say `{words}`: {error}")
    return f"exit code {code}: {error[:120]}"
