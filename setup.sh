#!/usr/bin/env bash
# Makes .venv beside this file and installs finetui into it. Safe to run again: what is there is kept.
set -euo pipefail

CPU_TORCH=2.13.0 GPU_TORCH=2.11.0 # what was tried on each; PyPI's 2.11.0 is built for CUDA 13.0
CPU_INDEX=https://download.pytorch.org/whl/cpu

usage() {
    cat <<'END'
Usage: ./setup.sh [options]

  --quick            say little, skip the closing check; a second run takes a second
  --dev              also pytest, ruff and mypy
  --gpu, --cpu       install for a GPU, or for the CPU only, whatever is found here
  --with-flash-attn  also flash-attn (compiles for many minutes; finetui runs without it)
  --with-gguf        also llama.cpp's tools for GGUF files (20 MB, nothing is compiled; `finetui gguf --install` later)
  --unlocked         the newest packages that fit, instead of those of requirements-cpu.lock with their hashes (CPU)
  --help             this text

The environment variable PYTHON names the interpreter to use (3.11 to 3.13). pip's own settings hold.
END
}

quick='' dev='' device='' flash='' gguf='' unlocked=''
for option in "$@"; do
    case $option in
        --quick) quick=yes ;;
        --dev) dev=yes ;;
        --gpu | --cpu) device=${option#--} ;;
        --with-flash-attn) flash=yes ;;
        --with-gguf) gguf=yes ;;
        --unlocked) unlocked=yes ;;
        -h | --help) usage; exit 0 ;;
        *) echo "setup.sh: unknown option $option" >&2; usage >&2; exit 2 ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")"
here=$(pwd -P)
venv=$here/.venv
python=$venv/bin/python
stamp_file=$venv/finetui-setup

say() { [ -n "$quick" ] || echo "· $*"; }
note() { echo "! $*" >&2; }
die() { printf '%s\n' "setup.sh: $1" "${@:2}" >&2; exit 1; }

# pip talks only to a person at a terminal; errors always show.
quiet=-q
if [ -t 1 ] && [ -z "$quick" ]; then quiet=; fi
pip_install() { "$python" -m pip install ${quiet:+"$quiet"} --no-input --disable-pip-version-check "$@"; }

has_gpu() {
    nvidia-smi -L >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ] ||
        { [ -e /dev/dxg ] && [ -e /usr/lib/wsl/lib/libnvidia-ml.so.1 ]; } # WSL2
}

# Works, has pip, and was made here: a virtualenv that was moved or copied runs the interpreter of its old place.
healthy() {
    local said
    said=$("$venv/bin/pip" --version 2>/dev/null) || return 1
    said=${said#* from }
    [ "${said% (python *}" -ef "$(echo "$venv"/lib/python3*/site-packages/pip)" ] && suitable "$python"
}

suitable() { "$1" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
        if suitable "$candidate" && "$candidate" -c 'import ensurepip' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

find_uv() (
    PATH=$PATH:$HOME/.local/bin:$(python3 -m site --user-base 2>/dev/null)/bin
    command -v uv || true
)

make_venv() {
    local base uv
    if base=$(find_python); then
        say "Making .venv with $("$base" --version)."
        "$base" -m venv --clear "$venv"
        return
    fi
    [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a Python of 3.11 to 3.13 with venv and ensurepip."
    say "No Python of 3.11 to 3.13 with venv is here; uv brings one."
    uv=$(find_uv)
    if [ -z "$uv" ]; then
        python3 -m pip install -q --user --disable-pip-version-check uv || true
        uv=$(find_uv)
    fi
    [ -n "$uv" ] || die "uv could not be installed either." \
        "Install Python 3.12 with venv (Debian, Ubuntu: apt install python3-venv) or uv (https://docs.astral.sh/uv)."
    rm -rf "$venv"
    "$uv" venv --quiet --python 3.12 --seed "$venv" || die "uv could not bring Python 3.12." \
        "Without a way to the internet, install Python 3.12 from your system's packages and run this again."
}

# PyPI's torch for Linux carries gigabytes of CUDA; PyTorch's own index has a small build, where it can be reached.
install_cpu_torch() {
    local reach="import urllib.request as u; u.urlopen(u.Request('$CPU_INDEX/torch/', method='HEAD'), timeout=4)"
    if [ "$(uname -s)" != Linux ]; then
        pip_install "torch==$CPU_TORCH"
    elif timeout 6 "$python" -c "$reach" >/dev/null 2>&1; then
        pip_install --extra-index-url "$CPU_INDEX" "torch==$CPU_TORCH"
    else
        say "$CPU_INDEX is out of reach; the usual index may bring the large CUDA build, which runs on a CPU too."
        pip_install "torch==$CPU_TORCH"
    fi
}

# Every other package in the version that was tried, refused where a file is not the one whose hash was written down.
install_locked() {
    say "Installing the packages of requirements-cpu.lock, each checked against its hash."
    pip_install --require-hashes --no-deps -r requirements-cpu.lock ||
        die "the packages of requirements-cpu.lock could not be installed (see above)." \
            "If their versions cannot be had here: ./setup.sh --unlocked takes the newest that fit, unchecked."
}

if [ -z "$device" ]; then
    if has_gpu; then device=gpu; else device=cpu; fi
    say "Installing for the $device (found by itself; --gpu and --cpu choose)."
fi
extras=${dev:+dev}
if [ "$device" = gpu ]; then extras=${extras:+$extras,}gpu; fi
stamp="$(cat setup.sh pyproject.toml requirements-cpu.lock core/__init__.py | cksum) $here [$extras] $device ${flash:+flash-attn}${unlocked:+unlocked}"

if ! healthy; then
    [ ! -e "$venv" ] || note ".venv is broken, was moved or is too old; it is made anew."
    make_venv
fi

if [ -x "$venv/bin/finetui" ] && [ "$(cat "$stamp_file" 2>/dev/null)" = "$stamp" ]; then
    echo "finetui is installed in .venv already."
else
    rm -f "$stamp_file"
    if [ "$device" = cpu ]; then
        say "Installing torch $CPU_TORCH for the CPU (about 200 MB)."
        install_cpu_torch
        [ -n "$unlocked" ] || install_locked
    else
        say "Installing torch $GPU_TORCH for CUDA (some gigabytes)."
        pip_install "torch==$GPU_TORCH"
    fi
    about=' and its packages (about a minute)'
    [ "$device" = gpu ] || [ -n "$unlocked" ] || about='' # the lock has brought them
    say "Installing finetui$about${extras:+, with the extras $extras}."
    pip_install -e ".${extras:+[$extras]}"
    if [ -n "$flash" ]; then
        say "Compiling flash-attn (many minutes)."
        { pip_install packaging ninja wheel setuptools && pip_install --no-build-isolation flash-attn; } ||
            note "flash-attn could not be installed (it needs nvcc and a GPU); finetui runs without it."
    fi
    echo "$stamp" >"$stamp_file"
fi

[ -z "$gguf" ] || .venv/bin/finetui gguf --install || note "GGUF files cannot be made until that works."
[ -n "$quick" ] || { say "Looking the machine over (finetui doctor)." && .venv/bin/finetui doctor; }
echo "Start with: ${here}/.venv/bin/finetui"
