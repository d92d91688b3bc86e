# Makes .venv beside this file and installs finetui into it (Windows, PowerShell). Not tried as often as setup.sh:
# on Windows, WSL2 with ./setup.sh is the way that is known to work for training on a GPU.
#   .\setup.ps1 [-Quick] [-Dev] [-Gpu | -Cpu] [-WithFlashAttn]
param(
    [switch]$Quick,
    [switch]$Dev,
    [switch]$Gpu,
    [switch]$Cpu,
    [switch]$WithFlashAttn
)
$ErrorActionPreference = "Stop"
Set-Location $PSScriptRoot

$CpuTorch = "2.13.0"
$GpuTorch = "2.11.0"
$Venv = Join-Path $PSScriptRoot ".venv"
$Python = Join-Path $Venv "Scripts\python.exe"
$Finetui = Join-Path $Venv "Scripts\finetui.exe"
$StampFile = Join-Path $Venv "finetui-setup"

function Say([string]$Text) { if (-not $Quick) { Write-Host "- $Text" } }

# Runs the venv's pip; a failure ends the script.
function Invoke-Pip {
    & $Python -m pip --disable-pip-version-check @args
    if ($LASTEXITCODE -ne 0) { throw "pip failed: pip $args" }
}

# The command of a Python of 3.11 to 3.13, as a list: program, arguments.
function Find-Python {
    $Check = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    foreach ($Candidate in @("py -3.12", "py -3.11", "py -3.13", "python")) {
        $Parts = @($Candidate -split " ")
        if (-not (Get-Command $Parts[0] -ErrorAction SilentlyContinue)) { continue }
        $Rest = @($Parts | Select-Object -Skip 1)
        try { & $Parts[0] @Rest -c $Check 2>$null } catch { continue }
        if ($LASTEXITCODE -eq 0) { return , $Parts }
    }
    return $null
}

# Works and was made here: a virtualenv that was moved runs the interpreter of its old place.
function Test-Venv {
    $Pip = Join-Path $Venv "Scripts\pip.exe"
    if (-not ((Test-Path $Python) -and (Test-Path $Pip))) { return $false }
    try { $Said = (& $Pip --version 2>$null) -join " " } catch { return $false }
    return ($LASTEXITCODE -eq 0) -and $Said.Contains($Venv)
}

if ($Gpu -and $Cpu) { throw "Choose -Gpu or -Cpu." }
if (-not $Gpu -and -not $Cpu) {
    if (Get-Command "nvidia-smi" -ErrorAction SilentlyContinue) {
        & nvidia-smi -L *> $null
        $Gpu = $LASTEXITCODE -eq 0
    }
}
$Device = if ($Gpu) { "gpu" } else { "cpu" }
Say "Installing for the $Device (-Gpu and -Cpu choose)."

$Extras = @()
if ($Dev) { $Extras += "dev" }
if ($Gpu) { $Extras += "gpu" }
$Target = if ($Extras.Count) { ".[" + ($Extras -join ",") + "]" } else { "." }
$Stamp = @(
    (Get-FileHash "pyproject.toml").Hash, (Get-FileHash "core\__init__.py").Hash, $PSScriptRoot, $Target, "$WithFlashAttn"
) -join " "

if (-not (Test-Venv)) {
    if (Test-Path $Venv) { Remove-Item $Venv -Recurse -Force }
    $Base = Find-Python
    if ($Base) {
        Say "Making .venv with $($Base -join ' ')."
        $Rest = @($Base | Select-Object -Skip 1)
        & $Base[0] @Rest -m venv $Venv
    } elseif (Get-Command "uv" -ErrorAction SilentlyContinue) {
        Say "No Python of 3.11 to 3.13 is here; uv brings one."
        & uv venv --quiet --python 3.12 --seed $Venv
    } else {
        throw "No Python of 3.11 to 3.13 was found. Install one from https://www.python.org, or uv (winget install astral-sh.uv)."
    }
    if ($LASTEXITCODE -ne 0) { throw "The virtualenv could not be made in $Venv." }
}

$Installed = (Test-Path $Finetui) -and (Test-Path $StampFile) -and ((Get-Content $StampFile -Raw).Trim() -eq $Stamp)
if ($Installed) {
    Write-Host "finetui is installed in .venv already."
} else {
    if (Test-Path $StampFile) { Remove-Item $StampFile }
    if ($Gpu) {
        # PyPI's torch for Windows is a CPU build; PyTorch's own index has those for CUDA.
        Say "Installing torch for CUDA 13.0 (some gigabytes)."
        Invoke-Pip install -q --extra-index-url "https://download.pytorch.org/whl/cu130" "torch==$GpuTorch"
    } else {
        Say "Installing torch $CpuTorch for the CPU."
        Invoke-Pip install -q "torch==$CpuTorch"
    }
    Say "Installing finetui and its packages: $Target"
    Invoke-Pip install -q -e $Target
    if ($WithFlashAttn) {
        Say "Compiling flash-attn (many minutes)."
        try { Invoke-Pip install -q packaging ninja wheel setuptools; Invoke-Pip install -q --no-build-isolation flash-attn }
        catch { Write-Warning "flash-attn could not be installed; finetui runs without it." }
    }
    Set-Content -Path $StampFile -Value $Stamp
}

if (-not $Quick) {
    Say "Looking the machine over (finetui doctor)."
    & $Finetui doctor
}
Write-Host "Start with: $Finetui"
exit 0
