"""What a failed run's last words mean: kinds of failure by what is written in errors and logs. No torch, no disk."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A kind of failure. `again` says whether resuming, as it is, may go well."""

    kind: str
    title: str
    cause: str
    advice: str
    again: bool = False


def _cause(
    kind: str, pattern: str, title: str, cause: str, advice: str, *, again: bool = False
) -> tuple[re.Pattern[str], Cause]:
    return re.compile(pattern, re.IGNORECASE), Cause(kind, title, cause, advice, again)


WORDS = (
    _cause(
        "gpu-memory", r"CUDA out of memory|OutOfMemoryError|STATUS_ALLOC_FAILED|CUDA error: out of memory",
        "the GPU's memory ran out",
        "A batch needs more than the GPU had free: its rows are long, or another program holds memory.",
        "Fewer rows at once need less; the step keeps its rows, so that the losses stay the same.",
    ),
    _cause(
        "driver-lost",
        r"GPU is lost|fallen off the bus|uncorrectable ECC|unspecified launch failure|CUDA unknown error|"
        r"driver shutting down|driver initialization failed|no CUDA-capable device|No CUDA GPUs|"
        r"Found no NVIDIA driver|NVML_ERROR|driver/library version mismatch|CUDA error: unknown error",
        "the GPU or its driver is lost",
        "The GPU stopped answering: heat, power, a driver that was updated under it, or a fault of its own.",
        "See `nvidia-smi` and `dmesg | grep -i xid`; where it does not answer, restart the machine. Then resume.",
        again=True,
    ),
    _cause(
        "token-range", r"device-side assert|index out of range in self",
        "a token lies outside of the model's vocabulary",
        "The tokenizer knows tokens that the model has no weights for: they do not belong together.",
        "Take tokenizer and model from the same place, of the same revision.",
    ),
    _cause(
        "gpu-fault", r"illegal memory access|misaligned address|STATUS_EXECUTION_FAILED|illegal instruction was enc",
        "a program on the GPU did what it must not",
        "A fault in a GPU kernel (attention, 8-bit optimiser) or memory that was overclocked.",
        "Resume; if it comes back, set model.attention: eager, or optim: adamw_torch, in the plan.", again=True,
    ),
    _cause(
        "disk-full", r"No space left on device|Errno 28\b|Disk quota exceeded|Errno 122\b",
        "the disk is full",
        "What was written last did not fit. What had been saved before is whole.",
        "Free some space (old runs: x at home, `finetui delete`), then resume.",
    ),
    _cause(
        "not-writable", r"Read-only file system|Permission denied|Errno (?:13|30)\b",
        "the folder cannot be written",
        "It is read-only, or belongs to another user.",
        "Mend its permissions, then resume.",
    ),
    _cause(
        "not-finite", r"weights are not finite|Ended for an alarm\b.*(?:not finite|gradients)",
        "the loss stopped being a number",
        "A step was too large, and every weight after it is NaN: the learning rate is too high for model and data.",
        "A lower learning rate, from the newest checkpoint that is sound.",
    ),
    _cause(
        "diverged", r"Ended for an alarm\b.*diverges",
        "the loss diverged",
        "The learning rate is too high: each step undoes what the earlier ones learned.",
        "A lower learning rate, from the newest checkpoint that is sound.",
    ),
    _cause(
        "memory", r"can't allocate memory|Cannot allocate memory|\bMemoryError|bad_alloc|Errno 12\b",
        "the machine's memory ran out",
        "The trainer asked for more RAM than there was.",
        "Fewer rows at once need less; close what else needs memory.",
    ),
    _cause(
        "shared-memory", r"bus error|insufficient shared memory|shared memory \(shm\)",
        "shared memory ran out",
        "/dev/shm is too small, as in many containers.",
        "Give it more (docker run --shm-size=2g), then resume.", again=True,
    ),
    _cause(
        "moved", r"No such file or directory: '[^'\n]*/events\.jsonl'",
        "its folder was moved, renamed or deleted",
        "Runner and trainer write into the folder that they were started in, and end when it is not there any more.",
        "Resume it under the name that it has now: it goes on from the newest checkpoint.", again=True,
    ),
    _cause(
        "rows-changed", r"steps would see other rows",
        "rows or settings are not those it was begun with",
        "A checkpoint belongs to its rows and their order: going on would train some twice and others never.",
        "",
    ),
    _cause(
        "no-access", r"gated|\b401\b|\b403\b|Repository Not Found|is restricted|asks for (?:a )?licen[cs]e",
        "the Hub does not give it out",
        "The model or data set is private, gated, or does not exist by that name.",
        "Accept its terms on its page and set HF_TOKEN (or `hf auth login`), then resume.",
    ),
    _cause(
        "no-network",
        r"ConnectionError|Connection refused|Max retries|Name or service not known|name resolution|timed out|"
        r"LocalEntryNotFound|OfflineMode|cannot be reached|no network|is out of reach",
        "the network did not answer",
        "What was to be fetched is not in the cache, and the Hub could not be asked.",
        "Resume once the network is back: what was fetched is kept.", again=True,
    ),
    _cause(
        "model-damaged",
        r"The model \S+ .*cannot be read|SafetensorError|header too (?:large|small)|is damaged|IncompleteBuffer",
        "the model's files are damaged",
        "They are cut short or altered: a download that broke off, or a disk that is failing.",
        "Download or save it again, then resume.",
    ),
    _cause(
        "package", r"ModuleNotFoundError|ImportError|No module named|undefined symbol|GLIBC_",
        "a package is missing or does not fit",
        "The environment was changed since it was set up.",
        "Run ./setup.sh again, then resume.",
    ),
    _cause(
        "limits", r"Too many open files|Errno 24\b|can't start new thread|Resource temporarily unavailable",
        "a limit of this system was reached",
        "Too many files or threads are open.",
        "See `ulimit -a`; raise the limit or close other programs, then resume.", again=True,
    ),
)  # fmt: skip

