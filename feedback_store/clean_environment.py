"""What of this process's environment a child is given: what it needs to run, and no secret.

    clean_environment() → training, evaluation, report, llama-server, Parquet, sbatch …

A child reads its run directory and never our settings, so no ``ZLOOP_`` variable is handed on. Of the rest goes what is
on the list of things a program, a GPU, a cluster or a cache needs; and of that nothing whose name sounds like a key or
whose value is a URL with a password. A variable that a site needs besides belongs in the launcher's own options.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_NEEDED = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "TMPDIR", "TEMP", "TMP", "HOSTNAME", "LANG",
        "LANGUAGE", "VIRTUAL_ENV", "SSL_CERT_FILE", "SSL_CERT_DIR", "NO_COLOR", "CC", "CXX", "CPATH", "MODULEPATH",
        "LOADEDMODULES", "NLTK_DATA", "GLIBC_TUNABLES", "SYSTEMROOT",
    }
)  # fmt: skip
_NEEDED_BEGINNINGS = (
    "LC_", "LD_", "DYLD_", "PYTHON", "CONDA_", "XDG_", "CUDA", "CUDNN", "NVIDIA_", "ROCM_", "ROCR_", "HIP_", "HSA_",
    "NCCL_", "RCCL_", "GLOO_", "UCX_", "FI_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "GOMP_", "KMP_", "MKL_",
    "OPENBLAS_", "NUMEXPR_", "MALLOC_", "ARROW_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_",
    "ACCELERATE_", "FSDP_", "DS_", "BNB_", "MPL", "TQDM_", "TRL_", "SLURM_", "SBATCH_", "SQUEUE_", "SINFO_", "MUNGE",
    "COV_CORE_", "COVERAGE_",
)  # fmt: skip
_SECRET_WORDS = re.compile(
    r"(?:^|_|(?<=[A-Z]))(?:KEYS?|TOKENS?|SECRETS?|PASS|PASSWD|PASSWORDS?|PASSPHRASE|PWD|PAT|CREDENTIALS?|CREDS?|AUTH|"
    r"JWT|COOKIES?|SESSION|PRIVATE|DSN|WEBHOOK|SIGNATURE|LICENSE|NETRC)(?:$|_|\d)"
)
_URL_WITH_A_PASSWORD = re.compile(r"[a-zA-Z][\w+.-]*://[^/\s@]*@")
_LOOKS_LIKE_A_KEY = re.compile(r"(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA|eyJ)[\w.-]{8,}")


def clean_environment(environment: Mapping[str, str] | None = None, *, keep: tuple[str, ...] = ()) -> dict[str, str]:
    """Of ``environment`` (default: this process's) what a child may have; ``keep`` names what it needs all the same."""
    given = os.environ if environment is None else environment
    return {name: value for name, value in given.items() if name in keep or _is_harmless(name, value)}


def _is_harmless(name: str, value: str) -> bool:
    is_needed = name in _NEEDED or name.startswith(_NEEDED_BEGINNINGS)
    return is_needed and not (
        _SECRET_WORDS.search(name.upper()) or _URL_WITH_A_PASSWORD.search(value) or _LOOKS_LIKE_A_KEY.search(value)
    )