SIGNALS = {
    "SIGSEGV": "memory that is not its own was touched", "SIGBUS": "a mapped file or shared memory was gone",
    "SIGILL": "an instruction that this CPU does not have", "SIGFPE": "an arithmetic fault",
    "SIGABRT": "a library gave up",
}  # fmt: skip


def cause_of(text: str) -> Cause | None:
    """The kind of failure that these words tell of; the one whose words stand nearest the end."""
    found = [(max(match.end() for match in pattern.finditer(text)), -number, cause)
             for number, (pattern, cause) in enumerate(WORDS) if pattern.search(text)]  # fmt: skip
    return max(found, key=lambda one: one[:2])[2] if found else None


def cause_of_signal(name: str, kernel: bool, stage: str) -> Cause:
    """Why a trainer was ended by this signal; `kernel` says that the machine's memory had run out."""
    if name == "SIGKILL" and kernel:
        return Cause(
            "kernel-killed", "the kernel ended it: memory ran out",
            "Linux ends the largest process when RAM is exhausted, or the limit of a container or of WSL2.",
            "Fewer rows at once need less; close what else needs memory.",
        )  # fmt: skip
    if name == "SIGKILL":
        return Cause(
            "killed", "it was killed (SIGKILL)",
            "By a person, a job scheduler or a container's limit; this machine had memory left at the last look.",
            "Resume: it goes on from the newest checkpoint.", again=True,
        )  # fmt: skip
    if name in SIGNALS:
        return Cause(
            "native-crash", f"native code crashed ({name})", f"In a library under Python: {SIGNALS[name]}.",
            "Resume; if it comes back at the same step, `finetui doctor` compares versions and driver.", again=True,
        )  # fmt: skip
    return Cause(
        "signalled", f"it was ended by {name}", "By a person or the system (a shutdown, a limit).",
        "Resume: it goes on from the newest checkpoint.", again=True,
    )  # fmt: skip


RESTARTED = Cause(
    "restarted", "the machine was restarted", "Power, an update, or WSL2's end took runner and trainer with it.",
    "Resume: it goes on from the newest checkpoint.", again=True,
)  # fmt: skip
VANISHED = Cause(
    "vanished", "runner and trainer ended without a word",
    "Killed together (kill -9, a container's or WSL2's end, a logout that ends every process), or the power failed.",
    "Resume: it goes on from the newest checkpoint.", again=True,
)  # fmt: skip
UNKNOWN = Cause(
    "unknown", "it ended with an error", "The last lines of its log say more.", "See the log, then resume.", again=True
)
